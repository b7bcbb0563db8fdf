"""Training curves out of the logs that trainings leave."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.page.plots import Panel, Plot, axes
from benchmarks.page.series import COLOURS, Block, Identity, Style, identity_of, tasks_of, title_of
from mae_core.files import open_regular, printable
from mae_core.training import LOG_FILE
from transfer.run import fits

LONGEST = 64 << 20  # bytes of a log that are read
POINTS = 400  # of a curve that are drawn


def read_curve(path: Path) -> tuple[str, list[float], list[float]]:
    """What the log counts ("epoch", from 1, or "step"), and the loss at each; lists without entries if it cannot be
    read. Lines that are half written are left out."""
    try:
        with open_regular(path) as file:
            lines = file.read(LONGEST).decode("utf-8", errors="replace").splitlines()
    except OSError:
        return "epoch", [], []
    entries = [entry for line in lines if (entry := parsed(line))]
    unit = "epoch" if entries and all("epoch" in entry for entry in entries) else "step"
    found = [(entry[unit] + (unit == "epoch"), entry["loss"]) for entry in entries if fits(entry.get(unit), float)]
    kept = found[:: -(-len(found) // POINTS) or 1]
    kept += found[-1:] if found and kept[-1] != found[-1] else []
    return unit, [x for x, _ in kept], [float(f"{y:.5g}") for _, y in kept]


def parsed(line: str) -> dict[str, Any]:
    """The object of one line; {} for anything without a loss."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) and fits(entry.get("loss"), float) else {}


def trainings(block: Block, styles: dict[Identity, Style], folders: Mapping[int, Path]) -> Plot | None:
    """A panel for each task, a curve for each run. folders: id of a record -> its work folder."""
    panels = []
    records = [r for r in block.records if r.status == "ok"]
    for task in tasks_of(records):
        traces: list[dict[str, Any]] = []
        for r in (r for r in records if r.task == task):
            style = styles[identity_of(r)]
            unit, x, y = read_curve(folders[id(r)] / LOG_FILE)
            if x:
                traces.append(curve(f"{identity_of(r).label}, seed {r.seed}", x, y, style.colour))
        panels += [Panel(title_of(task), traces, axes(unit, "loss"))] if traces else []
    return Plot("Training curves", "Mean training loss; a line for each seed.", panels) if panels else None


def curve(name: str, x: list[float], y: list[float], colour: str) -> dict[str, Any]:
    mode = "lines" if len(x) > 1 else "markers"
    line = {"color": colour, "width": 1.4}
    return {"type": "scatter", "mode": mode, "name": name, "x": x, "y": y, "line": line, "marker": {"color": colour}}


def other_trainings(out: Path, with_record: Iterable[Path]) -> list[Plot]:
    """Pre-trainings whose logs lie directly below `out` or one folder deeper; trainings of work folders without a
    readable record: they are at work, were stopped, or are a part of a job."""
    known = set(with_record)
    logs = sorted({*out.glob(f"*{LOG_FILE}"), *out.glob(f"*/{LOG_FILE}")})
    runs = [path for path in sorted((out / "runs").rglob(LOG_FILE)) if path.parent not in known]
    found = (
        Plot("Pre-training", "Mean loss over the masked patches.", panels_of(out, logs, lambda _: "")),
        Plot(
            "Trainings without a record", "At work, stopped, or a part of a job.", panels_of(out / "runs", runs, task)
        ),
    )
    return [plot for plot in found if plot.panels]


def task(name: Path) -> str:
    """The task of a log below runs/CHECKPOINT/TASK/."""
    return "/".join(name.parts[1:-2]) or "?"


def panels_of(root: Path, logs: Iterable[Path], title: Any) -> list[Panel]:
    panels: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for path in logs:
        unit, x, y = read_curve(path)
        name = path.relative_to(root)
        traces = panels[printable(title(name)), unit]
        if x:
            label = name.parent if path.name == LOG_FILE and len(name.parts) > 1 else name
            traces.append(curve(printable(str(label)), x, y, COLOURS[len(traces) % len(COLOURS)]))
    return [Panel(name, traces, axes(unit, "loss")) for (name, unit), traces in panels.items() if traces]
