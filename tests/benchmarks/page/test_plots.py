"""The plots of the page: which there are, of which numbers, and what they do without data."""

import json
from dataclasses import replace

import plotly.graph_objects as go
import pytest

from benchmarks.page.curves import POINTS, losses_of
from benchmarks.page.series import Block, styles_of
from benchmarks.report import report
from benchmarks.rows import Section
from mae_core.tracker import Curves, Run
from tests.fixtures.page import read_page
from tests.fixtures.records import CHECKPOINT, broken, made, official, ok
from transfer.task import Record

PARTIAL = {"top1@0": 50.0, "top1@0.5": 60.0, "top1@4": 70.0}
SEVERITY = "error_percent_by_corruption_and_severity"


def of(name: str, record: Record, **changes) -> Record:
    return replace(record, checkpoint={**CHECKPOINT, "name": name}, **changes)


def suite(name: str, seed: int = 0, better: float = 0.0) -> list[Record]:
    """A record for each plot."""
    cost = {"seconds": 3600.0, "machine": {"device": "cpu", "precision": "fp32", "processes": 1, "threads": 2}}
    small = {f"{what}_ap_{size}": 10.0 + better for what in ("box", "mask") for size in ("small", "medium", "large")}
    classes = {"wall": {"iou": 40.0 + better}, "sky": {"iou": 60.0}, "crane": {"iou": None}}
    return [
        of(name, ok("imagenet_finetune", seed, top1=80.0 + better), **cost),
        of(name, ok("imagenet_linprobe", seed, top1=60.0 + better)),
        of(name, ok("imagenet_partial", seed, **PARTIAL)),
        of(name, ok("imagenet_c", seed, mce=50.0), tables={SEVERITY: {"fog": [10.0, 20.0], "snow": [30.0, 40.0]}}),
        of(name, ok("coco", seed, box_ap=5.0, **small)),
        of(name, ok("ade20k", seed, miou=50.0), tables={"per_class": classes}),
    ]


TITLES = {
    "Fine-tuning against linear probing",
    "Partial fine-tuning",
    "ImageNet-C: error by severity",
    "COCO: AP by size of the object",
    "ADE20K: IoU by class",
    "Cost against score",
}


def titles(page) -> set[str]:
    return {title for title in TITLES | {"Training curves", "Pre-training"} if page.plot(title)}


def test_each_plot_shows_the_numbers_of_its_records(tmp_path):
    records = [r for seed in (0, 1) for r in suite("a", seed, 2.0 * seed)] + suite("b")
    page = read_page(made(tmp_path, *records))
    assert titles(page) == TITLES
    [panel] = page.plot("Fine-tuning against linear probing")
    assert [(t["name"], t["x"], t["y"]) for t in panel["traces"]] == [("a", [61.0], [81.0]), ("b", [60.0], [80.0])]
    [panel] = page.plot("Partial fine-tuning")
    assert panel["traces"][0]["x"] == ["0", "0.5", "4"]
    assert panel["traces"][0]["y"] == [50.0, 60.0, 70.0]
    mean, fog, _ = page.plot("ImageNet-C: error by severity")
    assert mean["traces"][1]["y"] == [20.0, 30.0]
    assert fog["traces"][0]["y"] == [10.0, 20.0]
    boxes, _ = page.plot("COCO: AP by size of the object")
    assert boxes["traces"][0]["y"] == [11.0, 11.0, 11.0]
    [panel] = page.plot("ADE20K: IoU by class")
    assert (panel["traces"][0]["y"], panel["traces"][0]["x"]) == (["wall", "sky"], [41.0, 60.0])
    [panel] = page.plot("Cost against score")
    assert [(t["x"], t["y"]) for t in panel["traces"]] == [([1.0], [81.0]), ([1.0], [80.0])]


def test_plotly_knows_every_property(tmp_path):
    page = read_page(made(tmp_path, *suite("a"), *suite("b"), *map(official, suite("c"))))
    assert page.data["plots"]
    for panel in (panel for plot in page.data["plots"] for panel in plot):
        go.Figure(panel["traces"], panel["layout"])  # ValueError for what it does not know


