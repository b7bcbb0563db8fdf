"""What is committed under results/: the tables follow from the records, and mae_mini does what its README says."""

import shutil
from pathlib import Path
from statistics import mean, variance

import pytest

from benchmarks.report import report
from mae_core.checkpoint import read_checkpoint
from tests.fixtures import ROOT
from transfer.run import read_record
from transfer.task import Record

MINIATURE = ROOT / "results" / "miniature"
RECORDS = sorted(MINIATURE.glob("runs/**/record.json"))


def test_tables_follow_from_the_records(tmp_path: Path) -> None:
    """Made again elsewhere, they have the same bytes."""
    shutil.copytree(MINIATURE / "runs", tmp_path / "runs")
    written = {path.relative_to(tmp_path) for path in report(tmp_path)} - {Path("index.html")}  # 2 MB, not committed
    committed = {p.relative_to(MINIATURE) for p in (*MINIATURE.glob("summary.*"), *MINIATURE.glob("tables/*"))}
    assert written == committed
    for path in written:
        assert (tmp_path / path).read_bytes() == (MINIATURE / path).read_bytes()


def test_the_shipped_checkpoint_is_the_one_of_the_records() -> None:
    mini = read_checkpoint(MINIATURE / "mae_mini.safetensors")
    assert (MINIATURE / "mae_mini.safetensors").stat().st_size <= 6_000_000
    assert mini.arch == "vit_mini_patch8"
    hashes = {r.checkpoint["sha256"] for r in map(read_record, RECORDS) if r.checkpoint["name"] == mini.name}
    assert hashes == {mini.sha256}


def seeds(task: str, name: str) -> list[Record]:
    records = map(read_record, RECORDS)
    found = [r for r in records if r.task == task and r.checkpoint["name"] == name and r.status == "ok"]
    assert {r.seed for r in found} == {0, 1, 2}
    return found


@pytest.mark.parametrize("task", ["imagenet_finetune", "imagenet_linprobe"])
def test_mae_mini_beats_random_weights_and_both_beat_chance(task: str) -> None:
    """By well over two standard errors in every one of three seeds."""
    pretrained, floor = seeds(task, "mae_mini"), seeds(task, "random:vit_mini_patch8")
    for record in floor:
        assert record.metrics["top1"] > record.chance + 4 * record.stderr["top1"]
    worst, best = min(r.metrics["top1"] for r in pretrained), max(r.metrics["top1"] for r in floor)
    assert worst > best + 5 * max(r.stderr["top1"] for r in (*pretrained, *floor))


@pytest.mark.parametrize(
    ("task", "metrics"), [("coco", ("box_ap", "mask_ap")), ("ade20k", ("miou", "macc", "aacc"))], ids=["coco", "ade20k"]
)
def test_mae_mini_beats_random_weights_in_dense_tasks(task: str, metrics: tuple[str, ...]) -> None:
    """By more than three standard errors of the difference, which counts the seeds and the images; every seed is above
    every seed."""
    pretrained, floor = seeds(task, "mae_mini"), seeds(task, "random:vit_mini_patch8")
    for metric in metrics:
        sides = [[r.metrics[metric] for r in side] for side in (pretrained, floor)]
        images = sum(sum(r.stderr[metric] for r in side) ** 2 / len(side) ** 2 for side in (pretrained, floor))
        spread = sum(variance(side) / len(side) for side in sides)
        assert mean(sides[0]) - mean(sides[1]) > 3 * (images + spread) ** 0.5
        assert min(sides[0]) > max(sides[1])
