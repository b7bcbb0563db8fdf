"""The disk space that jobs need below --out, and what is free there."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from mae_core.checkpoint import Checkpoint
from mae_core.errors import UserError
from mae_core.training import CHECKPOINT_FILE
from transfer.task import Job, Space

GIB = 2**30
FLOAT = 4  # bytes: weights, moments and features are all written as float32


def needed(jobs: Sequence[Job]) -> Space:
    """The space for jobs that run one after the other."""
    peak = stays = 0
    for space in (job.task.space(job) for job in jobs):
        peak = max(peak, stays + space.peak)
        stays += space.stays
    return Space(peak, stays)


def training_space(job: Job, model: int, trained: int, moments: int = 2, averaged: int = 0) -> Space:
    """The space for a training, which writes each checkpoint beside the last one and keeps the trained weights. Images,
    logs and COCO's results are not counted.

    model, trained: parameters in the model, and how many of them are trained. moments: numbers that the optimizer keeps
    for each trained one. averaged: parameters in the moving average of the weights.
    """
    state = FLOAT * (model + moments * trained + averaged)
    last = job.work / CHECKPOINT_FILE
    written = last.stat().st_size if last.exists() else 0
    return Space(max(2 * state - written, 0), FLOAT * trained)


def encoder_numbers(checkpoint: Checkpoint) -> int:
    return sum(tensor.numel() for tensor in checkpoint.encoder.values())


def free_below(out: Path) -> int:
    """Free bytes on the disk where the folder is or will be."""
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


def space_line(jobs: Sequence[Job], out: Path) -> str:
    """The space that the jobs need and what is free, in GiB."""
    space = needed(jobs)
    return (
        f"up to {space.peak / GIB:.2f} GiB needed below {out} ({space.stays / GIB:.2f} GiB of it to stay), "
        f"{free_below(out) / GIB:.2f} GiB free"
    )


def check_space(jobs: Sequence[Job], out: Path) -> None:
    """UserError if the jobs' files would not fit."""
    if needed(jobs).peak > free_below(out):
        raise UserError(f"the disk is too small: {space_line(jobs, out)}; free some, or choose another --out")
