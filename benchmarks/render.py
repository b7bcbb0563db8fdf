"""The tables as Markdown; below each, what a reader of its numbers must know."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from benchmarks.checkpoints import pretraining
from benchmarks.markdown import harmless, markdown_table
from benchmarks.rows import Cell, Line, Section, counted_runs, fill, group_by_row, records_for, row_key
from benchmarks.suite import TASKS
from benchmarks.tables import TABLES, Column, Table, with_fractions
from benchmarks.verdict import THRESHOLD
from transfer.task import Record

LEGEND = f"""\
One run: value ± standard error from the sampling of the test images. Several seeds: mean ± the same standard error of
one run (mean over the seeds); then the number of seeds and sd, the standard deviation (n - 1) of their values. `failed`
and `skipped` have their reasons below the table; `-`: no record. ↑ higher is better, ↓ lower is better.
params: of the encoder. hours: wall time times processes, of all runs in the row.
A verdict compares ours with the published number of the same encoder, input side and pre-training length, or of the
nearest length. `matches`: the difference is within {THRESHOLD:g} SE, else ours is `below` or `above` by so much.
SE: standard error of the difference, from the sampling of the test images and the spread over seeds in both.
"""


def fixed(number: float | None, decimals: int) -> str:
    return "" if number is None else f"{number:.{decimals}f}"


def without_paths(text: str) -> str:
    """The text on one line. Of this machine's absolute paths only what follows "runs/" is kept, or the last name."""

    def shorten(match: re.Match) -> str:
        path = match[0]
        return path[path.index("/runs/") + 1 :] if "/runs/" in path else "…/" + path.rstrip("/").rsplit("/", 1)[-1]

    return re.sub(r"(?<![\w.:/~…-])/[^\s/:;,()'\"]+(?:/[^\s/:;,()'\"]+)+/?", shorten, " ".join(text.split()))


def summary_markdown(sections: dict[Section, list[Record]], records: list[Record]) -> str:
    """Every section with its tables, then the checkpoints."""
    return page(["# Transfer results", *sections_markdown(sections), "## Checkpoints", checkpoints(records)])


def page(parts: Iterable[str]) -> str:
    return harmless("\n\n".join(part for part in parts if part) + "\n")


def sections_markdown(sections: dict[Section, list[Record]]) -> Iterator[str]:
    """How to read a number, then every section with its tables."""
    yield LEGEND.strip()
    for section, members in sections.items():
        yield from (f"## {section.title}", circumstances(members))
        for table, found in tables_of(members):
            yield from (f"### {table.title}", section_table(table, section, found))


def tables_of(records: list[Record]) -> Iterator[tuple[Table, list[Record]]]:
    """Each table that these records fill, with those of them that it shows."""
    for table in (*TABLES, other_tasks(records)):
        if found := records_for(records, table):
            yield with_fractions(table, found), found


def table_markdown(table: Table, sections: dict[Section, list[Record]]) -> str:
    """One table in all sections that have records for it."""
    parts = [f"# {table.title}", LEGEND.strip()]
    for section, members in sections.items():
        parts += [f"## {section.title}", circumstances(members), section_table(table, section, members)]
    return page(parts)


def other_tasks(records: list[Record]) -> Table:
    """The headlines of tasks that no table shows, so that the summary leaves out no number and no failure."""
    known = {column.task for table in TABLES for column in table.columns}
    headlines = sorted({(r.task, r.metric) for r in records if r.task not in known})
    columns = tuple(Column(task, metric, f"{task} {metric}", better="", reference="") for task, metric in headlines)
    return Table("other", "Other tasks", "", columns)


def circumstances(records: list[Record]) -> str:
    ok = [r for r in records if r.status == "ok"]
    facts = {
        "Precision": {str(r.machine.get("precision", "")) for r in ok},
        "hardware": {r.hardware for r in ok},
        "commit": {r.commit[:8] + ("-dirty" if r.commit.endswith("-dirty") else "") for r in ok},
    }
    return "; ".join(f"{key}: {', '.join(sorted(filter(None, found)))}" for key, found in facts.items() if any(found))


class Grid(NamedTuple):
    """A table in one section as plain texts. left: so many columns of the header, the row's label first, hold no
    numbers. rows: each with the texts behind its label. below: what the numbers assume and lack, a Markdown list."""

    header: list[str]
    left: int
    rows: list[tuple[Line, list[str]]]
    below: str


