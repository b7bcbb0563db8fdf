"""Records -> what other programs read: the tables in LaTeX, a model card for the Hugging Face Hub, or flat JSON.

    python -m benchmarks.export --to latex --out results --file tables.tex

Like the tables, the same records give the same bytes.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.latex import latex_document
from benchmarks.model_card import model_card
from benchmarks.report import group_by_section, read_records, summary_lines
from mae_core.command_line import answered
from mae_core.errors import UserError
from mae_core.flags import named_path, program
from mae_core.writing import write_text
from transfer.task import Record

SHORTEST = 4  # digits of a hash that may name a checkpoint


def to_latex(records: list[Record]) -> str:
    return latex_document(group_by_section(records))


def to_card(records: list[Record]) -> str:
    return model_card(group_by_section(records), records)


def to_json(records: list[Record]) -> str:
    """A list of objects, one per record and metric: the columns of summary.csv with whole hashes and unrounded numbers
    (null where there is none), and the record's identity."""
    return json.dumps(summary_lines(records), indent=1, ensure_ascii=False) + "\n"


FORMATS: dict[str, Callable[[list[Record]], str]] = {"latex": to_latex, "hf-card": to_card, "json": to_json}


def checkpoints_in(records: list[Record]) -> dict[str, str]:
    """{hash: name}"""
    return {str(r.checkpoint.get("sha256") or ""): str(r.checkpoint.get("name") or "") for r in records}


def of_checkpoint(records: list[Record], asked: str, single: bool, out: Path) -> list[Record]:
    """The records of the checkpoint with that name, or a hash that begins so. single: of one checkpoint; where none is
    asked for, of the only one that is no random weights. UserError if there is none, or several."""
    chosen = records
    if asked:
        chosen = [r for r in records if asked == r.checkpoint.get("name") or is_hash(asked, r)]
    elif single:
        chosen = [r for r in records if r.checkpoint.get("format") != "random"]
    found = checkpoints_in(chosen)
    if not found or (single and len(found) > 1):
        named = ", ".join(f"{name} {sha[:8]}" for sha, name in sorted(checkpoints_in(records).items()))
        what = f"--ckpt {asked}: " if asked else ""
        raise UserError(f"{what}{out} holds {named}: choose one of these with --ckpt, by its name or hash")
    return chosen


def is_hash(asked: str, r: Record) -> bool:
    return len(asked) >= SHORTEST and str(r.checkpoint.get("sha256") or "").startswith(asked.lower())


def main(argv: list[str] | None = None) -> int:
    """Exit code 0: all records are in it. 1: some could not be read. 2: nothing was written."""
    parser = argparse.ArgumentParser(
        prog=program("benchmarks.export"), description="Write the results for other programs to read."
    )
    parser.add_argument("--to", required=True, choices=FORMATS, help="LaTeX tables, a model card, or flat JSON")
    parser.add_argument("--out", type=named_path, default=Path("results"), help="the folder that holds runs/")
    parser.add_argument("--file", type=named_path, help="where to write it (default: print it)")
    parser.add_argument("--ckpt", default="", metavar="NAME_OR_HASH", help="only this checkpoint; a card is of one")
    return answered(partial(run, parser.parse_args(argv)))


def run(args: argparse.Namespace) -> int:
    records, unreadable = read_records(args.out)
    if not records:
        nothing = f"{args.out / 'runs'} holds no records: run benchmarks/run_all.py first"
        raise UserError("; ".join(unreadable) or nothing)
    text = FORMATS[args.to](of_checkpoint(records, args.ckpt, args.to == "hf-card", args.out))
    if args.file:
        write_text(args.file, text)
    else:
        sys.stdout.write(text)
    for sentence in unreadable:
        print(sentence, file=sys.stderr)
    return 1 if unreadable else 0


if __name__ == "__main__":
    sys.exit(main())
