"""The processes that torchrun started: who this one is, and what they do together. Without torchrun there is one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

T = TypeVar("T")


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


def local_batches(count: int, size: int) -> list[list[int]]:
    """This process's batches of the indices 0..count-1. Whole batches are dealt out in turn: each holds the same
    indices however many processes there are, and no index comes twice."""
    batches = [list(range(first, min(first + size, count))) for first in range(0, count, size)]
    return batches[rank() :: world_size()]


def gather_in_turn(results: list[T]) -> list[T]:
    """The results of every process, one for each of its `local_batches`, in the order of all batches."""
    processes = gather_to_all(results)
    return [processes[i % len(processes)][i // len(processes)] for i in range(sum(map(len, processes)))]


def broadcast_buffers(model: nn.Module) -> None:
    """Give every process the first one's buffers: each has kept running statistics of its own images."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def any_process(*flags: bool) -> tuple[bool, ...]:
    """Each flag: true on every process if it is true on one."""
    if world_size() == 1:
        return flags
    votes = torch.tensor([int(flag) for flag in flags])
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return tuple(bool(vote) for vote in votes)
