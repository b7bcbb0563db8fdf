"""The space that trainings need below --out, against what is free there."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from mae_core.errors import UserError
from mae_core.training import CHECKPOINT_FILE
from mae_core.vit import get_arch
from transfer.task import Job

GIB = 2**30
FLOAT = 4  # bytes of a number: weights, moments and features are all written as float32
MOMENTS = {"adamw": 2, "lars": 1}


def needed(jobs: Sequence[Job]) -> tuple[int, int]:
    """(most bytes at a time, bytes that stay) of the jobs run one after the other."""
    most = stay = 0
    for peak, left in map(of_job, jobs):
        most = max(most, stay + peak)
        stay += left
    return most, stay


def of_job(job: Job) -> tuple[int, int]:
    """(most bytes at a time, bytes that stay) of one job.

    A training writes its state (weights, the optimizer's moments, the moving average) beside the one before it, and
    leaves the weights. k-NN writes its features in parts and joins them. Pictures, logs and COCO's results are not
    counted.
    """
    r = job.recipe
    if hasattr(r, "k"):
        from transfer.classification.knn import (
            feature_folder,  # late, because its recipes import cli, which asks for the space
        )

        if feature_folder(job).exists():
            return 0, 0
        dim = get_arch(job.checkpoint.arch).dim
        train, val = (FLOAT * dim * job.data.counts[split] for split in ("train", "val"))
        return 2 * train + 2 * val, train + val
    if not hasattr(r, "batch"):
        return 0, 0
    model = (job.task.weights or classifier_weights)(job)
    optimizer = getattr(r, "optimizer", "adamw")
    trained = model - encoder_weights(job) if optimizer == "lars" else model
    averaged = model if getattr(r, "ema", 0) else 0
    state = FLOAT * (model + MOMENTS[optimizer] * trained + averaged)
    before = job.work / CHECKPOINT_FILE
    there = before.stat().st_size if before.exists() else 0
    return max(2 * state - there, 0), FLOAT * trained


def classifier_weights(job: Job, classes: int = 1000) -> int:
    """Numbers in the encoder and a linear layer on it."""
    return encoder_weights(job) + classes * (get_arch(job.checkpoint.arch).dim + 1)


def encoder_weights(job: Job) -> int:
    return sum(tensor.numel() for tensor in job.checkpoint.encoder.values())


def free_below(out: Path) -> int:
    """Bytes that are free where the folder lies or will lie."""
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


def space_line(jobs: Sequence[Job], out: Path) -> str:
    """What the jobs need and what is free, in GiB."""
    most, stay = needed(jobs)
    return (
        f"up to {most / GIB:.2f} GiB needed below {out} ({stay / GIB:.2f} GiB of it to stay), "
        f"{free_below(out) / GIB:.2f} GiB free"
    )


def check_space(jobs: Sequence[Job], out: Path) -> None:
    """UserError if the jobs' files will not fit."""
    if needed(jobs)[0] > free_below(out):
        raise UserError(f"the disk is too small: {space_line(jobs, out)}; free some, or choose another --out")
