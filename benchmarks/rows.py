"""Records -> the sections, rows and cells of a table.

A section is one recipe on one kind of data, and one engine where a task has several. A row of it is one checkpoint
under one engine, precision and input side: numbers of different meaning never share a row or a column. A cell averages
the seeds of one experiment. Its standard error is one run's, from the sampling of the test images; the spread over
seeds is a number of its own.
"""

import dataclasses
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from benchmarks.checkpoints import Pretraining, in_words, is_random, parameters, pretraining, pretraining_of
from benchmarks.suite import TASKS
from benchmarks.tables import Column, Published, Table, published_numbers
from benchmarks.verdict import OFFICIAL, Number, judge, reference_in_words
from mae_core.vit import ARCHS
from transfer.run import STATUS
from transfer.task import Record

EVALUATIONS = {task.name for task in TASKS if not task.trains}


class Section(NamedTuple):
    """What all numbers of one section share. recipe: its label. engine: "" where the task has only one."""

    recipe: str
    data: str
    engine: str = ""

    @property
    def official(self) -> bool:
        """Whether these numbers may be compared with published ones."""
        return self[:2] == OFFICIAL

    @property
    def title(self) -> str:
        return f"Recipe {self.recipe}, {self.data}" + (f", engine {self.engine}" if self.engine else "")


class Row(NamedTuple):
    """What all numbers of one row share. image_size: input side in px, "" where no record says it."""

    name: str
    sha256: str
    arch: str
    image_size: str
    engine: str
    precision: str


@dataclass(frozen=True)
class Cell:
    """One number, or the word in its place.

    status: "ok", "failed", "skipped", "published", or "" for a hole. stderr: of one run, from the sampling of the test
    images. sd: over seeds. without: seeds without a number, e.g. "1 failed". text: a published number as printed.
    verdict, why: of ours beside a published number (benchmarks/verdict.py), "" where there is none. reference: that
    number in words; source: where it was published; delta: ours minus it.
    """

    status: str = ""
    value: float | None = None
    stderr: float | None = None
    sd: float | None = None
    seeds: int = 0
    delta: float | None = None
    without: str = ""
    text: str = ""
    verdict: str = ""
    why: tuple[str, ...] = ()
    reference: str = ""
    source: str = ""


@dataclass(frozen=True)
class Line:
    """One row of a table; cells by column key. The name of a published row is its method. gpu_hours, cpu_hours: wall
    time times processes of all the runs that its cells are made of."""

    name: str
    sha256: str
    arch: str
    image_size: str
    engine: str = ""
    precision: str = ""
    made: Pretraining = field(default_factory=Pretraining)
    pretraining: str = ""
    published: bool = False
    cells: dict[str, Cell] = field(default_factory=dict)
    gpu_hours: float = 0.0
    cpu_hours: float = 0.0

    @property
    def parameters(self) -> int | None:
        return parameters(self.arch)


def fill(table: Table, section: Section, records: list[Record]) -> list[Line]:
    """The table's rows in one section, by arch; on official data the numbers published for its recipe come before
    ours."""
    same_recipe = published_numbers(table, section.recipe)
    lines = published_lines(same_recipe) if section.data == OFFICIAL[1] else []
    published = same_recipe or published_numbers(table)
    for row, members in group_by_row(records_for(records, table)).items():
        cells = {column.key: make_cell(members, row, column, section, published) for column in table.columns}
        cells |= {column.key: mean_cell(cells, column) for column in table.columns if column.mean_of}
        made = pretraining_of(members[0].checkpoint), pretraining(members[0].checkpoint)
        gpu, cpu = (hours_of(members, table, on_gpu) for on_gpu in (True, False))
        lines.append(Line(*row, *made, cells=cells, gpu_hours=gpu, cpu_hours=cpu))
    return sorted(lines, key=lambda line: arch_order(line.arch))


def mean_cell(cells: dict[str, Cell], column: Column) -> Cell:
    """The mean of other cells in the row; a hole unless each has a number of all its seeds."""
    parts = [cells[f"{task}.top1"] for task in column.mean_of]
    if not all(part.status == "ok" and not part.without for part in parts):
        return Cell()
    errors = [part.stderr for part in parts if part.stderr is not None]
    stderr = math.hypot(*errors) / len(parts) if len(errors) == len(parts) else None
    values = [part.value for part in parts if part.value is not None]
    return Cell("ok", statistics.fmean(values), stderr, seeds=min(part.seeds for part in parts))


def published_lines(published: list[Published]) -> list[Line]:
    """A row for each method, arch, input side and pre-training. A number whose source leaves the length or the target
    open joins the first row that it fits."""
    lines: list[tuple[Published, Line]] = []
    for n in published:
        key = f"{n.task}.{n.metric}"
        fitting = (i for i, (other, line) in enumerate(lines) if same_row(n, other) and key not in line.cells)
        place = next(fitting, len(lines))
        if place == len(lines):
            lines.append((n, Line(n.method, "", n.arch, n.resolution, published=True)))
        first, line = lines[place]
        known = n._replace(epochs=first.epochs or n.epochs, target=first.target or n.target)
        cells = line.cells | {key: Cell("published", float(n.value), text=n.value)}
        epochs = int(known.epochs) if known.epochs else None
        made = Pretraining(epochs, epochs, known.target)
        line = dataclasses.replace(line, made=made, pretraining=in_words(epochs, known.target), cells=cells)
        lines[place] = known, line
    return [line for _, line in lines]


def same_row(a: Published, b: Published) -> bool:
    open_or_equal = all(x == y or not x or not y for x, y in ((a.epochs, b.epochs), (a.target, b.target)))
    return open_or_equal and (a.method, a.arch, a.resolution) == (b.method, b.arch, b.resolution)


