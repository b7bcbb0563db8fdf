"""The rows of one task and metric that a plot shows, and how each checkpoint is drawn."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from benchmarks.rows import Row, Section, counted_runs, group_by_row
from benchmarks.tables import TABLES, Column
from transfer.task import Record

# Seen on white and on black, and told apart by those who do not see red and green too.
COLOURS = ("#2d7dd2", "#d1495b", "#2a9d5c", "#c46a1b", "#8e5bd0", "#0e94a0", "#97801f", "#c44fa5")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "pentagon")
SIGNS = "●■◆▲✚✖★⬟"
GREY = "#8a8f98"


class Identity(NamedTuple):
    """A checkpoint: what a plot gives one colour."""

    name: str
    sha256: str

    @property
    def label(self) -> str:
        return f"{self.name} {self.sha256[:8]}".strip()


class Style(NamedTuple):
    colour: str
    symbol: str
    sign: str


@dataclass(frozen=True)
class Block:
    """What one recipe gave on one kind of data: the sections that differ only in their engine."""

    recipe: str
    data: str
    sections: dict[Section, list[Record]]

    @property
    def title(self) -> str:
        return f"Recipe {self.recipe}, {self.data}"

    @property
    def official(self) -> bool:
        return any(section.official for section in self.sections)

    @property
    def records(self) -> list[Record]:
        return [record for members in self.sections.values() for record in members]


@dataclass(frozen=True)
class Series:
    """The runs of one row that count. label: unique among the series that `series_of` returns together."""

    row: Row
    runs: list[Record]
    label: str = ""
    styles: dict[Identity, Style] = field(default_factory=dict)

    @property
    def identity(self) -> Identity:
        return Identity(self.row.name, self.row.sha256)

    @property
    def style(self) -> Style:
        return self.styles[self.identity]

    def mean(self, metric: str) -> float | None:
        """Over the seeds; None unless every one of them has the metric."""
        values = [r.metrics[metric] for r in self.runs if metric in r.metrics]
        return statistics.fmean(values) if len(values) == len(self.runs) else None

    def stderr(self, metric: str) -> float | None:
        values = [r.stderr[metric] for r in self.runs if metric in r.stderr]
        return statistics.fmean(values) if len(values) == len(self.runs) else None

    def points(self, x: Sequence[Any], y: Sequence[Any], **more: Any) -> dict[str, Any]:
        """A scatter trace in the checkpoint's colour."""
        marker = {"color": self.style.colour, "symbol": self.style.symbol, "size": 9}
        line = {"color": self.style.colour, "width": 1.8}
        return {"type": "scatter", "name": self.label, "x": x, "y": y, "marker": marker, "line": line} | more


def blocks_of(sections: dict[Section, list[Record]]) -> list[Block]:
    found: dict[tuple[str, str], dict[Section, list[Record]]] = defaultdict(dict)
    for section, records in sections.items():
        found[section.recipe, section.data][section] = records
    return [Block(*key, members) for key, members in found.items()]


def identity_of(record: Record) -> Identity:
    return Identity(*(str(record.checkpoint.get(key) or "") for key in ("name", "sha256")))


def identities(block: Block) -> list[Identity]:
    return sorted({identity_of(record) for record in block.records})


def styles_of(blocks: Sequence[Block]) -> dict[Identity, Style]:
    """A colour and a symbol for each checkpoint; both together repeat only after 64. The first blocks choose first."""
    found = list(dict.fromkeys(identity for block in blocks for identity in identities(block)))
    symbols = [(i + i // len(COLOURS)) % len(SYMBOLS) for i in range(len(found))]
    return {
        identity: Style(COLOURS[i % len(COLOURS)], SYMBOLS[symbol], SIGNS[symbol])
        for i, (identity, symbol) in enumerate(zip(found, symbols))
    }


def series_of(block: Block, styles: dict[Identity, Style], task: str, metric: str = "") -> list[Series]:
    """The rows with numbers of a task, all images of its training used. metric: only runs that have it; "": any."""
    found = []
    for records in block.sections.values():
        for row, members in group_by_row([r for r in records if r.task == task]).items():
            runs = [r for r in counted_runs(members, Column(task, metric, "")) if r.status == "ok"]
            if runs := [r for r in runs if not metric or metric in r.metrics]:
                found.append(Series(row, runs, styles=styles))
    names = [series.row.name for series in found]
    varying = [key for key in ("image_size", "engine", "precision") if len({getattr(s.row, key) for s in found}) > 1]
    labelled = []
    for series in found:
        same_name = {s.row.sha256 for s in found if s.row.name == series.row.name}
        label = series.identity.label if names.count(series.row.name) > 1 and len(same_name) > 1 else series.row.name
        own = [f"{getattr(series.row, key)}{' px' if key == 'image_size' else ''}" for key in varying]
        labelled.append(replace(series, label=", ".join([label, *own])))
    return labelled


def title_of(task: str) -> str:
    """The title of a task's first column, such as "fine-tuning"; the name of a task that has none."""
    columns = (column for table in TABLES for column in table.columns if "@" not in column.metric)
    return next((column.title for column in columns if column.task == task), task)


def tasks_of(records: Sequence[Record]) -> list[str]:
    """The tasks of these records in the order of the tables, others behind."""
    order = list(dict.fromkeys(column.task for table in TABLES for column in table.columns))
    found = {record.task for record in records}
    return [*(task for task in order if task in found), *sorted(found - set(order))]


def hours(record: Record) -> tuple[float, str]:
    """Wall time times processes, as in the tables, and its unit."""
    processes = record.machine.get("processes", 1)
    unit = "GPU hours" if str(record.machine.get("device")).startswith("cuda") else "CPU hours"
    return max(record.seconds, record.wall_seconds) * processes / 3600, unit
