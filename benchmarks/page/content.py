"""The tables of the page: an overview of each block, the tables of benchmarks/tables.py, and where each number's story
is."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.page.series import Block, identities, identity_of
from benchmarks.render import cell_text, fixed, footnotes, hours, millions, other_tasks, shows_number, without_paths
from benchmarks.rows import Cell, Line, Row, Section, counted_runs, fill, group_by_row, records_for
from benchmarks.tables import TABLES, Column, Published, Table, published_numbers, with_fractions
from transfer.task import Record


@dataclass(frozen=True)
class Entry:
    """One cell. kind: a Cell's status, "" for a hole. detail: lines below it. story: what opens; -1: nothing. order:
    what it is sorted by."""

    text: str = ""
    kind: str = ""
    detail: tuple[str, ...] = ()
    story: int = -1
    order: float | None = None
    best: bool = False


@dataclass(frozen=True)
class Grid:
    """A table whose columns sort. header: the title of each column, and whether it holds numbers."""

    title: str
    caption: str
    header: list[tuple[str, bool]]
    rows: list[tuple[Line, list[Entry]]]
    notes: list[str]


@dataclass(frozen=True)
class Score:
    """One line of the overview. cells: for each checkpoint of the block one entry for each of its rows."""

    table: str
    title: str
    chance: str
    cells: list[list[Entry]]


@dataclass
class Book:
    """The stories that the cells open, and which number of the page's list each record has (id -> number)."""

    number: dict[int, int]
    stories: list[dict[str, Any]] = field(default_factory=list)

    def tell(self, title: str, text: str, metric: str, runs: Iterable[Record], cell: Cell | None = None) -> int:
        records = [self.number[id(r)] for r in runs]
        lines = judged(cell) if cell else []
        self.stories.append({"title": title, "text": text, "metric": metric, "records": records, "lines": lines})
        return len(self.stories) - 1

    def cite(self, title: str, text: str, found: Sequence[Published]) -> int:
        """The story of a published number."""
        lines = [[key, value] for n in found for key, value in n._asdict().items() if value]
        self.stories.append({"title": title, "text": text, "metric": "", "records": [], "lines": lines})
        return len(self.stories) - 1


@dataclass(frozen=True)
class Filled:
    """One table in one section, with the cells of each row."""

    table: Table
    section: Section
    records: list[Record]
    columns: list[Column]
    lines: list[Line]
    entries: list[list[Entry]]

    @property
    def prefix(self) -> str:
        return f"{self.section.engine}: " if self.section.engine else ""


def filled(block: Block, book: Book) -> list[Filled]:
    found = []
    for section, records in block.sections.items():
        for table in (*TABLES, other_tasks(records)):
            if mine := records_for(records, table):
                found.append(fill_one(with_fractions(table, mine), section, mine, book))
    order = [table.name for table in TABLES]
    return sorted(found, key=lambda f: order.index(f.table.name) if f.table.name in order else len(order))


def fill_one(table: Table, section: Section, records: list[Record], book: Book) -> Filled:
    lines = fill(table, section, records)
    columns = [c for c in table.columns if not c.optional or any(shows_number(r, c) for r in records)]
    published = published_numbers(table, section.recipe) if table.published else []
    members = group_by_row(records)
    entries = []
    for line in lines:
        if line.published:
            entries.append([cited(line, c, published, book) for c in columns])
        else:
            row = Row(line.name, line.sha256, line.arch, line.image_size, line.engine, line.precision)
            entries.append([counted(line, c, counted_runs(members[row], c), book) for c in columns])
    return Filled(table, section, records, columns, lines, entries)


def counted(line: Line, column: Column, runs: list[Record], book: Book) -> Entry:
    cell = line.cells.get(column.key, Cell())
    if not runs:
        return Entry("-", order=None)
    runs = [r for r in runs if r.status != "ok" or column.metric in r.metrics] or runs
    number, _, rest = cell_text(cell, column).partition(" (")
    title = f"{line.name} {line.sha256[:8]}: {column.title}"
    story = book.tell(title, f"{number} ({rest}" if rest else number, column.metric, runs, cell)
    verdict = cell.verdict.partition(":")[0]
    known = f"published {cell.reference.partition(' ')[0]}" if cell.reference else ""
    below = "; ".join(part for part in (known, rest.removesuffix(")")) if part)
    return Entry(number, cell.status, tuple(filter(None, (verdict, below))), story, cell.value)


def judged(cell: Cell) -> list[list[str]]:
    """The verdict on a cell's number, what it was compared with, and what could explain a difference."""
    published = f"{cell.reference}, {cell.source}" if cell.reference else ""
    found = [["verdict", cell.verdict], ["published", published]]
    if not cell.verdict.startswith("matches"):
        found += [["could explain it", why] for why in cell.why]
    return [[what, without_paths(text)] for what, text in found if text]