def canonical_json(record: Record) -> str:
    return json.dumps(vars(record), sort_keys=True)


def rank(record: Record) -> tuple:
    """Of two records for one cell and seed the higher one counts: by status, then the latest, then by identity."""
    identity = json.dumps(record.identity, sort_keys=True)
    return STATUS.index(record.status), record.finished, identity, canonical_json(record)


def experiment(record: Record) -> str:
    """The identity without what differs between seeds: the seed itself, and the classifier fine-tuned with it."""
    return json.dumps({k: v for k, v in record.identity.items() if k not in ("seed", "parent")}, sort_keys=True)


def makers_of(records: Iterable[Record]) -> dict[str, Record]:
    """SHA-256 of each file that a run left -> its record; of two that left the same, the one that counts in the tables.
    The identity of a run on another's classifier has the file's hash as its `parent`."""
    return {sha256: r for r in sorted(records, key=rank) for sha256 in r.artifacts.values()}


def records_for(records: list[Record], table: Table) -> list[Record]:
    """Those of its tasks; of one that has optional columns only, those with a number for such a column."""
    wanted = {column.task for column in table.columns if not column.optional}
    optional = {(column.task, column.metric) for column in table.columns}
    return [r for r in records if r.task in wanted or any((r.task, m) in optional for m in (r.metric, *r.metrics))]


def row_key(r: Record) -> Row:
    side = r.resolved.get("image_size") or r.recipe.get("image_size") or ""
    name, sha256, arch = (str(r.checkpoint.get(key) or "") for key in ("name", "sha256", "arch"))
    return Row(name, sha256, arch, str(side), r.engine, str(r.machine.get("precision", "")))


def group_by_row(records: list[Record]) -> dict[Row, list[Record]]:
    """The records of each row.

    A skipped record used no engine and no precision, and a failed one may not have reached its input side: each joins
    the one row of numbers that it fits, or, where none or several do, has a row of its own.
    """

    def fits(row: Row, r: Record) -> bool:
        own = row_key(r)
        same_run = own.image_size in ("", row.image_size) and own[4:] == row[4:]
        return own[:3] == row[:3] and (r.status == "skipped" or same_run)

    rows = defaultdict(list)
    for r in records:
        if r.status == "ok":
            rows[row_key(r)].append(r)
    with_numbers = tuple(rows)
    for r in records:
        if r.status != "ok":
            fitting = [row_key(r)] if row_key(r) in with_numbers else [row for row in with_numbers if fits(row, r)]
            rows[fitting[0] if len(fitting) == 1 else row_key(r)].append(r)
    return {key: rows[key] for key in sorted(rows)}


def arch_order(arch: str) -> int:
    return list(ARCHS).index(arch) if arch in ARCHS else len(ARCHS)


def counted_runs(records: list[Record], column: Column) -> list[Record]:
    """The records of one row that count in a column: one per seed, all of one experiment, that of the latest successful
    record. A seed that succeeded only in another experiment is left out."""
    mine = [r for r in records if column.shows(r)]
    if ok := [r for r in mine if r.status == "ok"]:
        chosen = experiment(max(ok, key=rank))
        kept = [r for r in ok if experiment(r) == chosen]
        mine = kept + [r for r in mine if r.seed not in {r.seed for r in ok}]
    best = {}
    for r in sorted(mine, key=rank):
        best[r.seed] = r
    return [best[seed] for seed in sorted(best)]


def hours_of(records: list[Record], table: Table, on_gpu: bool) -> float:
    """Hours of wall time, times processes, of the runs that one row of the table is made of."""
    counted = {id(r): r for column in table.columns for r in counted_runs(records, column) if r.status == "ok"}
    mine = [r for r in counted.values() if str(r.machine.get("device")).startswith("cuda") == on_gpu]
    return sum(max(r.wall_seconds, r.seconds) * r.machine.get("processes", 1) for r in mine) / 3600


def one_of_equals(records: list[Record]) -> list[Record]:
    """Of the runs of a task that the seed does not enter, the first; all of them where any number differs.

    Nothing is trained, the weights are the same file's, and neither the identities nor the metrics differ but in seed.
    """
    first = records[0]
    same = [{k: v for k, v in r.identity.items() if k != "seed"} | {"metrics": r.metrics} for r in records]
    fixed = first.task in EVALUATIONS and not is_random(first.checkpoint) and all(other == same[0] for other in same)
    return records[:1] if fixed else records


def make_cell(records: list[Record], row: Row, column: Column, section: Section, published: list[Published]) -> Cell:
    counting = counted_runs(records, column)
    numbers = [r for r in counting if r.status == "ok" and column.metric in r.metrics]
    without = {status: sum(r.status == status for r in counting) for status in ("failed", "skipped")}
    if not numbers:
        word = next((status for status, n in without.items() if n), "")
        return Cell("" if any(r.status == "ok" for r in counting) else word)
    without["without this number"] = sum(r.status == "ok" for r in counting) - len(numbers)
    numbers = one_of_equals(numbers)
    values = [r.metrics[column.metric] for r in numbers]
    errors = [r.stderr[column.metric] for r in numbers if column.metric in r.stderr]
    number = Number(
        value=statistics.fmean(values),
        stderr=statistics.fmean(errors) if len(errors) == len(values) else None,
        sd=statistics.stdev(values) if len(values) > 1 else None,
        seeds=len(values),
    )
    verdict = judge(column, numbers, number, row.image_size, section[:2], published)
    return Cell(
        status="ok",
        **number._asdict(),
        delta=verdict.delta,
        without=", ".join(f"{n} {status}" for status, n in without.items() if n),
        verdict=verdict.words,
        why=verdict.why,
        reference=reference_in_words(verdict.reference) if verdict.reference else "",
        source=verdict.reference.source if verdict.reference else "",
    )