def section_table(table: Table, section: Section, records: list[Record]) -> str:
    """The table in one section as Markdown: its caption, its rows, and what its numbers assume and lack."""
    grid = section_grid(table, section, records)
    labels = (f"{x.name} (published)" if x.published else f"**{x.name}** {x.sha256[:8]}" for x, _ in grid.rows)
    rows = [grid.header, *([label, *texts] for label, (_, texts) in zip(labels, grid.rows))]
    parts = (table.caption, markdown_table(rows, grid.left, padded=True), grid.below)
    return "\n\n".join(part for part in parts if part)


def section_grid(table: Table, section: Section, records: list[Record]) -> Grid:
    lines = fill(table, section, records)
    columns = [c for c in table.columns if not c.optional or any(shows_number(r, c) for r in records)]
    header = {"name": "checkpoint", "arch": "arch", "parameters": "params", "image_size": "input px"}
    header |= {"pretraining": "pre-training"}
    header |= {
        key: key for key in ("engine", "precision") if len({getattr(x, key) for x in lines if not x.published}) > 1
    }
    shown = {key for x in lines for key, cell in x.cells.items() if cell.delta is not None}
    with_delta = {c.key for c in columns if c.delta and c.key in shown}
    titles = [title for c in columns for title in ([c.header, delta_title(c)] if c.key in with_delta else [c.header])]
    rows = []
    for x in lines:
        about = vars(x) | {"parameters": millions(x.parameters)}
        texts = [about[key] or "-" for key in list(header)[1:]]
        for c in columns:
            entry = x.cells.get(c.key, Cell())
            texts.append(cell_text(entry, c))
            if c.key in with_delta:
                delta = None if entry.delta is None else round(entry.delta, c.decimals) + 0.0  # + 0.0: no "-0.00"
                texts.append("" if delta is None else f"{delta:+.{c.decimals}f}")
        rows.append((x, [*texts, hours(x)]))
    below = footnotes(records, lines, columns)
    return Grid([*header.values(), *titles, "hours"], len(header), rows, below)


def shows_number(r: Record, column: Column) -> bool:
    return column.shows(r) and column.metric in (r.metric, *r.metrics)


def cell_text(cell: Cell, column: Column) -> str:
    if cell.status != "ok":
        return cell.text or cell.status or "-"
    number = fixed(cell.value, column.decimals)
    if cell.stderr is not None:
        number += f" ± {fixed(cell.stderr, column.decimals)}"
    spread = "" if cell.sd is None else f", sd {fixed(cell.sd, column.decimals)}"  # a mean of tasks has none
    seeds = [f"{cell.seeds} seeds{spread}"] if cell.seeds > 1 else []
    seeds += [cell.without] if cell.without else []
    return f"{number} ({', '.join(seeds)})" if seeds else number


def millions(number: int | None) -> str:
    return f"{number / 1e6:.1f} M" if number else ""


def hours(line: Line) -> str:
    """ "12.50 GPU h", "0.003 CPU h", or both; "-" for a published row."""
    found = {"GPU h": line.gpu_hours, "CPU h": line.cpu_hours}
    return ", ".join(f"{n:.2f} {unit}" if n >= 0.1 else f"{n:.1g} {unit}" for unit, n in found.items() if n) or "-"


def delta_title(column: Column) -> str:
    return f"Δ {column.reference.split(', ')[0]}" if column.reference.startswith("MAE") else "Δ"


def footnotes(records: list[Record], lines: list[Line], columns: list[Column]) -> str:
    """A list: test images and chance, verdicts, what the data lack, reasons, notes, records that are left out."""
    notes, tested = [], defaultdict(list)
    for c in columns:
        mine = [r for r in records if c.shows(r) and r.status == "ok" and r.metric == c.metric]
        facts = [f"{n} test images" for n in sorted({r.n_eval for r in mine if r.n_eval})]
        if c.better != "lower":  # a chance level is an accuracy: it says nothing about an error
            facts += [f"chance {fixed(level, 2)}" for level in sorted({r.chance for r in mine if r.chance is not None})]
        if facts:
            tested[", ".join(facts)].append(c.title)
    notes += [f"- {', '.join(titles)}: {facts}" for facts, titles in tested.items()]
    notes += verdicts(lines, columns, {note for r in records for note in r.notes})
    rows = group_by_row(records)
    by_record = {(c.task, c.train_fraction): c for c in columns}.values()  # several columns may show one record
    counting = [r for members in rows.values() for column in by_record for r in counted_runs(members, column)]
    notes += [*outdated(counting, columns), *data_notes(counting, columns)]
    remarks = [(f"{r.status}: {r.task}, {checkpoint_label(r)}", r.reason, r.seed) for r in counting if r.status != "ok"]
    remarks += [(f"note: {r.task}, {checkpoint_label(r)}", note, r.seed) for r in counting for note in r.notes]
    if remarks:
        notes.append(bullets(remarks))
    if others := sum(len(members) for members in rows.values()) - len(counting):
        notes.append(
            f"- Records of these cells that summary.csv alone shows: {others}. Of a seed's records a successful one "
            "counts, then the latest; only seeds of one experiment are averaged."
        )
    return "\n".join(notes)


