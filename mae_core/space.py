"""The disk space that a training needs in its work folder, and what is free there."""

import shutil
from pathlib import Path
from typing import NamedTuple

from mae_core.errors import UserError
from mae_core.training import CHECKPOINT_FILE

GIB = 2**30
FLOAT = 4  # bytes: weights, moments and features are all written as float32


class Space(NamedTuple):
    """Bytes that are needed: at most at any time, and after the end."""

    peak: int
    stays: int


def training_space(work: Path, model: int, trained: int, moments: int = 2, averaged: int = 0) -> Space:
    """The space for a training, which writes each checkpoint beside the last one and keeps the trained weights. Images
    and logs are not counted.

    model, trained: numbers in the model, and how many of them are trained. moments: numbers that the optimizer keeps
    for each trained one. averaged: numbers in the moving average of the weights.
    """
    state = FLOAT * (model + moments * trained + averaged)
    last = work / CHECKPOINT_FILE
    written = last.stat().st_size if last.exists() else 0
    return Space(max(2 * state - written, 0), FLOAT * trained)


def free_below(out: Path) -> int:
    """Free bytes on the disk where the folder is or will be."""
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


def space_line(space: Space, out: Path) -> str:
    """What is needed and what is free, in GiB."""
    return (
        f"up to {space.peak / GIB:.2f} GiB needed below {out} ({space.stays / GIB:.2f} GiB of it to stay), "
        f"{free_below(out) / GIB:.2f} GiB free"
    )


def check_free(space: Space, out: Path) -> None:
    """UserError if the files would not fit."""
    if space.peak > free_below(out):
        raise UserError(f"the disk is too small: {space_line(space, out)}; free some, or choose another --out")
