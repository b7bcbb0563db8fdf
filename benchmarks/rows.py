"""Records -> the sections, rows and cells of a table.

A section is one recipe on one kind of data, and one engine where a task has several. A row of it is one checkpoint
under one engine, precision and input side: numbers of different meaning never share a row or a column. A cell averages
the seeds of one experiment. Its standard error is one run's, from the sampling of the test images; the spread over
seeds is a number of its own.
"""

import dataclasses
import json
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from benchmarks.tables import Column, Published, Table, published_numbers, reference_numbers
from mae_core.vit import ARCHS
from transfer.run import STATUS
from transfer.task import Record


class Section(NamedTuple):
    """What all numbers of one section share. recipe: its label. engine: "" where the task has only one."""

    recipe: str
    data: str
    engine: str = ""

    @property
    def official(self) -> bool:
        """Whether these numbers may be compared with published ones."""
        return (self.recipe, self.data) == ("paper", "official data")

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
    images. sd: over seeds. delta: ours minus the column's reference. without: seeds without a number, e.g. "1 failed".
    text: a published number as it was printed.
    """

    status: str = ""
    value: float | None = None
    stderr: float | None = None
    sd: float | None = None
    seeds: int = 0
    delta: float | None = None
    without: str = ""
    text: str = ""


@dataclass(frozen=True)
class Line:
    """One row of a table; cells by column key. The name of a published row is its method."""

    name: str
    sha256: str
    arch: str
    image_size: str
    engine: str = ""
    precision: str = ""
    pretraining: str = ""
    published: bool = False
    cells: dict[str, Cell] = field(default_factory=dict)


def fill(table: Table, section: Section, records: list[Record]) -> list[Line]:
    """The table's rows in one section, by arch; in an official section the published rows come before ours."""
    published = published_numbers(table) if section.official and table.published else None
    lines = [] if published is None else published_lines(published)
    for row, members in group_by_row(records_for(records, table)).items():
        cells = {column.key: make_cell(members, row, column, published) for column in table.columns}
        lines.append(Line(*row, pretraining(members[0].checkpoint), cells=cells))
    return sorted(lines, key=lambda line: arch_order(line.arch))


def published_lines(published: list[Published]) -> list[Line]:
    groups = defaultdict(list)
    for n in published:
        groups[n.method, n.arch, n.resolution].append(n)
    lines = []
    for (method, arch, side), group in groups.items():
        cells = {f"{n.task}.{n.metric}": Cell("published", float(n.value), text=n.value) for n in group}
        known = "; ".join(dict.fromkeys(n.pretrain for n in group if n.pretrain))
        lines.append(Line(method, "", arch, side, pretraining=known, published=True, cells=cells))
    return lines


def canonical_json(record: Record) -> str:
    return json.dumps(dataclasses.asdict(record), sort_keys=True)


def rank(record: Record) -> tuple:
    """Of two records for one cell and seed the higher one counts: by status, then the latest, then by identity."""
    identity = json.dumps(record.identity, sort_keys=True)
    return STATUS.index(record.status), record.finished, identity, canonical_json(record)


def experiment(record: Record) -> str:
    """The identity without what differs between seeds: the seed itself, and the classifier fine-tuned with it."""
    return json.dumps({k: v for k, v in record.identity.items() if k not in ("seed", "parent")}, sort_keys=True)


def records_for(records: list[Record], table: Table) -> list[Record]:
    return [r for r in records if r.task in {column.task for column in table.columns}]


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


def make_cell(records: list[Record], row: Row, column: Column, published: list[Published] | None) -> Cell:
    counting = counted_runs(records, column)
    numbers = [r for r in counting if r.status == "ok" and column.metric in r.metrics]
    without = {status: sum(r.status == status for r in counting) for status in ("failed", "skipped")}
    if not numbers:
        word = next((status for status, n in without.items() if n), "")
        return Cell("" if any(r.status == "ok" for r in counting) else word)
    values = [r.metrics[column.metric] for r in numbers]
    errors = [r.stderr[column.metric] for r in numbers if column.metric in r.stderr]
    mean = statistics.fmean(values)
    return Cell(
        status="ok",
        value=mean,
        stderr=statistics.fmean(errors) if len(errors) == len(values) else None,
        sd=statistics.stdev(values) if len(values) > 1 else None,
        seeds=len(values),
        delta=difference(mean, row, column, published),
        without=", ".join(f"{n} {status}" for status, n in without.items() if n),
    )


def difference(value: float, row: Row, column: Column, published: list[Published] | None) -> float | None:
    """Ours minus the reference at the same arch and input side; None if there is no such reference."""
    if published is None or column.train_fraction < 1:
        return None
    same_arch = [n for n in reference_numbers(column, published) if n.arch == row.arch]
    found = [n for n in same_arch if row.image_size in ("", n.resolution)]
    return value - float(found[0].value) if len(found) == 1 else None


def pretraining(checkpoint: dict[str, Any]) -> str:
    """Epochs and target of the pre-training as the checkpoint file states them, else "unknown"."""
    if checkpoint.get("format") == "random":
        return "none (random weights)"
    meta = checkpoint.get("meta") or {}
    if not meta.get("epochs"):
        return "unknown"
    done = meta.get("epochs_done", meta["epochs"])
    epochs = f"{meta['epochs']} ep" if done == meta["epochs"] else f"{done} of {meta['epochs']} ep"
    # The metadata of a safetensors file are text.
    target = {"true": "normalised pixels", "false": "pixels"}.get(str(meta.get("norm_pix")).lower(), "unknown target")
    return f"{epochs}, {target}"
