"""Records -> tables. Reads every record under OUT/runs, writes OUT/index.html, OUT/summary.csv, OUT/summary.md and
OUT/tables.

    python -m benchmarks.report --out results

The same records in any order give the same bytes. benchmarks/rows.py decides what shares a row and a cell.
"""

import argparse
import hashlib
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.markdown import no_formula
from benchmarks.page.build import page
from benchmarks.render import fixed, summary_markdown, table_markdown, without_paths
from benchmarks.rows import (
    Cell,
    Section,
    canonical_json,
    experiment,
    fill,
    makers_of,
    rank,
    records_for,
    row_key,
)
from benchmarks.suite import TASKS
from benchmarks.tables import TABLES, Table, train_fraction, with_fractions
from mae_core.claim import claimed, clear_leftovers
from mae_core.command_line import answered
from mae_core.errors import UserError
from mae_core.files import printable
from mae_core.flags import named_path, program
from mae_core.stopping import stop_postponed
from mae_core.writing import write_texts
from transfer.run import altered, fits, read_record
from transfer.task import CLASSIFIER_FILE, RECORD_FILE, Record, recipe_label

DECIMALS = {"value": 4, "stderr": 4, "chance": 4, "seconds": 1, "images_per_second": 2, "peak_memory_gib": 2}


class UnreadableRecords(UserError):
    """All other records are in the tables. Its arguments: a sentence for each of these."""

    def __str__(self) -> str:
        return "; ".join(self.args)


def report(out: Path, going: bool = False) -> list[Path]:
    """Write the tables and the page of all records under out/runs, all of them or none, and return their paths. going:
    more jobs will follow, so that the page looks for their results.

    UserError if there is no record, or a table cannot be written; UnreadableRecords once all others are in the tables.
    """
    if not any((out / "runs").rglob(RECORD_FILE)):
        raise UserError(f"{out / 'runs'} holds no records: run benchmarks/run_all.py first")
    with claimed(out / "tables", wait=True):  # several runs may write to one --out
        clear_leftovers(out)
        return write_tables(out, going)


def write_tables(out: Path, going: bool) -> list[Path]:
    found, unreadable = find_records(out)
    if not found:
        raise UserError("; ".join(unreadable))
    records = [record for record, _ in found]
    sections = group_by_section(records)
    files: dict[str, str | None] = {}
    files |= {"summary.csv": summary_csv(records), "summary.md": summary_markdown(sections, records)}
    for table in TABLES:
        mine = {section: own for section, members in sections.items() if (own := records_for(members, table))}
        table = with_fractions(table, records)
        files[f"tables/{table.name}.csv"] = table_csv(table, mine) if mine else None
        files[f"tables/{table.name}.md"] = table_markdown(table, mine) if mine else None
    files["index.html"] = page(out, found, unreadable, sections, data_titles(records), going)
    texts = {out / name: text for name, text in files.items() if text is not None}
    with stop_postponed():  # or some tables would be of now, others of an earlier call
        write_texts(texts)
        for name, text in files.items():
            if text is None:
                (out / name).unlink(missing_ok=True)  # the table of an earlier call, whose records are gone
    if unreadable:
        raise UnreadableRecords(*unreadable)
    return list(texts)


def read_records(out: Path) -> tuple[list[Record], list[str]]:
    """The records under out/runs, sorted by their content, wherever they lie; a sentence for each unreadable one."""
    found, unreadable = find_records(out)
    return [record for record, _ in found], unreadable


def find_records(out: Path) -> tuple[list[tuple[Record, Path]], list[str]]:
    """What `read_records` returns, each record with its file."""
    records, unreadable = [], []
    for path in sorted((out / "runs").rglob(RECORD_FILE)):
        try:
            record = read_record(path)
            if not fits(train_fraction(record), float):
                raise UserError(f"{path} is not a record of this version (wrong: recipe); move it away or delete it")
            if altered(record):
                raise UserError(
                    f"{path} was altered after its run, so its numbers are not shown; put the original back"
                )
            records.append((shown(record), path))
        except UserError as e:
            unreadable.append(str(e))
    makers = makers_of(record for record, _ in records)
    records = [(with_remark(record, makers), path) for record, path in records]
    return sorted(records, key=lambda found: (canonical_json(found[0]), found[1])), unreadable


