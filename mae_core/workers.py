"""The processes that decode images: how many of them this machine has room for, and what it means when one dies."""

import contextlib
import multiprocessing.process
import multiprocessing.queues
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from mae_core import distributed
from mae_core.errors import UserError
from mae_core.stopping import admit_stop, stop_held, stop_signals

SHARED_MEMORY = Path("/dev/shm")  # where workers put their batches
PREFETCH = 2  # batches that each worker prepares ahead: torch's default
RESERVE = 128  # open files for everything else
MIB = 2**20
END_SECONDS = 5  # a process closes its connections before it ends


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a batch, also those within objects of other libraries."""
    if isinstance(value, Tensor):
        return [value]
    if not isinstance(value, list | tuple | dict | type):
        value = getattr(value, "__dict__", {})
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


def bytes_of(batch: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors_in(batch))


def fitting_workers(workers: int, batch: Any, held: int) -> int:
    """At most `workers`: as many as shared memory and open files suffice for, when each prepares PREFETCH batches such
    as this one and the caller holds `held` of them at a time. Says so if they are fewer."""
    size, files = bytes_of(batch), len(tensors_in(batch))
    if not workers or not size:
        return workers
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    fits = {}
    if SHARED_MEMORY.is_dir():
        status = os.statvfs(SHARED_MEMORY)
        free = status.f_bavail * status.f_frsize // distributed.local_world_size()
        need = (PREFETCH * workers + held) * size
        what = f"/dev/shm has {free // MIB} MiB free and {workers} --workers would fill {need // MIB} MiB"
        fits[f"{what} (docker run --shm-size makes it larger)"] = int(0.9 * free // size - held) // PREFETCH
    if limit != resource.RLIM_INFINITY:
        fits[f"{limit} files may be open (ulimit -n)"] = ((limit - RESERVE) // files - held) // PREFETCH
    why = min(fits, key=fits.__getitem__, default="")
    fewer = max(0, min(workers, fits.get(why, workers)))
    if fewer < workers and distributed.is_main():
        print(f"{why}: starting {fewer} of them", flush=True)
    return fewer


def started(loader: DataLoader) -> Iterator[Any]:
    """The loader's iterator, whose workers call `begin_worker`."""
    with stop_held():
        return iter(loader)


def begin_worker(worker: int) -> None:
    """In a worker: end it when it cannot hand over a batch, or when nobody is there to take one. To stop is its
    parent's: it is to finish its step and save, for which it needs its workers, also after a signal to all."""
    end_at_errors()
    parent = multiprocessing.parent_process()
    if parent and hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())
        threading.Thread(target=end_with, args=(parent.pid,), daemon=True).start()
        sys.excepthook = say_late
    else:  # macOS
        admit_stop()


def end_with(parent: int | None) -> None:
    """End this worker when its parent says so by a signal, or has ended: handing over a batch it would wait for ever,
    as its siblings hold its pipe open."""
    while os.getppid() == parent:
        came = signal.sigtimedwait(stop_signals(), END_SECONDS)
        if came and came.si_pid == parent:
            break
    os._exit(1)


def say_late(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A worker's connections break when its parent is killed, of which there is nothing to say: before it would, it has
    ended."""
    if issubclass(kind, EOFError | ConnectionError):
        time.sleep(2 * END_SECONDS)
    sys.__excepthook__(kind, error, trace)


def end_at_errors() -> None:
    """Python would print the error and leave the batch out, for which the training would wait for ever."""

    def end(error: Exception, batch: object) -> None:
        print(f"a worker could not hand over its images: {error}", file=sys.stderr, flush=True)
        os._exit(1)

    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end)  # type: ignore[attr-defined]


@contextlib.contextmanager
def dead_workers_explained() -> Iterator[None]:
    """UserError in place of torch's error about a worker that died, which may be raised at any time."""
    try:
        yield
    except RuntimeError as e:
        if not str(e).startswith("DataLoader worker"):
            raise
        raise dead_worker(e) from None


@contextlib.contextmanager
def lost_batches_explained() -> Iterator[None]:
    """UserError in place of the error of a batch whose worker died before it was taken over."""
    with dead_workers_explained():
        try:
            yield
        except (EOFError, ConnectionError) as e:
            if str(e).startswith("Caught"):  # torch's word for what the data set itself raised in a worker
                raise
            # torch raises once more when the signal of the worker's end arrives, wherever the program then is.
            time.sleep(END_SECONDS)
            raise dead_worker(e) from None


def dead_worker(error: Exception) -> UserError:
    why = " ".join((str(error) or type(error).__name__).split())
    return UserError(
        f"a process that decodes images died ({why}): memory or /dev/shm may be too small; give fewer --workers "
        "(with 0 there are none)"
    )
