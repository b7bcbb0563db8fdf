"""Follow a pre-training: tasks on its kept weights as they appear, and a curve over the epochs.

    mae-transfer watch RUN --tasks imagenet_knn ... [any flag of `mae-transfer run`]

RUN is the --out of a pre-training with --keep-every N. All that is known lies in the records below --out: the same
command goes on after any end, also its own kill.
"""

import argparse
import csv
import io
import re
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import run_all
from benchmarks.cost import read_records
from mae_core.claim import Watch
from mae_core.command_line import answered
from mae_core.errors import UserError
from mae_core.files import printable
from mae_core.flags import named_path, program
from mae_core.pretrain import WEIGHTS_FILE
from mae_core.stopping import stop_on_signals
from mae_core.writing import replacing, write_text
from transfer.task import Record

POLL = 10.0  # seconds between two looks
CURVE, PICTURE = "curve.csv", "curve.png"
OWN = ("--ckpt", "--plan", "--dry-run", "--list", "--ls", "--launcher", "--json", "--measure")


class Point(NamedTuple):
    """A task's headline after some epochs; stderr as in the record, None without."""

    task: str
    metric: str
    epochs: int
    seed: int
    value: float
    stderr: float | None


def kept_weights(run: Path) -> list[Path]:
    """The weights that the pre-training has kept so far, in the order of their epochs, the final ones last."""
    final = run / WEIGHTS_FILE
    return sorted(run.glob("epoch-*.safetensors")) + ([final] if final.exists() else [])


def follow(run: Path, out: Path, flags: Sequence[str]) -> int:
    """Evaluate what there is and what comes, until the final weights are evaluated. 1 if a task failed, or if nobody
    trains any more and there are no final weights; 130 after Ctrl-C."""
    claim, seen, worst = Watch(run), set[Path](), 0
    while True:
        trained_on = claim.holder() is not None  # before looking: what it writes last must not be missed
        weights = kept_weights(run)
        if new := [path for path in weights if path not in seen]:
            code = run_all.main(["--ckpt", *map(str, new), "--out", str(out), *flags])
            if code in (2, 130):
                return code
            worst, seen = max(worst, code), seen | set(new)
            draw(out, points_of(read_records(out), weights))
            continue
        if run / WEIGHTS_FILE in seen:
            return worst
        if not trained_on:
            last = f"the last weights are {weights[-1].name}" if weights else "it has kept no weights yet"
            raise UserError(f"{run}: nobody trains there now, and it has not ended ({last}): start both again")
        if not weights:
            print(f"waiting for {run}/epoch-*.safetensors (pretrain --keep-every N), or {WEIGHTS_FILE}", flush=True)
        time.sleep(POLL)


def points_of(records: Sequence[Record], weights: Sequence[Path]) -> list[Point]:
    """The headlines of these weights, by task, seed and epochs; of one file that two names have, one. Of a task that
    was run by several recipes, on several data or by several versions, those that are as the latest."""
    names = {str(path) for path in weights}
    mine = [r for r in records if r.status == "ok" and str(r.checkpoint.get("path")) in names]
    latest = {r.task: setting(r) for r in sorted(mine, key=lambda r: r.finished)}
    found = {}
    for r in mine:
        if setting(r) == latest[r.task] and (epochs := epochs_of(r)) is not None:
            values = r.metrics[r.metric], r.stderr.get(r.metric)
            found[r.task, r.seed, epochs] = Point(r.task, r.metric, epochs, r.seed, *values)
    return [found[key] for key in sorted(found)]


def setting(record: Record) -> dict[str, Any]:
    """What the points of one curve share."""
    return {key: value for key, value in record.identity.items() if key not in ("checkpoint", "seed", "parent")}


def epochs_of(record: Record) -> int | None:
    """The epochs that the weights' file gave itself; None if it gave none. UserError if they are no number."""
    epochs = (record.checkpoint.get("meta") or {}).get("epochs")
    if epochs is None:
        return None
    if re.fullmatch("[0-9]{1,9}", str(epochs)):
        return int(epochs)
    raise UserError(
        f"{printable(str(record.checkpoint.get('path')))}, as the record of {record.task} has it, was trained for "
        f'"{printable(str(epochs)[:40])}" epochs, which is no number: no pre-training here wrote that; move both away'
    )


def draw(out: Path, points: Sequence[Point]) -> None:
    """Write the curve as CSV and as a picture, a panel for each task."""
    if not points:
        return
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(Point._fields)
    table.writerows(["" if value is None else value for value in point] for point in points)
    write_text(out / CURVE, text.getvalue())
    with replacing(out / PICTURE) as temporary:
        picture(points).savefig(temporary, format="png", dpi=130)
    print(f"curve: {out / CURVE}, {out / PICTURE}", flush=True)


def picture(points: Sequence[Point]) -> Any:
    from matplotlib.figure import Figure  # late: the import takes a second

    tasks = list(dict.fromkeys((point.task, point.metric) for point in points))
    figure = Figure(figsize=(7.5, 0.6 + 2.6 * len(tasks)), layout="constrained")
    for panel, (task, metric) in zip(figure.subplots(len(tasks), squeeze=False)[:, 0], tasks):
        for seed in sorted({point.seed for point in points if point.task == task}):
            own = [point for point in points if (point.task, point.seed) == (task, seed)]
            errors = [point.stderr or 0.0 for point in own]
            x, y = [point.epochs for point in own], [point.value for point in own]
            panel.errorbar(x, y, errors, fmt="o-", markersize=4, capsize=3, label=f"seed {seed}")
        panel.set_title(task, loc="left", fontsize=10)
        panel.set_ylabel(metric)
        panel.grid(axis="y", color="0.9")
        panel.xaxis.get_major_locator().set_params(integer=True)
        if len({point.seed for point in points}) > 1:
            panel.legend(fontsize=8)
    panel.set_xlabel("epochs of pre-training")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=program("benchmarks.watch"),
        description="Follow a pre-training: tasks on its kept weights as they appear, and a curve.",
        epilog="All other flags are those of `mae-transfer run`, --tasks among them.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="the --out of a pre-training with --keep-every N")
    parser.add_argument("--out", type=named_path, help="folder of records, tables and the curve (default: RUN/watch)")
    args, flags = parser.parse_known_args(argv)
    stop_on_signals()
    return answered(partial(checked, args, flags), "stopped; the same command goes on from here")


def checked(args: argparse.Namespace, flags: Sequence[str]) -> int:
    given = {flag.partition("=")[0] for flag in flags}
    if wrong := [flag for flag in OWN if flag in given]:
        raise UserError(f"{wrong[0]} does not go with watch, which evaluates each kept file here as it appears")
    if not run_all.parse(flags).tasks:  # here, not when the first weights appear
        raise UserError("say with --tasks what is to be evaluated, such as --tasks imagenet_knn")
    if not args.run.is_dir():
        raise UserError(f"{args.run} is no folder: give the --out of a pre-training")
    return follow(args.run, args.out or args.run / "watch", flags)


if __name__ == "__main__":
    sys.exit(main())
