"""The plots of one block, as Plotly's traces and layouts. A plot that has no data is None."""

import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.page.series import (
    GREY,
    SYMBOLS,
    Block,
    Identity,
    Series,
    Style,
    hours,
    series_of,
    tasks_of,
    title_of,
)
from benchmarks.rows import published_lines
from benchmarks.tables import TABLES, published_numbers
from transfer.run import fits
from transfer.task import Record

TOP1 = "top-1 (%)"
SIZES = ("small", "medium", "large")
BY_SEVERITY = "error_percent_by_corruption_and_severity"


@dataclass(frozen=True)
class Panel:
    """One chart. layout: what it adds to the page's own, which knows the theme."""

    title: str
    traces: list[dict[str, Any]]
    layout: dict[str, Any]
    height: int = 0  # px; 0: the page's

    @property
    def names(self) -> str:
        return ", ".join(dict.fromkeys(str(trace["name"]) for trace in self.traces))


@dataclass(frozen=True)
class Plot:
    title: str
    caption: str
    panels: list[Panel] = field(default_factory=list)

    @property
    def across(self) -> str:
        return self.common("xaxis")

    @property
    def up(self) -> str:
        return self.common("yaxis")

    def common(self, axis: str) -> str:
        """The titles of an axis in all panels, which are too small to have one; "" if there are several."""
        titles = {panel.layout[axis]["title"]["text"] for panel in self.panels}
        return titles.pop() if len(titles) == 1 else ""


def axes(x: str, y: str, **more: Any) -> dict[str, Any]:
    """A layout with titles on its axes; more: settings of either, as in x_type="log"."""
    layout: dict[str, Any] = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}
    for name, value in more.items():
        layout[f"{name[0]}axis"][name[2:]] = value
    return layout


def plots_of(block: Block, styles: dict[Identity, Style]) -> list[Plot]:
    makers = (probe, partial, corruptions, sizes, classes, costs)
    return [plot for make in makers if (plot := make(block, styles))]


def probe(block: Block, styles: dict[Identity, Style]) -> Plot | None:
    tuned = series_of(block, styles, "imagenet_finetune", "top1")
    probed = series_of(block, styles, "imagenet_linprobe", "top1")
    traces = []
    for y in tuned:
        # The engine is the same for both tasks.
        mine = [x for x in probed if x.row == y.row]
        for x in mine:
            point = y.points([x.mean("top1")], [y.mean("top1")], mode="markers")
            traces.append(point | {"error_x": bar(x, "top1"), "error_y": bar(y, "top1")})
    if traces and block.official:
        traces = [*published_pairs({series.row.arch for series in tuned}), *traces]
    if len(traces) < 2:
        return None
    layout = axes("linear probing, top-1 (%)", "fine-tuning, top-1 (%)")
    caption = "Bars: standard error over the test images." + (" Grey: published." if block.official else "")
    return Plot("Fine-tuning against linear probing", caption, [Panel("", traces, layout)])


def bar(series: Series, metric: str) -> dict[str, Any]:
    error = series.stderr(metric)
    return {"type": "data", "array": [error], "visible": error is not None, "thickness": 1, "width": 3}


def published_pairs(archs: Collection[str]) -> list[dict[str, Any]]:
    """One trace for each method and encoder of which both numbers are published, a point for each pre-training."""
    lines = published_lines(published_numbers(next(table for table in TABLES if table.name == "imagenet")))
    found: dict[str, list[tuple[float | None, float | None, str]]] = defaultdict(list)
    for line in lines:
        x, y = (line.cells.get(f"imagenet_{task}.top1") for task in ("linprobe", "finetune"))
        if x and y and line.arch in archs:
            found[f"{line.name}, {line.arch}"].append((x.value, y.value, line.pretraining))
    traces = []
    for i, (name, points) in enumerate(found.items()):
        xs, ys, texts = map(list, zip(*points))
        traces.append(published(name, xs, ys, "markers", i) | {"text": texts})
    return traces


