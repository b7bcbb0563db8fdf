"""What is refused before anything starts fails indeed, and what is not does not."""

from pathlib import Path

import pytest

from mae_core.errors import UserError
from mae_core.machine import Machine
from tests.fixtures import segmentation as segmentation_fixtures
from tests.fixtures import transfer as transfer_fixtures
from tests.fixtures.segmentation import write_ade20k
from tests.fixtures.transfer import write_imagenet
from transfer.classification.tasks import TASKS
from transfer.jobs import obstacle
from transfer.run import run_job
from transfer.task import Job

BY_NAME = {task.name: task for task in TASKS}
ONE = Machine(micro_batch=1)
# Knobs of imagenet_*, the machine, what is objected to (None: it runs), and in which words.
CASES = [
    ("imagenet_knn", {"k": 32}, Machine(), None, ""),
    ("imagenet_knn", {"k": 33}, Machine(), "k", "k=33, but there are 32 training images"),
    ("imagenet_knn", {"k": 9, "train_fraction": 0.25}, Machine(), "k", "k=9, but there are 8 training images"),
    ("imagenet_finetune", {"batch": 32}, Machine(), None, ""),
    ("imagenet_finetune", {"batch": 34}, Machine(), "batch", "32 training images are less than one batch=34"),
    (
        "imagenet_finetune",
        {"batch": 16, "train_fraction": 0.25},
        Machine(),
        "batch",
        "(train_fraction=0.25) are less",
    ),
    ("imagenet_finetune", {"batch": 7, "mixup": 0.8}, Machine(), "batch", "each process gets 7 of batch=7"),
    ("imagenet_finetune", {"batch": 7, "mixup": 0.0, "cutmix": 0.0}, Machine(), None, ""),
    ("imagenet_finetune", {"cutmix": 1.0}, ONE, "--micro-batch", "mixup pairs images: give --micro-batch 2"),
    ("imagenet_finetune", {}, ONE, None, ""),
    ("imagenet_partial", {"blocks": (1.0, 7.0)}, Machine(), "blocks", "blocks=1,7, but vit_mini_patch8 has 6"),
    ("imagenet_partial", {"blocks": (1.0, 2.0)}, Machine(), None, ""),
    ("imagenet_partial", {"blocks": (0.0, 1.0)}, Machine(), "blocks", "0 blocks are linear probing by its own recipe"),
    ("imagenet_partial", {"blocks": (1.0, 6.0)}, Machine(), "blocks", "6 blocks are fine-tuning by its own recipe"),
    ("imagenet_linprobe", {}, ONE, "--micro-batch", "BatchNorm cannot learn from one image at a time"),
    ("imagenet_linprobe", {"batch": 1}, Machine(), "batch", "BatchNorm cannot learn from one image at a time"),
    ("imagenet_linprobe", {"batch": 2}, Machine(), None, ""),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """32 training images of four classes."""
    return write_ade20k(write_imagenet(tmp_path_factory.mktemp("checks"), train=8, val=1), train=6, val=2)


def check(job: Job, knob: str | None, said: str) -> None:
    found = list(job.task.objections(job))
    assert [name for name, _ in found] == ([knob] if knob else [])
    assert all(said in why for _, why in found)
    assert run_job(job).status == ("failed" if knob else "ok")


@pytest.mark.parametrize(("task", "knobs", "machine", "knob", "said"), CASES)
def test_what_is_objected_to_would_fail_and_nothing_else(root, tmp_path, task, knobs, machine, knob, said):
    knobs = {"k": 2} | knobs if task == "imagenet_knn" else {"epochs": 1} | knobs
    check(transfer_fixtures.make_job(BY_NAME[task], root, tmp_path, machine, **knobs), knob, said)


@pytest.mark.parametrize(
    ("knobs", "machine", "knob", "said"),
    [
        ({"taps": (1, 2, 3, 6)}, Machine(), "taps", "taps=1,2,3,6, but the last block of vit_mini_patch8 is 5"),
        ({"batch": 7}, Machine(), "batch", "6 training images are less than one batch=7"),
        pytest.param({"batch": 1}, Machine(), "batch", "BatchNorm cannot learn from one", marks=pytest.mark.slow),
        pytest.param({}, ONE, "--micro-batch", "BatchNorm cannot learn from one", marks=pytest.mark.slow),
        pytest.param({"iterations": 2}, Machine(micro_batch=2), None, "", marks=pytest.mark.slow),
    ],
)
def test_the_same_of_ade20k(root, tmp_path, knobs, machine, knob, said):
    check(segmentation_fixtures.make_job(root, tmp_path, machine, **knobs), knob, said)


@pytest.mark.parametrize(
    ("batch", "processes", "mixup", "said"),
    [
        (8, 3, 0.0, "batch=8 cannot be shared by 3 processes: --gpus must divide it"),
        (6, 2, 0.8, "mixup pairs images, but each process gets 3 of batch=6"),
        (6, 2, 0.0, ""),
        (8, 2, 0.8, ""),
    ],
)
def test_several_processes_share_a_batch(root, tmp_path, batch, processes, mixup, said):
    machine = Machine(processes=processes)
    job = transfer_fixtures.make_job(BY_NAME["imagenet_finetune"], root, tmp_path, machine, batch=batch, mixup=mixup)
    found = list(job.task.objections(job))
    assert [knob for knob, _ in found] == ["--gpus"] * bool(said)
    assert all(said in why for _, why in found)


def test_what_the_call_gave_is_refused_and_what_the_recipe_has_is_a_failure(root, tmp_path):
    """An override is a mistake of the call; a recipe too large for the data is one failed task among others."""
    given = transfer_fixtures.make_job(BY_NAME["imagenet_finetune"], root, tmp_path, batch=64)
    with pytest.raises(UserError, match="imagenet_finetune: 32 training images are less than one batch=64"):
        obstacle(given)
    own = Job(**{**vars(given), "overrides": {}})
    assert obstacle(own) == ("failed", "32 training images are less than one batch=64: set a smaller batch")
