"""A tiny ADE20K and small jobs for the tests of segmentation."""

from dataclasses import replace
from pathlib import Path

import pytest
from transfer_fixtures import ARCH, small_checkpoint

from mae_core.machine import Machine
from transfer import miniature_dense
from transfer.ade20k import FOLDER
from transfer.segmentation import TASKS
from transfer.segmentation_config import config_of
from transfer.task import Job

TASK = TASKS[0]
# Small enough for a test; large enough that every part of the recipe is at work.
LITTLE = {
    "image_size": 48, "stride": 32, "batch": 4, "iterations": 4, "warmup_iterations": 1, "head_channels": 8,
    "auxiliary_channels": 8, "photometric": True, "test_short_side": 56, "test_long_side": 224,
}  # fmt: skip


def write_ade20k(root: Path, train: int = 12, val: int = 5) -> Path:
    """root/ADEChallengeData2016 with so many generated images; returns root."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(miniature_dense, "TRAIN", train)
        patch.setattr(miniature_dense, "VAL", val)
        miniature_dense.ade20k(root)
    return root


def make_job(root: Path, work: Path, machine: Machine | None = None, seed: int = 0, **changes) -> Job:
    recipe = replace(TASK.recipe(ARCH, "mini"), **(LITTLE | changes))
    data = TASK.look(root)
    assert data.status == "found", data.detail
    machine = machine or Machine()
    checkpoint = small_checkpoint(0)
    return Job(TASK, checkpoint, recipe, "mini", changes, data, work, seed, "mmsegmentation", machine=machine)


def make_config(job: Job) -> dict:
    return config_of(job.checkpoint, job.recipe, Path(job.data.root) / FOLDER, job.work, job.machine)
