"""A Markdown table, and texts that neither a Markdown page nor a spreadsheet runs."""

import re
import unicodedata
from collections.abc import Sequence


def markdown_table(rows: Sequence[Sequence[str]], left: int = 1, padded: bool = False) -> str:
    """The first row is the header; the first `left` columns are flush left, the others right. padded: with spaces, so
    that it reads as plain text too."""
    rows = [[harmless(text).replace("|", "\\|") for text in row] for row in rows]
    columns = range(len(rows[0]))
    widths = [max(3, *(display_width(row[i]) for row in rows)) if padded else 0 for i in columns]
    rule = ["-" * (widths[i] or 3) if i < left else "-" * ((widths[i] or 4) - 1) + ":" for i in columns]

    def pad(i: int, text: str) -> str:
        space = " " * (widths[i] - display_width(text))
        return text + space if i < left else space + text

    return "\n".join(f"| {' | '.join(pad(i, t) for i, t in enumerate(row))} |" for row in (rows[0], rule, *rows[1:]))


def display_width(text: str) -> int:
    """Columns of a terminal: East Asian characters take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def harmless(markdown: str) -> str:
    """Markdown without tags and links: what a checkpoint or a folder is called could be one."""
    return re.sub(r"(?<!\\)<|(?<=[^\\]\])(?=\()", lambda found: "\\" + found[0], markdown)


def no_formula(value: object) -> object:
    """A cell of a CSV file: a text that a spreadsheet would compute gets an apostrophe in front; numbers stay."""
    formula = isinstance(value, str) and len(value) > 1 and value[0] in "=+-@" and not is_number(value)
    return f"'{value}" if formula else value


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
