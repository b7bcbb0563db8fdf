"""Child processes: one task or one pre-training each, with a log of its own, under torchrun if it is several processes.

All of them hold the lock on --out.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO

from mae_core.files import printable
from mae_core.lock import Lock, clear_leftovers, take_lock
from mae_core.settings import as_typed
from mae_core.writing import named_if_refused, open_to_append
from transfer.jobs import task_argument
from transfer.task import Job

# The last words of torchrun's report on a failed process, which are the same for every reason.
TORCHRUN_REPORT = ("error_file: <N/A>", "https://pytorch.org/docs/stable/elastic/errors.html")


def take_out(out: Path) -> Lock:
    """Lock --out for a run and its children, and clear it of what killed runs left."""
    lock = take_lock(out)
    clear_leftovers(out / "tables")
    return lock


def launcher(processes: int) -> list[str]:
    if processes == 1:
        return [sys.executable]
    # --standalone makes torchrun choose a free port.
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


def machine_flags(args: argparse.Namespace) -> list[str]:
    """The flags of mae_core.machine.add_machine_flags, as this call was given them."""
    flags = ["--device", args.device, "--precision", args.precision, "--workers", str(args.workers)]
    flags += ["--micro-batch", str(args.micro_batch), "--save-minutes", str(args.save_minutes)]
    return flags + ["--activation-checkpointing"] * args.activation_checkpointing + ["--compile"] * args.compile


def task_command(jobs: Sequence[Job], args: argparse.Namespace) -> list[str]:
    """The command that runs these jobs of one checkpoint, seed and task family; what the child makes of it must be
    these very jobs."""
    job = jobs[0]
    command = [*launcher(args.gpus), "-m", job.task.module, "--task", *(task_argument(job.task) for job in jobs)]
    command += ["--ckpt", job.checkpoint.path, "--recipe", args.recipe]
    command += ["--data", job.data.root, "--out", str(args.out), "--seed", str(job.seed)]
    own_recipe = {"recipe": job.recipe_name} if job.recipe_name != args.recipe else {}
    if knobs := own_recipe | job.overrides:
        command += ["--set", *(f"{knob}={as_typed(value)}" for knob, value in knobs.items())]
    if len(job.task.engines) > 1:
        command += ["--engine", job.engine]
    if job.parent is not None:
        command += ["--classifier", job.parent.path]
    return command + machine_flags(args)


def waiting(environment: Mapping[str, str]) -> dict[str, str]:
    """How long OpenMP's threads spin at a barrier before they sleep, unless the user says it. By default it is so long
    that beside one other busy process a training on two cores kept 16 % of one core's speed (docs/speed.md)."""
    return {} if "OMP_WAIT_POLICY" in environment else {"GOMP_SPINCOUNT": "10000"}


def run_child(command: Sequence[str], log: Path, lock: Lock, title: str = "") -> tuple[int, str]:
    """Run a command to its end; its exit code and the last line it printed.

    All it prints is appended to the log; its last line is shown behind the title, if there is one. Ctrl-C is passed on
    once, waited for, and raised again.
    """
    with named_if_refused(log.parent):
        log.parent.mkdir(parents=True, exist_ok=True)
    with open_to_append(log) as file:
        print("$", *command, file=file, flush=True)
        # A session of its own keeps the terminal's Ctrl-C from reaching it twice. It inherits the lock's descriptor, so
        # that --out stays locked for as long as any child lives.
        process = subprocess.Popen(
            command,
            env={**waiting(os.environ), **os.environ, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=(lock.descriptor,),
            start_new_session=True,
        )
        lock.name_child(process.pid)
        assert process.stdout is not None  # since it is a pipe
        try:
            last = follow(process.stdout, file, title)
            return process.wait(), last
        except BaseException:  # Ctrl-C, or nobody reads what is printed here any more
            # torchrun passes SIGTERM on to its processes; a plain child takes SIGINT.
            process.send_signal(signal.SIGTERM if "torch.distributed.run" in command else signal.SIGINT)
            with contextlib.suppress(BrokenPipeError):
                print("\nstopping: the step under way is finished and saved (Ctrl-C again to kill)", flush=True)
            try:
                file.writelines(process.stdout)
                process.wait()
            finally:
                process.kill()
            raise


def follow(lines: Iterable[str], log: IO[str], title: str) -> str:
    """Copy the lines to the log as they come; the last "error: ..." among them, else the last one that says something:
    after the reason torchrun prints a report that ends in a ruler."""
    last, reason, shown = "", "", 0.0
    for line in lines:
        log.write(line)
        log.flush()
        text = printable(line.strip())
        if text.startswith("error: "):
            reason = text
        if any(c.isalnum() for c in text) and not text.endswith(TORCHRUN_REPORT):
            last = text
        if not title:
            continue
        if sys.stdout.isatty():
            width = os.get_terminal_size().columns - 1
            print(f"\r\033[K{f'{title} | {last}'[:width]}", end="", flush=True)
        elif time.monotonic() - shown > 15:
            shown = time.monotonic()
            print(f"{title} | {last}", flush=True)
    return reason or last
