"""The tables as a LaTeX document, ours beside published rows, in ASCII: any engine compiles it, with booktabs."""

import re
import textwrap
import unicodedata
from collections.abc import Iterator

from benchmarks.render import LEGEND, Grid, circumstances, section_grid, tables_of
from benchmarks.rows import Line, Section
from benchmarks.tables import Table
from transfer.task import Record

PREAMBLE = r"""% Each table environment can be copied; it needs \usepackage{booktabs,graphicx}.
\documentclass{article}
\usepackage[margin=15mm]{geometry}
\usepackage{booktabs,graphicx}
\begin{document}
"""
# A table that is wider than the text is scaled to it.
FITTED = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"

SPECIAL = {c: f"\\{c}" for c in "{}$&#%_"} | {
    "\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"{\char34}", "`": r"{}{\char96}", "[": "{[}", "]": "{]}",
    "*": "{*}", "±": r"$\pm$", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "→": r"$\rightarrow$", "Δ": r"$\Delta$",
    "×": r"$\times$", "÷": r"$\div$", "·": r"$\cdot$", "−": "$-$", "≤": r"$\leq$", "≥": r"$\geq$", "µ": r"$\mu$",
    "μ": r"$\mu$", "…": r"\dots{}", "–": "--", "—": "---", "ß": r"\ss{}", "æ": r"\ae{}", "Æ": r"\AE{}",
    "ø": r"\o{}", "Ø": r"\O{}", "œ": r"\oe{}", "Œ": r"\OE{}", "ł": r"\l{}", "Ł": r"\L{}",
}  # fmt: skip
ACCENTS = {
    "\u0300": "`", "\u0301": "'", "\u0302": "^", "\u0303": "~", "\u0304": "=", "\u0306": "u", "\u0307": ".",
    "\u0308": '"', "\u030a": "r", "\u030b": "H", "\u030c": "v", "\u0327": "c",
}  # fmt: skip


def escaped(text: str) -> str:
    """The text in ASCII as LaTeX sets it, whatever it holds: a character that its standard fonts lack is named by its
    code point, as in U+4E2D."""
    parts = zip(f" {text}", text, map(escaped_character, text))
    return "".join("{}" + part if c == before and c in "-'," else part for before, c, part in parts)  # "--" is no dash


def escaped_character(c: str) -> str:
    if c in SPECIAL:
        return SPECIAL[c]
    if " " <= c <= "~":
        return c
    apart = unicodedata.normalize("NFD", c)
    base, marks = apart[0], apart[1:]
    if marks in ACCENTS and base.isascii() and base.isalpha():
        return f"\\{ACCENTS[marks]}{{{base}}}"
    return rf"\texttt{{U+{ord(c):04X}}}"


def latex_document(sections: dict[Section, list[Record]]) -> str:
    """Every table of every section, each in a table environment, and its notes."""
    parts = [PREAMBLE.rstrip(), r"\section*{Transfer results}", escaped(" ".join(LEGEND.replace("`", "").split()))]
    for section, members in sections.items():
        parts += [rf"\section*{{{escaped(section.title)}}}", escaped(circumstances(members))]
        for table, found in tables_of(members):
            grid, name = section_grid(table, section, found), f"tab:{table.name}-{len(parts)}"
            parts += ["\n".join(table_environment(table, section, grid, name)), "\n".join(notes(grid, name))]
        parts.append(r"\clearpage")
    return "\n\n".join(part for part in [*parts, r"\end{document}"] if part) + "\n"


def table_environment(table: Table, section: Section, grid: Grid, name: str) -> Iterator[str]:
    caption = f"{table.title}. {section.title}. {table.caption}".strip()
    yield from (r"\begin{table}[htbp]", r"\centering\footnotesize", rf"\caption{{{escaped(caption)}}}")
    yield from (rf"\label{{{name}}}", r"\smallskip", FITTED)
    yield rf"\begin{{tabular}}{{{'l' * grid.left + 'r' * (len(grid.header) - grid.left)}}}"
    yield from (r"\toprule", row([stacked(title, 18) for title in grid.header]), r"\midrule")
    before = None
    for line, texts in grid.rows:
        if before is not None and line.arch != before.arch:
            yield r"\addlinespace"
        # What stands in brackets behind a number, such as its seeds, goes below it: else few columns would fit.
        parts = [re.fullmatch(r"([^(]+?)(?: \((.*)\))?", text) for text in texts[grid.left - 1 :]]
        numbers = [part[1] if part else text for part, text in zip(parts, texts[grid.left - 1 :])]
        below = [part[2] if part and part[2] else "" for part in parts]
        yield row([label(line), *(stacked(text, 30) for text in texts[: grid.left - 1]), *map(number, numbers)])
        if any(below):
            yield row([""] * grid.left + [rf"\scriptsize {escaped(text)}" if text else "" for text in below])
        before = line
    yield from (r"\bottomrule", r"\end{tabular}}", r"\end{table}")


def notes(grid: Grid, name: str) -> Iterator[str]:
    """Not in the float, which may be no longer than a page."""
    if grid.below:
        yield from (r"{\footnotesize", rf"\noindent On Table~\ref{{{name}}}:", r"\begin{itemize}")
        yield from (rf"\item {escaped(note.removeprefix('- '))}" for note in grid.below.splitlines())
        yield from (r"\end{itemize}", "}")


def stacked(text: str, width: int) -> str:
    """On lines of so many characters, so that a column becomes no wider than its numbers."""
    return r"\shortstack[l]{" + r" \\ ".join(map(escaped, textwrap.wrap(text, width))) + "}"


def number(text: str) -> str:
    return re.sub(r"^-(?=\d)", "$-$", escaped(text))


def row(cells: Iterator[str] | list[str]) -> str:
    return " & ".join(cells) + r" \\"


def label(line: Line) -> str:
    if line.published:
        return f"{escaped(line.name)} (published)"
    return rf"\textbf{{{escaped(line.name)}}} \texttt{{{escaped(line.sha256[:8])}}}"
