"""Child processes: one task or one pre-training each, with a log of its own, under torchrun if it is several processes.

Each claims the folder that it works in itself.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.warm import start, surroundings
from mae_core.files import printable
from mae_core.settings import as_typed
from mae_core.stopping import stop_postponed, stop_signals
from mae_core.writing import named_if_refused, open_to_append
from transfer.jobs import task_argument
from transfer.task import Job

# The last words of torchrun's report on a failed process, which are the same for every reason.
TORCHRUN_REPORT = ("error_file: <N/A>", "https://pytorch.org/docs/stable/elastic/errors.html")

# Seconds that a node is waited for: it may first finish what it is at work on.
LATEST = 7 * 24 * 3600


def launcher(processes: int, nodes: int = 1, endpoint: str = "", name: str = "") -> list[str]:
    """What starts so many processes here. With several nodes the same command meets on each of them: at the endpoint
    (HOST:PORT), under the name."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    if nodes > 1:
        torchrun += ["--nnodes", str(nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", name]
        # Who comes first waits for the others, and who does not listen at the endpoint for the one who will.
        return [*torchrun, "--rdzv-conf", f"join_timeout={LATEST},read_timeout={LATEST}"]
    # --standalone makes torchrun choose a free port.
    return [*torchrun, "--standalone"] if processes > 1 else [sys.executable]


def machine_flags(args: argparse.Namespace, workers: int | None = None) -> list[str]:
    """The flags of mae_core.machine.add_machine_flags and --tracker, as this call was given them. workers: for each
    process, in place of what the call says."""
    workers = args.workers if workers is None else workers
    flags = ["--device", args.device, "--precision", args.precision, "--workers", str(workers)]
    flags += ["--micro-batch", str(args.micro_batch), "--save-minutes", str(args.save_minutes)]
    flags += ["--tracker", args.tracker] if args.tracker else []
    return flags + ["--activation-checkpointing"] * args.activation_checkpointing + ["--compile"] * args.compile


def task_command(jobs: Sequence[Job], args: argparse.Namespace) -> list[str]:
    """The command that runs these jobs of one checkpoint, seed and task family; what the child makes of it must be
    these very jobs."""
    job = jobs[0]
    nodes = args.nodes if job.task.trains else 1
    meeting = f"{job.work.parent.parent.name}-{job.task.name}-{job.work.name}"
    command = launcher(job.machine.processes // nodes, nodes, args.rdzv_endpoint, meeting)
    command += ["-m", job.task.module, "--task", *(task_argument(job.task) for job in jobs)]
    command += ["--ckpt", job.checkpoint.path, "--recipe", args.recipe]
    command += ["--data", job.data.root, "--out", str(args.out), "--seed", str(job.seed)]
    own_recipe = {"recipe": job.recipe_name} if job.recipe_name != args.recipe else {}
    if knobs := own_recipe | job.overrides:
        command += ["--set", *(f"{knob}={as_typed(value)}" for knob, value in knobs.items())]
    command += ["--limit", str(args.limit)] if args.limit else []
    if len(job.task.engines) > 1:
        command += ["--engine", job.engine]
    if job.parent is not None:
        command += ["--classifier", job.parent.path]
    if found := {job.task.name: dataclasses.asdict(job.data) for job in jobs if job.task.looks_itself}:
        command += ["--found", json.dumps(found)]
    if (expected := [job.estimated_seconds for job in jobs]) and None not in expected:
        command += ["--estimated-seconds", *map(str, expected)]
    return command + machine_flags(args, job.machine.workers)


class Child:
    """A running child process; all it prints is appended to its log.

    last: the latest line that says something. reason: the latest that begins with "error: ".
    """

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        with named_if_refused(log.parent):
            log.parent.mkdir(parents=True, exist_ok=True)
        self.log, self.last, self.reason = log, "", ""
        self.torchrun = "torch.distributed.run" in command
        self.file = open_to_append(log)
        print("$", *command, file=self.file, flush=True)
        self.process = start(command, {**surroundings(), **(environment or {})})
        assert self.process.stdout is not None  # since it is a pipe
        self.reader = threading.Thread(target=self.follow, args=[self.process.stdout], daemon=True)
        self.reader.start()

    def follow(self, lines: Iterable[str]) -> None:
        """Copy the lines to the log as they come. After the reason torchrun prints a report that ends in a ruler."""
        with self.file:
            for line in lines:
                with contextlib.suppress(OSError):  # on a full disk it reads on: the child must not wait for it
                    self.file.write(line)
                    self.file.flush()
                text = printable(line.strip())
                if text.startswith("error: "):
                    self.reason = text
                if any(c.isalnum() for c in text) and not text.endswith(TORCHRUN_REPORT):
                    self.last = text

    def wait(self, seconds: float | None = None) -> int | None:
        """Its exit code; None if it still runs after that time."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        self.reader.join(5.0)  # not for ever: what it has left behind may hold the pipe
        return code

    @property
    def last_word(self) -> str:
        return self.reason or self.last

    def stop(self) -> None:
        """Ask it to save and end. torchrun passes SIGTERM on to its processes; a plain child takes SIGINT."""
        self.process.send_signal(signal.SIGTERM if self.torchrun else signal.SIGINT)

    def kill(self) -> None:
        """torchrun's processes do not end with it, each being in a session of its own."""
        if self.torchrun and isinstance(self.process, subprocess.Popen) and self.process.poll() is None:
            kill_with_descendants(self.process.pid)
        else:
            self.process.kill()


def with_descendants(process: int) -> list[int]:
    """A process and, on Linux, all that descend from it."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            parent = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1]
            children.setdefault(int(parent), []).append(int(stat.parent.name))
    found = [process]
    for one in found:
        found += children.get(one, [])
    return found


def kill_with_descendants(process: int) -> None:
    for one in with_descendants(process):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(one, signal.SIGKILL)


def stop_all(children: Sequence[Child]) -> None:
    """Ask all of them to save and end, and wait for it. Another Ctrl-C kills them; no other signal does."""
    if not children:
        return
    # A scheduler may send SIGTERM to all processes of a job, and once more by their parent.
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in stop_signals() if number != signal.SIGINT}
    try:
        for child in children:
            child.stop()
        with contextlib.suppress(OSError):  # the terminal, or who reads, may be gone
            print("\nstopping: the step under way is finished and saved (Ctrl-C again to kill)", flush=True)
        while any(child.wait(0.1) is None for child in children):
            pass
    finally:
        for child in children:
            child.kill()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_child(command: Sequence[str], log: Path) -> tuple[int, str]:
    """Run a command to its end; its exit code and its last word. Ctrl-C is passed on once, waited for, and raised
    again."""
    children: list[Child] = []
    try:
        with stop_postponed():  # or nobody would know of a child that has just begun
            children.append(child := Child(command, log))
        while (code := child.wait(0.1)) is None:
            pass
    except BaseException:
        stop_all(children)
        raise
    return code, child.last_word