def verdicts(lines: list[Line], columns: list[Column], said: set[str]) -> list[str]:
    """The verdicts of a table, one for all columns of a row that share it. said: what stands below it already."""
    found = defaultdict(list)
    for x in lines:
        for c in columns:
            cell = x.cells.get(c.key, Cell())
            text = cell.verdict
            if text and not text.startswith("not"):
                text += f"; published: {cell.reference}, {cell.source}"
            if text.startswith(("below", "above")) and (why := [w for w in cell.why if w not in said]):
                text += f". Could explain it: {'; '.join(why)}"
            if text:
                found[f"{x.name} {x.sha256[:8]}", without_paths(text)].append(c.title)
    return [f"- verdict: {row}, {', '.join(titles)}: {text}" for (row, text), titles in found.items()]


def outdated(counting: list[Record], columns: list[Column]) -> list[str]:
    """Which numbers an earlier version of their task made, and which rows of a column rest on different data."""
    now = {task.name: task.version for task in TASKS}
    old, apart = defaultdict(list), defaultdict(list)
    for c in columns:
        shown = [r for r in counting if c.shows(r) and r.status == "ok" and c.metric in r.metrics]
        versions = {(checkpoint_label(r), r.identity.get("task_version")) for r in shown}
        for label, version in sorted(versions, key=str):
            if version != (current := now.get(c.task, version)):
                old[c.task, version, current, label].append(c.title)
        files = defaultdict(set)
        for r in shown:
            files[str(r.data.get("fingerprint") or "")[:8]].add(checkpoint_label(r))
        if len(files) > 1:
            words = ", ".join(
                f"{'; '.join(sorted(rows))} on {name or 'unknown'}" for name, rows in sorted(files.items())
            )
            apart[words].append(c.title)
    notes = [
        f"- version: {label}, {', '.join(titles)}: of version {version} of {task}, which is at {current} now and gives "
        "other numbers (CHANGELOG.md): run it again"
        for (task, version, current, label), titles in old.items()
    ]
    words = "not the same in all rows, by the fingerprint of their files"
    return [*notes, *(f"- data of {', '.join(titles)}: {words}: {rows}" for rows, titles in apart.items())]


def data_notes(counting: list[Record], columns: list[Column]) -> list[str]:
    """What the data of the numbers lack; each sentence once, with the columns that it is about."""
    found = defaultdict(list)
    for c in columns:
        shown = [r for r in counting if c.shows(r) and r.status == "ok"]
        for finding in dict.fromkeys(without_paths(f) for r in shown for f in r.data.get("findings") or ()):
            found[finding].append(c.title)
    return [f"- data of {', '.join(titles)}: {finding}" for finding, titles in found.items()]


def checkpoint_label(r: Record) -> str:
    row = row_key(r)
    return f"{row.name} {row.sha256[:8]}"


def bullets(entries: list[tuple[str, str, int]]) -> str:
    """(what, text, seed) as a list, one line for all seeds with the same what and text."""
    seeds = defaultdict(set)
    for what, text, seed in entries:
        seeds[what, without_paths(text)].add(seed)
    return "\n".join(
        f"- {what}, seed{'s' * (len(found) > 1)} {', '.join(map(str, sorted(found)))}: {text}"
        for (what, text), found in sorted(seeds.items())
    )


def checkpoints(records: list[Record]) -> str:
    rows = {
        tuple(str(r.checkpoint.get(key) or "-") for key in ("name", "arch", "format"))
        + (pretraining(r.checkpoint) or "-", str(r.checkpoint.get("sha256") or "-"))
        for r in records
    }
    header = ("checkpoint", "arch", "format", "pre-training", "sha256")
    return markdown_table([header, *sorted(rows)], left=5, padded=True)
