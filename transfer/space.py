"""The disk space that jobs need below --out."""

from collections.abc import Sequence
from pathlib import Path

from mae_core.checkpoint import Checkpoint
from mae_core.space import Space, check_free
from transfer.task import Job


def needed(jobs: Sequence[Job]) -> Space:
    """The space for jobs that run one after the other."""
    peak = stays = 0
    for space in (job.task.space(job) for job in jobs):
        peak = max(peak, stays + space.peak)
        stays += space.stays
    return Space(peak, stays)


def encoder_numbers(checkpoint: Checkpoint) -> int:
    return sum(tensor.numel() for tensor in checkpoint.encoder.values())


def check_space(jobs: Sequence[Job], out: Path) -> None:
    """UserError if the jobs' files would not fit."""
    check_free(needed(jobs), out)
