"""What fits into a budget, by hours given by hand."""

import argparse
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.budget import within
from benchmarks.plan import Item
from benchmarks.run_all import budget
from tests.benchmarks.test_cost import job_of


@pytest.mark.parametrize(("text", "hours"), [("48h", 48), ("90m", 1.5), ("2d", 48), ("0.5h", 0.5)])
def test_a_budget_is_a_number_and_a_unit(text, hours):
    assert budget(text) == hours


@pytest.mark.parametrize("text", ["", "48", "0h", "-1h", "h", "1e3h", "nan h", "1h30m"])
def test_anything_else_is_none(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is no budget: give GPU hours as 48h"):
        budget(text)


def item(task: str, hours: float | None, finetune: Item | None = None, state: str = "to do") -> Item:
    seconds = None if hours is None else 3600 * hours
    job = replace(job_of(task), estimated_seconds=seconds, work=Path(task))
    return Item(job, state, "", finetune=finetune.job if finetune else None)


FINETUNE, OTHER = item("imagenet_finetune", 5), item("inat2017", 3)
PLAN = [
    item("imagenet_knn", 1), item("imagenet_linprobe", 2), FINETUNE, OTHER, item("imagenet_a", 0.5, FINETUNE),
    item("imagenet_r", 0.25, OTHER), item("coco", 100, state="done"), item("ade20k", None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("hours", "left_out"),
    [
        (11.75, set()),
        (11.5, {"imagenet_a"}),
        # There is room for imagenet_a, but it would have nothing to evaluate.
        (7, {"imagenet_finetune", "imagenet_a"}),
        (3, {"imagenet_finetune", "imagenet_a", "inat2017", "imagenet_r"}),
        (1.5, {"imagenet_finetune", "imagenet_a", "inat2017", "imagenet_r", "imagenet_linprobe"}),
    ],
)
def test_the_cheapest_come_first_and_a_classifier_before_what_takes_it(hours, left_out):
    found = within(PLAN, hours)
    assert [one.job for one in found] == [one.job for one in PLAN]
    assert {one.job.task.name for one in found if one.state == "left out"} == left_out
    assert all(one == given for one, given in zip(found, PLAN) if one.state != "left out")


def test_what_is_left_out_says_why():
    why = {one.job.task.name: one.why for one in within(PLAN, 7) if one.state == "left out"}
    assert why["imagenet_finetune"] == "over --budget: 5 hours, 0.75 of 7 are left"
    assert why["imagenet_a"] == "over --budget: so is imagenet_finetune, which it takes the classifier of"
