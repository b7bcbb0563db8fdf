"""The torchrun environment, and nothing else. Without torchrun everything here is the one-process case."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    return rank() == 0


@contextmanager
def process_group(device: str) -> Iterator[str]:
    """Join the processes that torchrun started (NCCL on GPUs, gloo on CPU) and yield this process's device."""
    if device == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    if world_size() == 1:
        yield device
        return
    # gloo for what lies on the CPU also beside GPUs: a vote there does not wait for the GPU's queue.
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    # Ranks wait for rank 0 while it evaluates or writes: the default 10 minutes is too short for a slow disk.
    dist.init_process_group(backend, timeout=timedelta(hours=2))
    try:
        yield device
    finally:
        dist.destroy_process_group()


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def gather_to_all(value: object) -> list:
    """The value of every process, in rank order."""
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def any_process(*flags: bool) -> tuple[bool, ...]:
    """Each flag: true on every process if it is true on one."""
    if world_size() == 1:
        return flags
    votes = torch.tensor([int(flag) for flag in flags])
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return tuple(bool(vote) for vote in votes)