def cited(line: Line, column: Column, published: Sequence[Published], book: Book) -> Entry:
    cell = line.cells.get(column.key)
    if cell is None:
        return Entry("-", "published")
    wanted = (line.name, line.arch, line.image_size, column.task, column.metric, cell.text)
    found = [n for n in published if (n.method, n.arch, n.resolution, n.task, n.metric, n.value) == wanted]
    found = [n for n in found if n.epochs in ("", str(line.made.epochs)) and n.target in ("", line.made.target)]
    title = f"{line.name} (published): {column.title}"
    return Entry(cell.text, "published", (), book.cite(title, cell.text, found), cell.value)


def grid(found: Filled) -> Grid:
    keys = {"name": "checkpoint", "arch": "arch", "parameters": "params", "image_size": "input px"}
    ours = [line for line in found.lines if not line.published]
    keys |= {key: key for key in ("engine", "precision") if len({getattr(line, key) for line in ours}) > 1}
    rows = []
    for line, cells in zip(found.lines, found.entries):
        about = vars(line) | {"parameters": millions(line.parameters)}
        names = [Entry(about[key] or "-", "name" if key == "name" else "") for key in keys]
        names = [replace(entry, order=as_number(entry.text.removesuffix(" M"))) for entry in names]
        spent = Entry(hours(line), order=line.gpu_hours + line.cpu_hours or None)
        rows.append((line, [*names, *cells, spent, Entry(line.pretraining or "-")]))
    notes = footnotes(found.records, found.lines, found.columns)
    header = [(title, False) for title in keys.values()] + [(column.header, True) for column in found.columns]
    header += [("hours", True), ("pre-training", False)]
    listed = [note.removeprefix("- ") for note in notes.splitlines() if note]
    return Grid(found.prefix + found.table.title, found.table.caption, header, rows, listed)


def as_number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def overview(block: Block, tables: Sequence[Filled]) -> list[Score]:
    """The headline of every task, and what else no table leaves out, for each checkpoint of the block."""
    scores = []
    for found in tables:
        for i, column in enumerate(found.columns):
            mine = [r for r in found.records if column.shows(r)]
            if not mine or (column.optional and column.metric not in {r.metric for r in mine}):
                continue
            cells: list[list[Entry]] = []
            for identity in identities(block):
                own = [n for n, line in enumerate(found.lines) if (line.name, line.sha256) == identity]
                own = [n for n in own if not found.lines[n].published and found.entries[n][i].kind]
                cells.append([named(found, n, found.entries[n][i], len(own) > 1) for n in own])
            levels = {fixed(r.chance, 2) for r in mine if r.chance is not None and column.better != "lower"}
            chance = levels.pop() if len(levels) == 1 else ""
            # The columns of partial fine-tuning are numbers of blocks.
            what = f"{found.table.title}, " if as_number(column.title) is not None else ""
            ours = [line.cells[column.key] for line in found.lines if not line.published]
            title = found.prefix + what + column.header
            scores.append(Score(found.table.title, title, chance, marked(cells, column, ours)))
    return scores


def named(found: Filled, n: int, entry: Entry, several: bool) -> Entry:
    """The entry, with what tells its row apart where a checkpoint has several."""
    if not several:
        return entry
    line = found.lines[n]
    own = ", ".join(part for part in (f"{line.image_size} px" if line.image_size else "", line.precision) if part)
    return replace(entry, detail=tuple(filter(None, (own, *entry.detail))))


def marked(cells: list[list[Entry]], column: Column, ours: Iterable[Cell]) -> list[list[Entry]]:
    """The best number is marked, with those that lie within two standard errors of it, if there is anything to beat.
    The error is of the test images and, where there are several seeds, of their mean."""
    numbers = [entry.order for entries in cells for entry in entries if entry.order is not None]
    if len(numbers) < 2 or not column.better:
        return cells
    sign = 1 if column.better == "higher" else -1
    best = max(numbers, key=lambda number: sign * number)
    errors = {c.value: math.hypot(c.stderr or 0.0, (c.sd or 0.0) / math.sqrt(c.seeds or 1)) for c in ours}

    def good(entry: Entry) -> bool:
        if entry.order is None:
            return False
        margin = 2 * math.hypot(errors.get(best, 0.0), errors.get(entry.order, 0.0))
        return sign * (best - entry.order) <= margin

    return [[replace(entry, best=good(entry)) for entry in entries] for entries in cells]


def everything(records: Sequence[Record], paths: Sequence[str]) -> list[dict[str, Any]]:
    """What the list of all records says of each."""
    found = []
    for r, path in zip(records, paths):
        value, error = r.metrics.get(r.metric), r.stderr.get(r.metric)
        text = fixed(value, 4) + (f" ± {fixed(error, 4)}" if error is not None else "")
        found.append({"record": r, "identity": identity_of(r), "text": text or r.status, "value": value, "path": path})
    return found