def published(name: str, x: list[Any], y: list[Any], mode: str, number: int = 0) -> dict[str, Any]:
    marker = {"color": GREY, "size": 7, "symbol": f"{SYMBOLS[number % len(SYMBOLS)]}-open"}
    line = {"color": GREY, "width": 1.4, "dash": "dash"}
    name = f"{name} (published)"
    return {"type": "scatter", "mode": mode, "name": name, "x": x, "y": y, "marker": marker, "line": line}


def partial(block: Block, styles: dict[Identity, Style]) -> Plot | None:
    """Top-1 by the number of tuned blocks, evenly spaced as in Figure 9."""
    traces: list[dict[str, Any]] = []
    for series in series_of(block, styles, "imagenet_partial"):
        found = {k: metric for metric in series.runs[0].metrics if (k := blocks_in(metric)) is not None}
        curve = {k: mean for k in sorted(found) if (mean := series.mean(found[k])) is not None}
        if curve:
            errors = [series.stderr(found[k]) for k in curve]
            bars = {"type": "data", "array": errors, "visible": None not in errors, "thickness": 1, "width": 3}
            traces.append(series.points(list(curve), list(curve.values()), mode="lines+markers", error_y=bars))
    if not traces:
        return None
    if block.official:
        curves: dict[str, dict[float, float]] = defaultdict(dict)
        for n in published_numbers(next(table for table in TABLES if table.name == "partial")):
            if (k := blocks_in(n.metric)) is not None:
                curves[f"{n.method}, {n.arch}, {n.epochs} ep"][k] = float(n.value)
        traces = [
            *(
                published(name, sorted(curve), [curve[k] for k in sorted(curve)], "lines+markers", i)
                for i, (name, curve) in enumerate(curves.items())
            ),
            *traces,
        ]
    places = sorted({k for trace in traces for k in trace["x"]})
    for trace in traces:
        trace["x"] = [f"{k:g}" for k in trace["x"]]
    order = [f"{k:g}" for k in places]
    layout = axes("blocks tuned, from the last one", TOP1, x_type="category", x_categoryarray=order)
    grey = " Grey: Figure 9 of the MAE paper." if block.official else ""
    return Plot(
        "Partial fine-tuning", f"0: linear probing; 0.5: the MLP of the last block.{grey}", [Panel("", traces, layout)]
    )


def blocks_in(metric: str) -> float | None:
    name, at, number = metric.partition("@")
    try:
        return float(number) if (name, at) == ("top1", "@") else None
    except ValueError:
        return None


def numbers_of(found: Any) -> list[float]:
    """The value if it is a list of numbers, else an empty one: a record's tables can hold anything."""
    return found if isinstance(found, list) and all(fits(value, float) for value in found) else []


def table_of(record: Record, name: str) -> dict[str, Any]:
    found = record.tables.get(name)
    return found if isinstance(found, dict) else {}


def corruptions(block: Block, styles: dict[Identity, Style]) -> Plot | None:
    by_name: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for series in series_of(block, styles, "imagenet_c"):
        tables = [table_of(run, BY_SEVERITY) for run in series.runs]
        names = sorted(name for name in tables[0] if all(numbers_of(table.get(name)) for table in tables))
        curves = {name: averaged([table[name] for table in tables]) for name in names}
        if curves:
            mean = averaged(list(curves.values()))
            for name, curve in {f"mean of {len(curves)}": mean, **curves}.items():
                x = list(range(1, len(curve) + 1))
                point = {"color": series.style.colour, "symbol": series.style.symbol, "size": 5}
                by_name[name].append(series.points(x, curve, mode="lines+markers", marker=point))
    first = sorted(by_name, key=lambda name: (not name.startswith("mean of"), name))
    layout = axes("severity", "error (%)", x_dtick=1, y_range=[0, 100])
    panels = [Panel(name.replace("_", " "), by_name[name], layout) for name in first]
    return Plot("ImageNet-C: error by severity", "Top-1 error of the fine-tuned classifier.", panels)