def with_remark(record: Record, makers: dict[str, Record]) -> Record:
    """The record, with a note if its classifier was fine-tuned by an earlier version of that task: its own version is
    that of the evaluation."""
    maker = makers.get(record.identity.get("parent") or "")
    if maker is None:
        return record
    version = maker.identity.get("task_version")
    now = next((task.version for task in TASKS if task.name == maker.task), version)
    old = f"the classifier is of version {version} of {maker.task}, which is at {now} now"
    return record if version == now else replace(record, notes=(*record.notes, old))


def shown(record: Record) -> Record:
    """The record with every text in it fit for a table: names and reasons out of files can hold anything."""

    def fit(value: Any) -> Any:
        if isinstance(value, dict):
            return {printable(key): fit(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(fit, value))
        return printable(" ".join(value.split())) if isinstance(value, str) else value

    return Record(**fit(vars(record)))


def data_titles(records: list[Record]) -> Callable[[Record], str]:
    """A function that titles a record's data: "official data", "miniature data", "subset FOLDER" or "own FOLDER". The
    rest of the path is the machine's business; a hash of it tells apart folders of the same name."""
    roots = {r.data.get("root") or "" for r in records}
    names = Counter(Path(root).name for root in roots)

    def title(r: Record) -> str:
        label, root = r.data.get("label") or "no", r.data.get("root") or ""
        if label not in ("subset", "own"):
            return f"{label} data"
        name = Path(root).name
        apart = f" {hashlib.sha256(root.encode()).hexdigest()[:4]}" if names[name] > 1 else ""
        return f"{label} {name}{apart}"

    return title


def group_by_section(records: list[Record]) -> dict[Section, list[Record]]:
    """The records of each section, the official one first.

    A share of the training images makes a column, not a section. A robustness number whose classifier was fine-tuned
    with another recipe or on other data says so in its label, and so does one whose fine-tuning is not the experiment
    that counts in the tables, but one of an earlier version or of data that were changed. A record without a data label
    (nothing was found) goes to the sections of its recipe with the same data root.
    """
    title = data_titles(records)
    by_engine = {column.task for table in TABLES if table.by_engine for column in table.columns}

    def section_of(r: Record) -> Section:
        overrides = {knob: value for knob, value in r.overrides.items() if knob != "train_fraction"}
        label = recipe_label(r.recipe_name, overrides, r.limit)
        return Section(label, title(r), r.engine if r.task in by_engine else "")

    def origin_of(r: Record) -> Section:
        return section_of(r) if train_fraction(r) == 1 else section_of(r)._replace(recipe=r.recipe_label)

    tunings = [r for r in records if r.task == "imagenet_finetune" and CLASSIFIER_FILE in r.artifacts]
    tuned = {(r.checkpoint.get("sha256"), r.seed) for r in tunings}
    makers = makers_of(records)
    latest = {(row_key(r), origin_of(r)): experiment(r) for r in sorted(tunings, key=rank)}
    sections, homes = defaultdict(list), defaultdict(set)
    for r in records:
        if r.data.get("label"):
            section = section_of(r)
            homes[section.recipe, r.data.get("root"), section.engine].add(section)
            classifier = r.identity.get("parent") or ""
            maker = makers.get(classifier)
            if maker is None and classifier and (r.checkpoint.get("sha256"), r.seed) in tuned:
                section = section._replace(recipe=f"{section.recipe}, classifier changed after its record")
            elif maker and (parent := origin_of(maker)) != section:
                section = section._replace(recipe=f"{section.recipe}, classifier from {parent.recipe}, {parent.data}")
            if maker and latest.get((row_key(maker), origin_of(maker)), experiment(maker)) != experiment(maker):
                section = section._replace(recipe=f"{section.recipe}, classifier of an earlier fine-tuning")
            sections[section].append(r)
    for r in records:
        if not r.data.get("label"):
            alone = section_of(r)
            for section in homes.get((alone.recipe, r.data.get("root"), alone.engine), {alone}):
                sections[section].append(r)
    return {key: sections[key] for key in sorted(sections, key=lambda s: (not s.official, s))}


def summary_lines(records: list[Record]) -> list[dict[str, Any]]:
    """One line per record and metric, the headline first, whose value is None for failed and skipped records. Hashes
    are whole and numbers as they are in the records."""
    lines, title = [], data_titles(records)
    for r in records:
        row = row_key(r)
        for metric in sorted(r.metrics, key=lambda m: (m != r.metric, m)) or [r.metric]:
            line = {
                "checkpoint": row.name,
                "sha256": row.sha256,
                "arch": row.arch,
                "task": r.task,
                "metric": metric,
                "value": r.metrics.get(metric),
                "stderr": r.stderr.get(metric),
                "n_eval": r.n_eval,
                "chance": r.chance,
                "seed": r.seed,
                "recipe": r.recipe_label,
                "data": title(r),
                "data_detail": without_paths(r.data.get("detail") or ""),
                "data_findings": without_paths("; ".join(r.data.get("findings") or ())),
                "data_fingerprint": r.data.get("fingerprint") or "",
                "image_size": row.image_size,
                "engine": row.engine,
                "precision": row.precision,
                "status": r.status,
                "reason": without_paths(r.reason),
                "notes": without_paths("; ".join(r.notes)),
                "seconds": r.seconds,
                "images_per_second": r.images_per_second,
                "peak_memory_gib": r.peak_memory_gib,
                "device": r.machine.get("device", ""),
                "hardware": r.hardware,
                "commit": r.commit,
                "finished": r.finished,
                "identity": r.identity,
            }
            lines.append(line)
    keys = ["checkpoint", "sha256", "arch", "recipe", "data", "task", "seed", "engine", "precision", "finished"]
    return sorted(lines, key=lambda line: [line[key] for key in keys])


def summary_csv(records: list[Record]) -> str:
    lines = summary_lines(records)
    for line in lines:
        line |= {key: fixed(line[key], decimals) for key, decimals in DECIMALS.items()}
        line |= {key: line[key][:8] for key in ("sha256", "data_fingerprint")}
    return as_csv([{key: value for key, value in line.items() if key != "identity"} for line in lines])


def table_csv(table: Table, sections: dict[Section, list[Record]]) -> str:
    """One line per row, ours and published, with every column of the table; status words have columns of their own."""
    lines = []
    for section, records in sections.items():
        for x in fill(table, section, records):
            recipe, data = ("", "") if x.published else section[:2]
            line: dict[str, Any] = {"row": "published" if x.published else "ours", "recipe": recipe, "data": data}
            line |= {"name": x.name, "sha256": x.sha256[:8], "arch": x.arch, "image_size": x.image_size}
            line |= {"engine": x.engine, "precision": x.precision, "parameters": x.parameters or ""}
            line |= {"pretraining": x.pretraining, "epochs": x.made.epochs or "", "target": x.made.target}
            line |= {"pretraining_images": x.made.images or ""}
            line |= {"gpu_hours": fixed(x.gpu_hours or None, 4), "cpu_hours": fixed(x.cpu_hours or None, 4)}
            for column in table.columns:
                c = x.cells.get(column.key, Cell())
                line[column.key] = c.text or fixed(c.value, 4)
                line |= {f"{column.key}.{k}": fixed(getattr(c, k), 4) for k in ("stderr", "sd", "delta")}
                line |= {f"{column.key}.seeds": c.seeds or "", f"{column.key}.status": c.status}
                line |= {f"{column.key}.verdict": c.verdict, f"{column.key}.published": c.reference}
                line[f"{column.key}.why"] = without_paths("; ".join(c.why))
            lines.append(line)
    return as_csv(lines)


def as_csv(lines: list[dict[str, Any]]) -> str:
    import pandas as pd  # late: the import takes half a second, and a plan writes no table

    return pd.DataFrame(lines).map(no_formula).to_csv(index=False, lineterminator="\n")


def main(argv: list[str] | None = None) -> int:
    """Exit code 0: all records are in the tables. 1: some could not be read. 2: no tables were written."""
    parser = argparse.ArgumentParser(
        prog=program("benchmarks.report"), description="Make the tables and the page of all records."
    )
    parser.add_argument("--out", type=named_path, default=Path("results"), help="the folder that holds runs/")
    return answered(partial(run, parser.parse_args(argv)))


def run(args: argparse.Namespace) -> int:
    try:
        written = report(args.out)
    except UnreadableRecords as e:
        print(*e.args, sep="\n", file=sys.stderr)
        return 1
    print(*written, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
