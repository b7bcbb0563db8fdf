"""The tables as Markdown, with what a reader of the numbers must know below each."""

import re
import unicodedata
from collections import defaultdict

from benchmarks.rows import Cell, Line, Section, fill, into_rows, of_table, pretraining, references, row_of, that_count
from benchmarks.tables import TABLES, Column, Table, published_numbers, with_fractions
from transfer.task import Record

LEGEND = """\
One run: value ± standard error from the sampling of the test images. Several seeds: mean ± the same standard error of
one run (mean over the seeds); then the number of seeds and sd, the standard deviation (n - 1) of their values. `failed`
and `skipped` have their reasons below the table; `-`: no record. ↑ higher is better, ↓ lower is better.
"""


def fixed(number: float | None, decimals: int) -> str:
    return "" if number is None else f"{number:.{decimals}f}"


def shareable(text: str) -> str:
    """One line without this machine's absolute paths: of them stays what follows "runs/", or the last name."""

    def shorten(match: re.Match) -> str:
        path = match[0]
        return path[path.index("/runs/") + 1 :] if "/runs/" in path else "…/" + path.rstrip("/").rsplit("/", 1)[-1]

    return re.sub(r"(?<![\w.:/~…-])/[^\s/:;,()'\"]+(?:/[^\s/:;,()'\"]+)+/?", shorten, " ".join(text.split()))


def summary_markdown(sections: dict[Section, list[Record]], records: list[Record]) -> str:
    """All sections with their tables, then the checkpoints."""
    parts = ["# Transfer results", LEGEND.strip()]
    for section, members in sections.items():
        parts += [f"## {section.title}", circumstances(members)]
        for table in (*TABLES, other_tasks(members)):
            if found := of_table(members, table):
                parts += [f"### {table.title}", section_table(with_fractions(table, found), section, found)]
    parts += ["## Checkpoints", checkpoints(records)]
    return "\n\n".join(part for part in parts if part) + "\n"


def table_markdown(table: Table, sections: dict[Section, list[Record]]) -> str:
    """One table in all sections that have records for it."""
    parts = [f"# {table.title}", LEGEND.strip()]
    for section, members in sections.items():
        parts += [f"## {section.title}", circumstances(members), section_table(table, section, members)]
    return "\n\n".join(part for part in parts if part) + "\n"


def other_tasks(records: list[Record]) -> Table:
    """The headlines of tasks that stand in no table, so that no number and no failure is left out of the summary."""
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


def section_table(table: Table, section: Section, records: list[Record]) -> str:
    """The table of one section, its caption above, and what its numbers assume and lack below."""
    lines = fill(table, section, records)
    columns = [c for c in table.columns if not c.optional or any(has(r, c) for r in records)]
    header = {"name": "checkpoint", "arch": "arch", "image_size": "input px"}
    header |= {
        key: key for key in ("engine", "precision") if len({getattr(x, key) for x in lines if not x.published}) > 1
    }
    with_delta = {c.key for c in columns if any(x.cells.get(c.key, Cell()).delta is not None for x in lines)}
    titles = [title for c in columns for title in ([c.header, "Δ MAE"] if c.key in with_delta else [c.header])]
    grid = []
    for x in lines:
        label = f"{x.name} (published)" if x.published else f"**{x.name}** {x.sha256[:8]}"
        grid.append([label, *(getattr(x, key) or "-" for key in list(header)[1:])])
        for c in columns:
            entry = x.cells.get(c.key, Cell())
            grid[-1].append(in_words(entry, c))
            if c.key in with_delta:
                delta = None if entry.delta is None else round(entry.delta, c.decimals) + 0.0  # + 0.0: no "-0.00"
                grid[-1].append("" if delta is None else f"{delta:+.{c.decimals}f}")
    below = footnotes(table, records, lines, columns, with_delta)
    rows = [[*header.values(), *titles], *grid]
    return "\n\n".join(part for part in (table.caption, aligned(rows, left=len(header)), below) if part)


def has(r: Record, column: Column) -> bool:
    return column.shows(r) and column.metric in (r.metric, *r.metrics)


def in_words(cell: Cell, column: Column) -> str:
    if cell.status != "ok":
        return cell.text or cell.status or "-"
    number = fixed(cell.value, column.decimals)
    if cell.stderr is not None:
        number += f" ± {fixed(cell.stderr, column.decimals)}"
    seeds = [f"{cell.seeds} seeds, sd {fixed(cell.sd, column.decimals)}"] if cell.seeds > 1 else []
    seeds += [cell.without] if cell.without else []
    return f"{number} ({', '.join(seeds)})" if seeds else number


