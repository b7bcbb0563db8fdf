"""Is encoder A better than B? Per task: the difference, its 95 % interval, p, and a word.

    mae-transfer compare A B [--out DIR]

A and B are checkpoints in DIR, by name or SHA-256, or other folders that hold runs. Only numbers of the same images, by
the same version of a task, are compared; what else differs is named. benchmarks/significance.py has the tests.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from benchmarks.markdown import harmless, markdown_table
from benchmarks.rows import experiment, makers_of
from benchmarks.samples import sample_of
from benchmarks.significance import Difference, Sample, compare, holm, word
from benchmarks.suite import TASKS
from benchmarks.verify import check_hash, check_unaltered, told_as_damaged
from mae_core.command_line import answered
from mae_core.errors import UserError
from mae_core.flags import named_path, program
from mae_core.settings import did_you_mean, differences
from transfer.run import read_record
from transfer.task import RECORD_FILE, Record

SHORTEST = 4  # digits of a SHA-256 that name a checkpoint
AP_GROUPS = 200  # of COCO's images: each takes a tenth of a second or more
ABOUT = """\
A - B in the metric's unit, and p by a paired test on the same images, then corrected by Holm for the number of tasks. A
is better or worse where the corrected p is below 0.05. docs/predictions.md describes the tests.
"""


@dataclass(frozen=True)
class Run:
    """A record with predictions, and where it lies. tuned: the record of the fine-tuning whose classifier it is of."""

    record: Record
    path: Path
    tuned: Record | None = None

    @property
    def origin(self) -> str:
        """How that classifier was made, in words."""
        r = self.tuned
        return f"{r.recipe_label}, {r.data.get('label')} data, version {r.identity.get('task_version')}" if r else ""

    @property
    def experiment(self) -> tuple[str, ...]:
        """What its seeds share."""
        return tuple(experiment(r) for r in (self.record, self.tuned) if r)


@dataclass(frozen=True)
class Row:
    """A task that both sides have. trained: the numbers are of trainings, or of classifiers that were fine-tuned.
    differs: what else is not the same. why: not empty if it was not compared. recipe: where the task has several."""

    task: str
    metric: str
    seeds: tuple[int, int] = (0, 0)
    images: int = 0
    difference: Difference | None = None
    trained: bool = False
    differs: tuple[str, ...] = ()
    why: str = ""
    recipe: str = ""

    @property
    def title(self) -> str:
        return f"{self.task} ({self.recipe})" if self.recipe else self.task


def runs_of(name: str, out: Path) -> list[Run]:
    """The successful runs of a checkpoint in `out`, or in the folder of that name; UserError if it is not one."""
    folder = Path(name)
    where = runs_in(folder if folder.is_dir() else out)
    everything = [(read_record(path), path) for path in sorted(where.rglob(RECORD_FILE))]
    chosen = [(r, path) for r, path in everything if folder.is_dir() or called(r, name)]
    if not chosen:
        known = dict.fromkeys(str(r.checkpoint.get("name")) for r, _ in everything)
        raise UserError(
            f"{out} has no record of '{name}': {did_you_mean(name, list(known)) if known else 'it holds none'}"
        )
    trained = {(r.checkpoint.get("name"), r.checkpoint.get("sha256")) for r, _ in chosen if not drawn(r)}
    names = {(r.checkpoint.get("name"), "random") for r, _ in chosen if drawn(r)} | trained
    if len(names) > 1:
        listed = ", ".join(sorted(f"{known} {str(sha)[:8]}" for known, sha in names))
        raise UserError(f"'{name}' is several checkpoints: {listed}; choose one, by its SHA-256 where names are equal")
    makers = makers_of(r for r, _ in everything)
    return [Run(r, path, makers.get(r.identity.get("parent") or "")) for r, path in chosen if r.status == "ok"]


def runs_in(folder: Path) -> Path:
    """Where the records of an --out lie, or the folder itself if it is part of one; UserError for any other."""
    if (folder / "runs").is_dir():
        return folder / "runs"
    if "runs" in folder.absolute().parts:
        return folder
    raise UserError(f"{folder} holds no runs/: give the --out of a run, or the name of a checkpoint in --out")


def called(record: Record, name: str) -> bool:
    own, sha256 = record.checkpoint.get("name"), record.checkpoint.get("sha256") or ""
    return name == own or (len(name) >= SHORTEST and sha256.startswith(name.lower()))


def drawn(record: Record) -> bool:
    """Whether the encoder is random weights, which each seed draws anew."""
    return record.checkpoint.get("format") == "random"


def grouped(runs: Sequence[Run]) -> dict[str, dict[tuple, list[Run]]]:
    """Task -> (recipe, how the classifier was made, engine, precision, images) -> its seeds' runs, the latest of each.
    All are of one experiment, the latest's: not of two versions of a task, or of data that were changed."""
    found: dict[str, dict[tuple, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in sorted(runs, key=lambda run: run.record.finished):
        r = run.record
        made = run.origin.rpartition(", version")[0]  # another version is not compared, and says so
        key = (r.recipe_label, made, r.engine, r.machine.get("precision", ""), r.predictions.get("images", ""))
        found[r.task][key].append(run)
    return {
        task: {
            key: distinct({run.record.seed: run for run in group if run.experiment == group[-1].experiment})
            for key, group in groups.items()
        }
        for task, groups in found.items()
    }


def distinct(seeds: dict[int, Run]) -> list[Run]:
    """One run for each set of predictions: a seed that changes nothing is none."""
    return list({seeds[s].record.predictions.get("sha256", s): seeds[s] for s in sorted(seeds, reverse=True)}.values())


def rows_of(a: Sequence[Run], b: Sequence[Run], data: Path | None) -> list[Row]:
    """A row for each comparison of a task that both have, in the suite's order."""
    order = {task.name: number for number, task in enumerate(TASKS)}
    sides = grouped(a), grouped(b)
    tasks = sorted(sides[0].keys() & sides[1].keys(), key=lambda name: (order.get(name, len(order)), name))
    return [row for task in tasks for row in rows_of_task(sides[0][task], sides[1][task], data)]


def rows_of_task(a: dict[tuple, list[Run]], b: dict[tuple, list[Run]], data: Path | None) -> list[Row]:
    """Equal recipes with each other; if there are none, the only one of either side, which names the difference."""
    pairs = [key for key in a if key in b]
    if not pairs:
        if len(a) > 1 or len(b) > 1:
            first = next(iter(a.values()))[0].record
            labels = [" / ".join(dict.fromkeys(recipe_of(key) for key in side)) for side in (a, b)]
            return [Row(first.task, first.metric, why=f"A was run with {labels[0]}, B with {labels[1]}: no two agree")]
        return [row_of(next(iter(a.values())), next(iter(b.values())), data)]
    if len(pairs) == 1:
        return [row_of(a[key], b[key], data) for key in pairs]
    return [replace(row_of(a[key], b[key], data), recipe=recipe_of(key)) for key in pairs]


def recipe_of(key: tuple) -> str:
    recipe, made = key[:2]
    return f"{recipe}, classifier from {made}" if made else recipe


def row_of(a: list[Run], b: list[Run], data: Path | None) -> Row:
    first = a[0].record
    row = partial(Row, first.task, first.metric, (len(a), len(b)))
    if why := refused(a[0], b[0]):
        return row(why=why)
    try:
        samples = [[sample(run, data) for run in side] for side in (a, b)]
    except UserError as e:
        return row(why=str(e))
    mine, theirs = ([each for each, _ in side] for side in samples)
    groups = {"groups": AP_GROUPS} if first.task == "coco" else {}
    try:
        difference = compare(mine, theirs, samples[0][0][1], **groups)
    except UserError as e:
        return row(why=str(e))
    trained = trains(first.task) or bool(first.identity.get("parent"))
    return row(mine[0].images, difference, trained, differing(a[0], b[0]))


def refused(mine: Run, theirs: Run) -> str:
    """Why two runs cannot be compared; "" if they can."""
    a, b = mine.record, theirs.record
    for what, pair in (("the task", (a, b)), ("the fine-tuning", (mine.tuned, theirs.tuned))):
        versions = [r.identity.get("task_version") if r else None for r in pair]
        if versions[0] != versions[1] and None not in versions:
            return f"version {versions[0]} of {what} against {versions[1]}, whose numbers differ: run it again"
    if without := [name for name, r in (("A", a), ("B", b)) if not r.predictions]:
        return f"{' and '.join(without)} kept no predictions: an earlier version made the record; run it again"
    if a.predictions["images"] != b.predictions["images"]:
        return "they were tested on different images"
    return ""


def differing(mine: Run, theirs: Run) -> tuple[str, ...]:
    """What else is not the same, in words: the knobs of the recipe, how it ran, and what the classifier comes from."""
    a, b = mine.record, theirs.record
    own = [
        (r.recipe_name, r.engine, str(r.machine.get("precision", "")), str(r.data.get("label")), run.origin)
        for r, run in ((a, mine), (b, theirs))
    ]
    names = ("recipe", "engine", "precision", "data", "classifier")
    found = [f"{name}: {one} -> {other}" for name, one, other in zip(names, *own) if one != other]
    pairs = {"the data are": (a, b), "the data of the fine-tunings are": (mine.tuned, theirs.tuned)}
    for what, pair in pairs.items():
        prints = [r.data.get("fingerprint") if r else None for r in pair]
        if prints[0] != prints[1] and all(prints):
            found.append(f"{what} not the same files")
    return (*found, *differences(a.recipe, b.recipe))


def sample(run: Run, data: Path | None) -> tuple[Sample, bool]:
    """UserError if the record or its predictions were altered."""
    check_unaltered(run.record, run.path)
    file = run.path.parent / Path(run.record.predictions["file"]).name
    check_hash(file, run.record.predictions["sha256"], run.path)
    with told_as_damaged(file):
        return sample_of(run.record, run.path.parent, data or Path(run.record.data.get("root") or ""))


def written(rows: Sequence[Row], a: str, b: str) -> str:
    """The rows as Markdown, what differs and what was not compared below them."""
    better = {task.name: task.higher_is_better for task in TASKS}
    tested = [row for row in rows if row.difference is not None]
    corrected = holm([row.difference.p for row in tested if row.difference]) if tested else []
    header = ["task", "metric", "A", "B", "A - B", "95 % interval", "p", "p (Holm)", "A is", "images", "seeds", "test"]
    lines, notes = [header], []
    for row, p in zip(tested, corrected):
        d = row.difference
        assert d is not None
        result = word(d, p, better.get(row.task, True))
        numbers = [f"{d.a:.2f}", f"{d.b:.2f}", f"{d.value + 0.0:+.2f}", f"{d.low:+.2f} to {d.high:+.2f}"]
        seeds = " / ".join(map(str, row.seeds))
        lines.append([row.title, row.metric, *numbers, shown(d.p), shown(p), result, str(row.images), seeds, d.test])
        if row.differs:
            notes.append(f"- {row.title}, A -> B: {'; '.join(row.differs)}")
        if row.trained and row.seeds == (1, 1):
            notes.append(f"- {row.title}: one training each, so how much trainings differ by chance is not counted")
    notes += [f"- {row.title}: not compared: {row.why}" for row in rows if row.why]
    parts = [f"A: {a}\nB: {b}", ABOUT.strip(), markdown_table(lines, left=2, padded=True) if tested else ""]
    return harmless("\n\n".join(part for part in (*parts, "\n".join(notes)) if part))


def shown(p: float) -> str:
    return f"{p:.2g}" if p else "< 1e-300"  # less than a float holds


def trains(name: str) -> bool:
    return any(task.name == name.partition(":")[0] and task.trains for task in TASKS)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0: all tasks that both have were compared. 1: not all could be. 2: A or B is no checkpoint here."""
    parser = argparse.ArgumentParser(
        prog=program("benchmarks.compare"), description="Compare two checkpoints, task by task, on the same images."
    )
    parser.add_argument("a", metavar="A", help="a checkpoint in --out, by name or SHA-256, or a folder of its runs")
    parser.add_argument("b", metavar="B", help="the other one")
    parser.add_argument(
        "--out", type=named_path, default=Path("results"), help="the folder that holds runs/ (default: results)"
    )
    parser.add_argument("--data", type=named_path, help="where the data lie now, for COCO's annotations")
    return answered(partial(run, parser.parse_args(argv)))


def run(args: argparse.Namespace) -> int:
    a, b = runs_of(args.a, args.out), runs_of(args.b, args.out)
    rows = rows_of(a, b, args.data)
    if not rows:
        raise UserError(f"no task was run with both {args.a} and {args.b}")
    print(written(rows, title(a, args.a), title(b, args.b)))
    if {run.path for run in a} == {run.path for run in b}:
        print("note: A and B are the same runs")
    return 0 if all(row.difference for row in rows) else 1


def title(runs: Sequence[Run], name: str) -> str:
    if not runs:
        return name
    c = runs[0].record.checkpoint
    return f"{c.get('name')} ({c.get('arch')}, {str(c.get('sha256'))[:8]})"


if __name__ == "__main__":
    sys.exit(main())
