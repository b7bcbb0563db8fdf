"""A plot of partial fine-tuning's curve with the published ones."""

import csv
import textwrap
from collections.abc import Mapping
from pathlib import Path

from mae_core.errors import UserError
from mae_core.writing import replacing
from transfer.data.shipped import shipped

PICTURE_FILE = "partial.png"
PUBLISHED = shipped("published/partial.csv")


def published_curves() -> dict[str, dict[float, float]]:
    """{"MAE (vit_large_patch16, 800 ep, pixels)": {blocks tuned: top-1 in percent}, ...}: Figure 9 of the MAE paper.
    UserError if their file is missing."""
    if not PUBLISHED.exists():
        raise UserError(f"{PUBLISHED} is missing: restore it from the repository (git checkout results/published)")
    with open(PUBLISHED, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    curves: dict[str, dict[float, float]] = {}
    for row in rows:
        made = ", ".join(part for part in (f"{row['epochs']} ep", row["target"]) if part)
        curve = curves.setdefault(f"{row['method']} ({row['arch']}, {made})", {})
        curve[float(row["metric"].removeprefix("top1@"))] = float(row["value"])
    return curves


def draw_curve(path: Path, ours: Mapping[float, tuple[float, float]], about: str) -> None:
    """Write a PNG: top-1 over the number of tuned blocks, evenly spaced as in the paper. ours: blocks -> (top-1, its
    standard error), both in percent."""
    from matplotlib.figure import Figure  # late: the import takes a second

    published = published_curves()
    places = {k: i for i, k in enumerate(sorted({*ours, *(k for curve in published.values() for k in curve)}))}
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    panel = figure.subplots()
    for (name, curve), marker, grey in zip(published.items(), "s^", ("0.45", "0.7")):
        x = [places[k] for k in sorted(curve)]
        y = [curve[k] for k in sorted(curve)]
        label = f"published, ImageNet-1K: {name}"
        panel.plot(x, y, f"{marker}--", color=grey, markersize=5, linewidth=1, label=label, zorder=1)
    x = [places[k] for k in sorted(ours)]
    means, errors = zip(*(ours[k] for k in sorted(ours)))
    panel.errorbar(
        x, means, errors, fmt="o-", color="tab:blue", markersize=5, capsize=3, label=textwrap.fill(about, 90), zorder=2
    )
    panel.set_xticks(list(places.values()), [f"{k:g}" for k in places])
    panel.set_xlabel("blocks tuned, from the last one (0: linear probing; all: fine-tuning)")
    panel.set_ylabel("top-1 accuracy (%)")
    panel.grid(axis="y", color="0.9")
    panel.set_axisbelow(True)
    figure.legend(fontsize=8, loc="outside lower center")  # never over the curves, however long a recipe's name is
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