def test_without_data_there_is_no_plot(tmp_path):
    page = read_page(made(tmp_path, ok("imagenet_knn", top1=1.0), broken("imagenet_c", "failed", "x", metric="mce")))
    assert titles(page) == set()
    assert page.data["plots"] == []
    odd = [
        of("a", ok("imagenet_c", mce=1.0), tables={SEVERITY: {"fog": "x", "snow": [], "frost": [None]}}),
        of("a", ok("ade20k", miou=1.0), tables={"per_class": {"wall": {"iou": None}, "sky": 3}}),
        of("a", ok("imagenet_partial", **{"top1@x": 1.0})),
        of("b", ok("imagenet_c", mce=1.0), tables={SEVERITY: [1]}),
        of("a", ok("coco", box_ap=1.0)),
    ]
    assert titles(read_page(made(tmp_path / "odd", *odd))) == set()


def test_figure_9_stands_beside_official_numbers_only(tmp_path):
    [panel] = read_page(made(tmp_path, *map(official, suite("a")))).plot("Partial fine-tuning")
    assert [t["name"].split(",")[0] for t in panel["traces"]] == ["MAE", "MoCo v3", "a"]
    assert panel["traces"][0]["y"][:2] == [73.5, 79.1]
    assert panel["layout"]["xaxis"]["categoryarray"] == ["0", "0.5", "1", "2", "4", "6", "12", "18", "24"]
    [panel] = read_page(made(tmp_path / "mini", *suite("a"))).plot("Partial fine-tuning")
    assert [t["name"] for t in panel["traces"]] == ["a"]


def test_many_checkpoints_are_told_apart():
    records = [of(f"c{i:02}", ok("imagenet_knn", top1=1.0)) for i in range(64)]
    first = Block("paper", "official data", {Section("paper", "official data"): records[40:48]})
    styles = styles_of([first, Block("mini", "miniature data", {Section("mini", "miniature data"): records})])
    assert len({style[:2] for style in styles.values()}) == 64
    assert len({styles[identity].colour for identity in list(styles)[:8]}) == 8
    assert next(iter(styles)).name == "c40"


def test_twelve_seeds_are_one_point(tmp_path):
    records = [r for seed in range(12) for r in suite("a", seed)] + suite("b")
    [panel] = read_page(made(tmp_path, *records)).plot("Fine-tuning against linear probing")
    assert len(panel["traces"]) == 2


def test_where_another_library_trains_its_curve_comes_from_tensorboard(tmp_path):
    made(tmp_path, of("a", ok("coco", box_ap=1.0)))
    with Curves(Run(tmp_path / "runs" / "a" / "0", 0, "coco", {})) as drawn:
        for step in (10, 20):
            drawn.training(step, 1 / step, 0.1, 5.0)
    report(tmp_path)
    [panel] = read_page(tmp_path).plot("Training curves")
    assert (panel["traces"][0]["x"], panel["traces"][0]["y"]) == ([10, 20], [0.1, 0.05])
    assert panel["layout"]["xaxis"]["title"]["text"] == "step"


def test_training_curves_come_from_the_logs(tmp_path):
    made(tmp_path, of("a", ok("imagenet_finetune", 3, top1=1.0)))
    lines = [json.dumps({"epoch": i, "step": 2 * i, "loss": 1 / (i + 1)}) for i in range(3)]
    (tmp_path / "runs" / "a" / "0" / "log.jsonl").write_text("\n".join([*lines, '{"epoch": 3, "lo']))
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    folder = tmp_path / "runs" / "enc" / "imagenet_knn" / "mini"
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text(lines[0])
    report(tmp_path)
    page = read_page(tmp_path)
    [panel] = page.plot("Training curves")
    assert panel["traces"][0]["x"] == [1, 2, 3]
    assert panel["traces"][0]["y"] == [1.0, 0.5, 0.33333]
    assert panel["traces"][0]["name"] == "a abababab, seed 3"
    assert page.plot("Pre-training")[0]["traces"][0]["x"] == [1, 2, 3]
    assert page.plot("Trainings without a record")[0]["traces"][0]["name"] == "enc/imagenet_knn/mini"


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"loss": "x", "epoch": 1}', '{"loss": NaN, "step": 1}', "\x00\xff"])
def test_a_log_without_numbers_is_no_curve(tmp_path, text):
    (tmp_path / "log.jsonl").write_text(text, encoding="latin-1")
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events.out.tfevents.1").write_text(text, encoding="latin-1")
    assert losses_of(tmp_path / "log.jsonl").x == losses_of(tmp_path / "none").x == []


def test_a_long_log_keeps_its_ends(tmp_path):
    lines = [json.dumps({"step": i, "loss": float(i)}) for i in range(10_001)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    unit, x, y = losses_of(tmp_path / "log.jsonl")
    assert unit == "step"
    assert (x[0], x[-1], y[-1]) == (0, 10_000, 10_000.0)
    assert len(x) <= POINTS + 1
