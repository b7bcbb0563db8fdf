"""Commands started as forks of this process, which has imported everything: an import takes longer than most cases.

A fork is a process like any other: it has a session, pipes and an exit code of its own, and can be killed.
"""

import atexit
import contextlib
import faulthandler
import gc
import importlib
import inspect
import io
import os
import resource
import runpy
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mae_core
from transfer.data import coco

PRELOADED = (
    "benchmarks.ablations", "benchmarks.report", "benchmarks.run_all", "benchmarks.speed", "mae_core.checkpoint",
    "mae_core.pretrain", "mae_core.reconstruct", "transfer.classification.tasks", "transfer.detection.tasks",
    "transfer.detection.engine_torchvision", "transfer.frozen.tasks", "transfer.segmentation.train",
    "transfer.miniature.labelled", "mmseg.apis", "matplotlib.pyplot", "sklearn.cluster", "torch.distributed.run",
    "tensorboard.compat.proto.event_pb2", "tensorboard.summary.writer.record_writer",
)  # fmt: skip
MEMORY = 12 * 2**30  # bytes of address space: what would fill the machine ends as a MemoryError
EXECUTE = inspect.signature(subprocess.Popen._execute_child)
PIPES = (("p2cread", "p2cwrite"), ("c2pwrite", "c2pread"), ("errwrite", "errread"))


def preload() -> None:
    for name in PRELOADED:
        with contextlib.suppress(ImportError):  # an engine that is not installed
            importlib.import_module(name)


class Fork(subprocess.Popen):
    """A Popen that forks where this Python is to be started, and starts anything else as usual."""

    def _execute_child(self, args, *rest) -> None:
        if not isinstance(args, list | tuple) or args[0] != sys.executable:
            super()._execute_child(args, *rest)
            return
        given = EXECUTE.bind(self, args, *rest).arguments
        pipes = [(given[name], given[own]) for name, own in PIPES]
        sys.stdout.flush()
        # A signal that came while Python prepares the fork would be lost: a handler may not raise there.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        self.pid = os.fork()
        self._child_created = True
        if self.pid == 0:
            descriptors = [child for child, _ in pipes]
            command = [os.fspath(part) for part in args]
            become(command, given["pass_fds"], given["cwd"], given["env"], descriptors, given["start_new_session"])
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for child, own in pipes:
            if own != -1:  # it is a pipe, whose other end is the child's
                os.close(child)


def become(
    args: list[str], keep: Sequence[int], cwd: str | None, env: Mapping | None, pipes, new_session: bool
) -> None:
    """Turn this fork into the process that the command would start, and end with it."""
    code = 1
    try:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGXFSZ, signal.SIGPIPE, signal.SIGALRM):
            ignored = number in (signal.SIGPIPE, signal.SIGXFSZ)  # as Python begins
            signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # as long as Python itself would be starting
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        faulthandler.disable()
        atexit._clear()
        gc.callbacks.clear()  # hypothesis's
        coco.read_once.cache_clear()  # a new process holds none of this one's files
        if new_session:
            os.setsid()
        for number, descriptor in enumerate(pipes):
            if descriptor != -1:
                os.dup2(descriptor, number)
        last = 2
        for descriptor in sorted(fd for fd in keep if fd > 2):
            os.closerange(last + 1, descriptor)
            os.set_inheritable(descriptor, True)
            last = descriptor
        os.closerange(last + 1, 4096)
        sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False))
        for name, number in (("stdout", 1), ("stderr", 2)):
            raw = io.FileIO(number, "w", closefd=False)
            setattr(sys, name, io.TextIOWrapper(raw, encoding="utf-8", write_through=True))
        sys.stderr.reconfigure(errors="backslashreplace")
        if env is not None:
            os.environ.clear()
            os.environ.update(env)
        os.chdir(cwd or ".")
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")  # that it was imported before
        subprocess.Popen = Fork
        mae_core.stop_quietly()  # as its import does
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = run([part for part in args[1:] if part != "-u"])
        atexit._run_exitfuncs()
    except BaseException:
        code = unexpected()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(code)


def unexpected() -> int:
    """What Python does with an exception that nobody caught; the exit code."""
    try:
        sys.excepthook(*sys.exc_info())
    except SystemExit as end:
        return int(end.code or 0)
    return 1


def run(arguments: list[str]) -> int:
    """Run what follows `python` on a command line; its exit code."""
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return 0


@dataclass(frozen=True)
class Done:
    """How a command ended. text: all that it printed."""

    code: int
    text: str
    seconds: float


def start(arguments: Sequence[object], folder: Path, log: Path) -> Fork:
    """Start `python ARGUMENTS` in a folder, in a session of its own, with all that it prints in a log."""
    with open(log, "ab") as file:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        command = [sys.executable, *map(str, arguments)]
        return Fork(command, cwd=folder, env=environment, start_new_session=True, **streams)


def finish(process: subprocess.Popen, log: Path, seconds: float) -> Done:
    """Wait for it; if that takes longer than so many seconds, kill it with all its children: its code is then -9."""
    began = time.monotonic()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        kill_all([process.pid, *descendants(process.pid)])
        process.wait()
    return Done(process.returncode, log.read_text("utf-8", "replace"), time.monotonic() - began)


def call(arguments: Sequence[object], folder: Path, seconds: float = 120, largest: int = -1) -> Done:
    """Run `python ARGUMENTS` in a folder to its end. largest: bytes that a file may have (-1: any number)."""
    began = time.monotonic()
    with limited(resource.RLIMIT_AS, MEMORY), limited(resource.RLIMIT_FSIZE, largest):
        process = Fork(
            [sys.executable, *map(str, arguments)],
            cwd=folder,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,  # to which no limit on files applies
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        text, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill_all([process.pid, *descendants(process.pid)])
        text, _ = process.communicate()
    return Done(process.returncode, text.decode("utf-8", "replace"), time.monotonic() - began)


@contextlib.contextmanager
def limited(kind: int, value: int) -> Iterator[None]:
    """What this process starts inherits the limit (-1: none)."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def parents() -> dict[int, int]:
    """{process: its parent} of all that live."""
    found = {}
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError):
            state, parent = Path("/proc", name, "stat").read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                found[int(name)] = int(parent)
    return found


def descendants(process: int) -> list[int]:
    """All processes below this one, parents first."""
    known, found = parents(), [process]
    for one in found:
        found += [child for child, parent in known.items() if parent == one]
    return found[1:]


def kill_all(processes: Sequence[int], number: int = signal.SIGKILL) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)