def averaged(curves: list[list[float]]) -> list[float]:
    return [round(statistics.fmean(values), 4) for values in zip(*curves)]


def sizes(block: Block, styles: dict[Identity, Style]) -> Plot | None:
    panels = []
    for what in ("box", "mask"):
        traces = []
        for series in series_of(block, styles, "coco"):
            aps = {size: series.mean(f"{what}_ap_{size}") for size in SIZES}
            known = {size: ap for size, ap in aps.items() if ap is not None}
            if known:
                marker = {"color": series.style.colour}
                named = {"type": "bar", "name": series.label, "marker": marker}
                traces.append({**named, "x": list(known), "y": list(known.values())})
        layout = axes("", f"{what} AP (%)", x_categoryarray=list(SIZES), x_type="category", y_rangemode="tozero")
        panels += [Panel(f"{what}es" if what == "box" else f"{what}s", traces, layout)] if traces else []
    return Plot("COCO: AP by size of the object", "Below 32², to 96², above, in pixels of the image.", panels)


def classes(block: Block, styles: dict[Identity, Style]) -> Plot | None:
    """IoU of each class that has pixels, the best class of all checkpoints first."""
    found = []
    for series in series_of(block, styles, "ade20k"):
        by_class: dict[str, list[float]] = defaultdict(list)
        for run in series.runs:
            for name, values in table_of(run, "per_class").items():
                if isinstance(values, dict) and fits(values.get("iou"), float):
                    by_class[name.strip()].append(values["iou"])
        means = {name: round(statistics.fmean(values), 2) for name, values in by_class.items()}
        if means:
            found.append((series, means))
    best: dict[str, float] = {}
    for _, means in found:
        for name, iou in means.items():
            best[name] = max(iou, best.get(name, 0.0))
    order = sorted(best, key=lambda name: (best[name], name))
    traces = []
    for series, means in found:
        names = [name for name in order if name in means]
        point = {"color": series.style.colour, "symbol": series.style.symbol, "size": 7}
        traces.append(series.points([means[name] for name in names], names, mode="markers", marker=point))
    layout = axes("IoU (%)", "", x_side="top", x_rangemode="tozero", y_type="category", y_categoryarray=order)
    layout["yaxis"] |= {"dtick": 1, "automargin": True, "range": [-0.7, len(order) - 0.3]}
    panels = [Panel("", traces, layout, height=16 * len(order) + 60)] if traces else []
    return Plot("ADE20K: IoU by class", f"{len(order)} classes with pixels in the validation images.", panels)


def costs(block: Block, styles: dict[Identity, Style]) -> Plot | None:
    """A panel for each task that has two points or more."""
    panels = []
    for task in tasks_of([r for r in block.records if r.status == "ok"]):
        by_unit: dict[str, list[dict[str, Any]]] = defaultdict(list)
        metric = next(r.metric for r in block.records if r.task == task and r.status == "ok")
        for series in series_of(block, styles, task, metric):
            spent, units = zip(*map(hours, series.runs))
            if set(units) == {units[0]} and min(spent) > 0:
                point = series.points([round(statistics.fmean(spent), 5)], [series.mean(metric)], mode="markers")
                by_unit[units[0]].append(point | {"error_y": bar(series, metric)})
        for unit, traces in by_unit.items():
            if len(traces) > 1:
                panels.append(Panel(title_of(task), traces, axes(unit, metric, x_tickformat="~g", **scale(traces))))
    return Plot("Cost against score", "Time of training and evaluation, mean over the seeds.", panels)


def scale(traces: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """A logarithmic axis where the costs differ by more than a factor of ten."""
    spent = [trace["x"][0] for trace in traces]
    return {"x_type": "log", "x_dtick": "D2"} if max(spent) > 10 * min(spent) else {"x_rangemode": "tozero"}
