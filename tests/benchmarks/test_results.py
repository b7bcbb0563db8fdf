"""What is committed under results/: the tables follow from the records, and mae_mini does what its README says."""

import shutil
from pathlib import Path
from statistics import mean, variance

import pytest

from benchmarks.report import report
from benchmarks.tables import TABLES, Column
from mae_core.checkpoint import read_checkpoint
from tests.fixtures import ROOT
from transfer.run import read_record
from transfer.task import Record

MINIATURE = ROOT / "results" / "miniature"
RECORDS = sorted(MINIATURE.glob("runs/**/record.json"))


def test_no_record_names_a_place_of_the_machine_that_made_it() -> None:
    paths = {read_record(path).checkpoint["path"] for path in RECORDS}
    assert paths == {"results/miniature/mae_mini.safetensors", "random:vit_mini_patch8"}


def test_tables_follow_from_the_records(tmp_path: Path) -> None:
    """Made again elsewhere, they have the same bytes."""
    shutil.copytree(MINIATURE / "runs", tmp_path / "runs")
    written = {path.relative_to(tmp_path) for path in report(tmp_path)} - {Path("index.html")}  # 2 MB, not committed
    committed = {p.relative_to(MINIATURE) for p in (*MINIATURE.glob("summary.*"), *MINIATURE.glob("tables/[!.]*"))}
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


def shown() -> list[Column]:
    """The columns of the committed tables."""
    made = {(r.task, metric) for r in map(read_record, RECORDS) for metric in r.metrics}
    return [c for table in TABLES for c in table.columns if (c.task, c.metric) in made]


# A near-uniform guess is calibrated: ECE ranks no encoders, as the table's caption says.
RANKING = [c for c in shown() if c.metric != "ece"]


@pytest.mark.parametrize("column", RANKING, ids=lambda c: c.key)
def test_mae_mini_beats_random_weights_in_every_column(column: Column) -> None:
    """By more than three standard errors of the difference, which counts three seeds and the images, as if each side
    had images of its own: they are the same, so that the error is smaller. Every seed is ahead of every seed."""
    pretrained, floor = seeds(column.task, "mae_mini"), seeds(column.task, "random:vit_mini_patch8")
    sign = {"higher": 1, "lower": -1}[column.better]
    sides = [[sign * r.metrics[column.metric] for r in side] for side in (pretrained, floor)]
    images = sum((sum(r.stderr[column.metric] for r in side) / len(side)) ** 2 for side in (pretrained, floor))
    spread = sum(variance(side) / len(side) for side in sides)
    assert mean(sides[0]) - mean(sides[1]) > 3 * (images + spread) ** 0.5
    assert min(sides[0]) > max(sides[1])


def test_every_task_of_the_committed_tables_ranks() -> None:
    """None is left out by its metric's name."""
    assert {c.task for c in RANKING} == {r.task for r in map(read_record, RECORDS)}
    assert len(RANKING) >= 30
