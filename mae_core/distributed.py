"""The processes that torchrun started: who this one is, and what they do together. Without torchrun there is one."""

import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from mae_core.claim import InUse, take_claim
from mae_core.errors import UserError

T = TypeVar("T")
P = ParamSpec("P")


PRESET = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
UNSET = f"start several processes with torchrun, or one with `env {' '.join(f'-u {name}' for name in PRESET)}`"
TOGETHER = timedelta(hours=2)  # ranks wait for rank 0 while it evaluates or writes: 10 minutes are too short
ROUND = 600.0  # seconds that rank 0 waits for another run before it lets the others know
JOINING = timedelta(minutes=1)  # without torchrun, which waits for all before it starts any


def by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def check_alone(instead: str = "") -> None:
    """For a command that is one process, whatever it starts: drop what a platform has preset for several, for its
    children too (PET_*: torchrun's own flags). UserError under torchrun; instead: what to do."""
    if by_torchrun():
        raise UserError(f"torchrun would do the same work several times: start this command plainly{instead}")
    for name in [name for name in os.environ if name in PRESET or name.startswith("PET_")]:
        del os.environ[name]


def number(name: str, default: int) -> int:
    """An environment variable that a launcher sets; UserError unless it is a whole number, 0 or more."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise UserError(f"{name} is {text!r} in the environment, which is no number: {UNSET}")
    return int(text)


def world_size() -> int:
    return max(1, number("WORLD_SIZE", 1))


def rank() -> int:
    return number("RANK", 0) if world_size() > 1 else 0


def local_world_size() -> int:
    return min(world_size(), max(1, number("LOCAL_WORLD_SIZE", 1)))


def is_main() -> bool:
    return rank() == 0


@contextmanager
def process_group(device: str) -> Iterator[str]:
    """Join the processes that torchrun started (NCCL on GPUs, gloo on CPU) and yield this process's device. Left by an
    error, the group still stands: `ends_alone` ends the process then."""
    if device == "cuda":
        local = number("LOCAL_RANK", 0) if world_size() > 1 else 0
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    if world_size() == 1:
        yield device
        return
    # gloo for what lies on the CPU also beside GPUs: a vote there does not wait for the GPU's queue.
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, store=meeting(), rank=rank(), world_size=world_size(), timeout=TOGETHER)
    yield device
    dist.destroy_process_group()


def ends_alone(main: Callable[P, int]) -> Callable[P, int]:
    """A program's main that ends this process as soon as it has failed in a group of processes, once the reason is
    printed. Leaving the group, and Python's own exit, would wait in NCCL for processes that wait for this one; torchrun
    ends those when it sees this one gone."""

    @wraps(main)
    def call(*arguments: P.args, **options: P.kwargs) -> int:
        try:
            code = main(*arguments, **options)
        except BaseException as e:
            if not dist.is_initialized():
                raise
            code = told(e)
        if dist.is_initialized():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        return code

    return call


def told(error: BaseException) -> int:
    """Print why this process ends, as Python would; its exit code."""
    if isinstance(error, SystemExit) and not isinstance(error.code, str):
        return int(error.code or 0)
    if isinstance(error, SystemExit):
        print(error.code, file=sys.stderr)
    elif peer_is_gone(error):
        print("stopped: another process of this run has ended", file=sys.stderr)
    else:
        traceback.print_exception(error)
    return 1


def peer_is_gone(error: BaseException) -> bool:
    """Whether this is gloo's error about the end of another process."""
    return isinstance(error, RuntimeError) and world_size() > 1 and "by peer" in str(error)


def meeting() -> dist.Store:
    """Where the processes find each other; UserError if they do not."""
    try:
        if rank() >= world_size():
            raise ValueError(f"RANK is {rank()}")
        store, _, _ = next(dist.rendezvous("env://", timeout=TOGETHER if by_torchrun() else JOINING))
    except (ValueError, RuntimeError) as e:  # a variable is missing or wrong; or nobody is there, a DistError
        why = " ".join(str(e).split())[:200]
        raise UserError(
            f"WORLD_SIZE is {world_size()} in the environment, but this process cannot join the others ({why}): {UNSET}"
        ) from None
    store.set_timeout(TOGETHER)
    return dist.PrefixStore("default_pg", store)  # as torch does: torchrun keeps its own keys in it


def barrier() -> None:
    """Wait for all processes; by gloo, so never for a GPU's queue."""
    any_process(False)


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


@contextmanager
def alone_in(folder: Path, wait: bool = False) -> Iterator[None]:
    """Claim a folder for all processes of this run. If another run is at work there, each gets the UserError, or waits
    for its end."""
    claim, problem, waits = None, "", True
    try:
        while waits:
            problem, waits = "", False
            if is_main():
                try:
                    claim = take_claim(folder, wait, ROUND if world_size() > 1 else math.inf)
                except UserError as e:
                    problem, waits = str(e), wait and isinstance(e, InUse)
            problem, waits = gather_to_all((problem, waits))[0]
        if problem:
            raise UserError(problem)
        yield
    finally:
        if claim is not None:
            claim.release()
