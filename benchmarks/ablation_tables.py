"""An ablation's cells -> CSV, Markdown and a plot.

Published numbers have rows and a panel of their own: they come from other data, a larger encoder and a longer
pre-training than a miniature's.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.ablation_grid import Ablation
from benchmarks.markdown import markdown_table
from benchmarks.tables import read_published
from mae_core.files import printable
from mae_core.progress import duration
from mae_core.writing import replacing, write_texts

TASKS = {"imagenet_finetune": "fine-tuning ↑", "imagenet_linprobe": "linear probing ↑"}


@dataclass(frozen=True)
class Row:
    """One cell of ours. numbers: column -> value; texts: task -> what its cell says, a number with its standard error
    or a status word."""

    label: str
    knobs: str
    numbers: dict[str, float]
    texts: dict[str, str]
    x: float | None = None


@dataclass(frozen=True)
class Columns:
    """The columns of one kind of table, for our rows and for the published ones: key -> heading."""

    ours: dict[str, str]
    published: dict[str, str]


ACCURACY = Columns(TASKS | {"relative_flops": "FLOPs", "seconds": "pre-training"}, TASKS)
ACCURACY_FLOPS = Columns(ACCURACY.ours, TASKS | {"relative_flops": "FLOPs"})
WALL_CLOCK = Columns(
    {"epoch_seconds": "time per epoch", "spread": "spread", "speed_up": "speed-up", "relative_flops": "FLOPs"},
    {"hours": "hours for 800 epochs", "speed_up": "speed-up", "imagenet_finetune": "fine-tuning ↑"},
)


Printed = list[dict[str, str]]  # {"label", "arch", column: number as printed} of every published cell


def published_rows(title: str) -> Printed:
    """The published cells of a table, in file order."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for n in read_published("ablations"):
        if n.table == title:
            row = rows.setdefault((n.method, n.arch), {"label": n.method, "arch": n.arch})
            row[n.task if n.metric == "top1" else n.metric] = n.value
    return list(rows.values())


def write_table(out: Path, name: str, table: Ablation, columns: Columns, rows: Sequence[Row], about: str) -> list[Path]:
    """Write tables/NAME.csv, .md and .png below `out`; their paths."""
    folder = out / "tables"
    published = published_rows(table.title)
    paths = [folder / f"{name}.{suffix}" for suffix in ("csv", "md", "png")]
    page = markdown(table, columns, rows, published, about, paths[2].name)
    write_texts({paths[0]: csv_text(columns, rows, published), paths[1]: page})
    with replacing(paths[2]) as temporary:
        plot(temporary, table, columns, rows, published, about)
    return paths


def csv_text(columns: Columns, rows: Sequence[Row], published: Printed) -> str:
    keys = list(dict.fromkeys((*columns.ours, *columns.published)))
    errors = [f"{key}_stderr" for key in TASKS if key in columns.ours]
    file = io.StringIO()
    writer = csv.DictWriter(file, ["row", "cell", "arch", "knobs", *keys, *errors, "status"], lineterminator="\n")
    writer.writeheader()
    for printed in published:
        values = {key: printed[key] for key in ("arch", *keys) if key in printed}
        writer.writerow({"row": "published", "cell": printed["label"], **values})
    for row in rows:
        numbers = {key: f"{value:.6g}" for key, value in row.numbers.items() if key in (*keys, *errors)}
        words = [f"{task}: {text}" for task, text in row.texts.items() if task not in row.numbers]
        status = printable("; ".join(words)) or "ok"
        writer.writerow({"row": "ours", "cell": row.label, "knobs": row.knobs, "status": status, **numbers})
    return file.getvalue()


def cell_text(row: Row, key: str) -> str:
    if key in row.texts:
        return printable(row.texts[key])
    if key not in row.numbers:
        return "unknown" if key == "seconds" and row.texts.keys() <= row.numbers.keys() else "failed"
    value = row.numbers[key]
    if key == "seconds":
        return duration(value)
    if key == "epoch_seconds":
        return f"{value:.1f} s" if value < 600 else f"{value / 3600:.2f} h"
    return {"spread": f"± {value:.1f} %"}.get(key, f"{value:.2f}x")


def markdown(
    table: Ablation, columns: Columns, rows: Sequence[Row], published: Printed, about: str, picture: str
) -> str:
    parts = [f"# {table.title}: {table.about}", f"![{table.about}]({picture})", f"## Ours: {about}"]
    ours = [[row.label, *(cell_text(row, key) for key in columns.ours)] for row in rows]
    parts.append(markdown_table([[table.about, *columns.ours.values()], *ours]))
    for arch in dict.fromkeys(row["arch"] for row in published):
        theirs = [row for row in published if row["arch"] == arch]
        grid = [[row["label"], *(row.get(key, "") for key in columns.published)] for row in theirs]
        parts.append(f"## Published: {arch}, ImageNet-1k (MAE paper, {table.title})")
        parts.append(markdown_table([[table.about, *columns.published.values()], *grid]))
    return "\n\n".join(parts) + "\n"


def plot(path: Path, table: Ablation, columns: Columns, rows: Sequence[Row], published: Printed, about: str) -> None:
    """Two panels, each with its own scale: ours with standard errors, and the published curve."""
    from matplotlib.figure import Figure  # imported late: it takes a second

    keys = [key for key in columns.ours if key in columns.published and key != "relative_flops"]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(len(keys), 2, squeeze=False)
    numeric = all(row.x is not None for row in rows)
    ours = [(row.label, row.x, row.numbers) for row in rows]
    theirs = []
    for row in published:
        numbers = {k: float(v) for k, v in row.items() if k not in ("label", "arch")}
        theirs.append((row["label"], number_in(row["label"]) if numeric else None, numbers))
    for line, key in enumerate(keys):
        for panel, (name, points) in zip(panels[line], (("ours: " + about, ours), ("published", theirs))):
            shown = [(label, x, n[key], n.get(f"{key}_stderr", 0.0)) for label, x, n in points if key in n]
            draw(panel, shown, columns.ours[key])
            if line == 0:
                panel.set_title(name, fontsize=8, wrap=True)
            if line == len(keys) - 1 and table.axis:
                panel.set_xlabel(table.axis, fontsize=8)
    figure.suptitle(f"{table.title}: {table.about}", fontsize=10)
    figure.savefig(path, format="png", dpi=130)


def number_in(label: str) -> float:
    """A published cell's place on the axis."""
    number = float("".join(c for c in label if c.isdigit() or c == "."))
    return number / 100 if "%" in label else number


def draw(panel, points: Sequence[tuple[str, float | None, float, float]], heading: str) -> None:
    """points: (label, place or None, value, standard error or 0 where none is known)."""
    places = [number if x is None else x for number, (_, x, _, _) in enumerate(points)]
    line = "o" if any(x is None for _, x, _, _ in points) else "o-"
    values, errors = ([point[i] for point in points] for i in (2, 3))
    panel.errorbar(places, values, errors if any(errors) else None, fmt=line, markersize=4, capsize=2, elinewidth=0.8)
    panel.set_ylabel(heading.replace(" ↑", ""), fontsize=8)
    panel.tick_params(labelsize=7)
    if line == "o":
        panel.set_xticks(places, [point[0] for point in points], rotation=15, ha="right", fontsize=6)
        panel.set_xlim(-0.5, max(len(points), 1) - 0.5)