def footnotes(table: Table, records: list[Record], lines: list[Line], columns: list[Column], deltas: set[str]) -> str:
    """As a list: test images and chance, what the differences assume, reasons, notes, records that are not shown.

    deltas: keys of the columns that have differences.
    """
    notes, tested, sources = [], defaultdict(list), defaultdict(list)
    for c in columns:
        mine = [r for r in records if c.shows(r) and r.status == "ok" and r.metric == c.metric]
        facts = [f"{n} test images" for n in sorted({r.n_eval for r in mine if r.n_eval})]
        if c.better != "lower":  # a chance level is an accuracy: it says nothing about an error
            facts += [f"chance {fixed(level, 2)}" for level in sorted({r.chance for r in mine} - {None})]
        if facts:
            tested[", ".join(facts)].append(c.title)
    notes += [f"- {', '.join(titles)}: {facts}" for facts, titles in tested.items()]
    if deltas:
        published = published_numbers(table)
        for c in columns:
            if c.key in deltas:
                found = references(c, published)
                sources[f"{', '.join(found.source.unique())} ({'; '.join(found.pretrain.unique())})"].append(c.title)
        assumed = "; ".join(f"{', '.join(titles)}: {source}" for source, titles in sources.items())
        ours = [f"{x.name} {x.sha256[:8]}: {x.pretraining}" for x in lines if not x.published]
        notes.append(
            "- Δ MAE: ours minus MAE's published number for the same encoder and input side, which assumes the "
            f"pre-training in brackets. {assumed}. Pre-training of ours: {'; '.join(dict.fromkeys(ours))}."
        )
    rows = into_rows(records)
    by_record = {(c.task, c.train_fraction): c for c in columns}.values()  # several columns may show one record
    counting = [r for members in rows.values() for column in by_record for r in that_count(members, column)]
    notes += data_notes(counting, columns)
    remarks = [(f"{r.status}: {r.task}, {name(r)}", r.reason, r.seed) for r in counting if r.status != "ok"]
    remarks += [(f"note: {r.task}, {name(r)}", note, r.seed) for r in counting for note in r.notes]
    if remarks:
        notes.append(bullets(remarks))
    if others := sum(len(members) for members in rows.values()) - len(counting):
        notes.append(
            f"- Records of these cells that summary.csv alone shows: {others}. Of a seed's records a successful one "
            "counts, then the latest; only seeds of one experiment are averaged."
        )
    return "\n".join(notes)


def data_notes(counting: list[Record], columns: list[Column]) -> list[str]:
    """What the data of the numbers lack, each sentence once with the columns it is true of."""
    found = defaultdict(list)
    for c in columns:
        shown = [r for r in counting if c.shows(r) and r.status == "ok"]
        for finding in dict.fromkeys(shareable(f) for r in shown for f in r.data.get("findings") or ()):
            found[finding].append(c.title)
    return [f"- data of {', '.join(titles)}: {finding}" for finding, titles in found.items()]


def name(r: Record) -> str:
    row = row_of(r)
    return f"{row.name} {row.sha256[:8]}"


def bullets(entries: list[tuple[str, str, int]]) -> str:
    """(what, text, seed) as a list, one line for all seeds with the same what and text."""
    seeds = defaultdict(set)
    for what, text, seed in entries:
        seeds[what, shareable(text)].add(seed)
    return "\n".join(
        f"- {what}, seed{'s' * (len(found) > 1)} {', '.join(map(str, sorted(found)))}: {text}"
        for (what, text), found in sorted(seeds.items())
    )


def checkpoints(records: list[Record]) -> str:
    rows = {
        tuple(str(r.checkpoint.get(key) or "-") for key in ("name", "arch", "format"))
        + (pretraining(r.checkpoint), str(r.checkpoint.get("sha256") or "-"))
        for r in records
    }
    return aligned([["checkpoint", "arch", "format", "pre-training", "sha256"], *map(list, sorted(rows))], left=5)


def aligned(rows: list[list[str]], left: int) -> str:
    """A Markdown table, the first row its header, padded so that it reads as plain text; `left` columns flush left."""

    def width(text: str) -> int:
        return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)

    rows = [[text.replace("|", "\\|") for text in row] for row in rows]
    widths = [max(3, *(width(row[i]) for row in rows)) for i in range(len(rows[0]))]
    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]

    def pad(i: int, text: str) -> str:
        space = " " * (widths[i] - width(text))
        return text + space if i < left else space + text

    return "\n".join(f"| {' | '.join(pad(i, t) for i, t in enumerate(row))} |" for row in (rows[0], rule, *rows[1:]))
