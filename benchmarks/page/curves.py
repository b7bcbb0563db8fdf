"""Training curves out of what trainings leave: their log or, where another library trains, TensorBoard's files."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.page.plots import Panel, Plot, axes
from benchmarks.page.series import COLOURS, Block, Identity, Style, identity_of, tasks_of, title_of
from mae_core.files import open_regular, printable
from mae_core.tracker import FOLDER
from mae_core.training import LOG_FILE
from transfer.run import fits

LONGEST = 64 << 20  # bytes of a log that are read
POINTS = 400  # of a curve that are drawn
Panels = dict[tuple[str, str], list[dict[str, Any]]]  # (title, unit) -> traces


class Losses(NamedTuple):
    """unit: what x counts, "epoch" from 1 or "step"; y: the loss at each."""

    unit: str
    x: list[float]
    y: list[float]


def losses_of(log: Path) -> Losses:
    """The curve of a training, of a log that need not exist; empty if nothing there can be read."""
    unit, found = read_log(log)
    if not found and (log.parent / FOLDER).is_dir():
        unit, found = "step", read_events(log.parent / FOLDER)
    kept = found[:: -(-len(found) // POINTS) or 1]
    kept += found[-1:] if found and kept[-1] != found[-1] else []
    return Losses(unit, [x for x, _ in kept], [float(f"{y:.5g}") for _, y in kept])


def read_log(path: Path) -> tuple[str, list[tuple[float, float]]]:
    """Lines that are half written are left out."""
    try:
        with open_regular(path) as file:
            lines = file.read(LONGEST).decode("utf-8", errors="replace").splitlines()
    except OSError:
        return "epoch", []
    entries = [entry for line in lines if (entry := parsed(line))]
    unit = "epoch" if entries and all("epoch" in entry for entry in entries) else "step"
    return unit, [(entry[unit] + (unit == "epoch"), entry["loss"]) for entry in entries if fits(entry.get(unit), float)]


def read_events(folder: Path) -> list[tuple[float, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    try:
        if not all(path.is_file() for path in folder.iterdir()):  # a pipe would be waited for
            return []
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        points = [(point.step, point.value) for point in events.Scalars("train/loss")]
    except Exception:  # a damaged or foreign file fails in any way
        return []
    return [(step, loss) for step, loss in points if fits(loss, float)]


def parsed(line: str) -> dict[str, Any]:
    """The object of one line; {} for anything without a loss."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) and fits(entry.get("loss"), float) else {}


def trainings(block: Block, styles: dict[Identity, Style], folders: Mapping[int, Path]) -> Plot:
    """A panel for each task, a curve for each run. folders: id of a record -> its work folder."""
    panels: Panels = defaultdict(list)
    for task in tasks_of(block.records):
        for r in {id(r): r for r in block.records if r.task == task}.values():
            found = losses_of(folders[id(r)] / LOG_FILE)
            name = f"{identity_of(r).label}, seed {r.seed}" + (f", {r.status}" if r.status != "ok" else "")
            panels[title_of(task), found.unit] += curve(name, found, styles[identity_of(r)].colour)
    return Plot("Training curves", "Mean training loss; a line for each seed.", with_curves(panels))


def curve(name: str, found: Losses, colour: str) -> list[dict[str, Any]]:
    """One trace, or none of an empty curve."""
    mode = "lines" if len(found.x) > 1 else "markers"
    look = {"mode": mode, "line": {"color": colour, "width": 1.4}, "marker": {"color": colour}}
    return [{"type": "scatter", "name": name, "x": found.x, "y": found.y} | look] if found.x else []


def with_curves(panels: Panels) -> list[Panel]:
    return [Panel(title, traces, axes(unit, "loss")) for (title, unit), traces in panels.items() if traces]


def other_trainings(out: Path, with_record: Iterable[Path]) -> list[Plot]:
    """Pre-trainings whose logs lie directly below `out` or one folder deeper; trainings of work folders without a
    readable record: they are at work, were stopped, or are a part of a job."""
    known = set(with_record)
    logs = sorted({*out.glob(f"*{LOG_FILE}"), *out.glob(f"*/{LOG_FILE}")})
    runs = {path.with_name(LOG_FILE) for name in (LOG_FILE, FOLDER) for path in (out / "runs").rglob(name)}
    others = sorted(path for path in runs if path.parent not in known)
    found = (
        Plot("Pre-training", "Mean loss over the masked patches.", panels_of(out, logs, lambda _: "")),
        Plot(
            "Trainings without a record", "At work, stopped, or a part of a job.", panels_of(out / "runs", others, task)
        ),
    )
    return list(found)


def task(name: Path) -> str:
    """The task of a log below runs/CHECKPOINT/TASK/."""
    return "/".join(name.parts[1:-2]) or "?"


def panels_of(root: Path, logs: Iterable[Path], title: Callable[[Path], str]) -> list[Panel]:
    panels: Panels = defaultdict(list)
    for path in logs:
        found, name = losses_of(path), path.relative_to(root)
        traces = panels[printable(title(name)), found.unit]
        label = name.parent if path.name == LOG_FILE and len(name.parts) > 1 else name
        traces += curve(printable(str(label)), found, COLOURS[len(traces) % len(COLOURS)])
    return with_curves(panels)
