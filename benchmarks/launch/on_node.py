"""What a SLURM job runs on each of its nodes, and what it makes of SLURM's signals."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.children import kill_with_descendants
from mae_core.errors import UserError
from mae_core.training import CHECKPOINT_FILE
from transfer.classification.partial import RESULT_FILE
from transfer.task import RECORD_FILE

POLL = 0.2  # seconds
# Seconds until a signal is passed on. SLURM may have sent it to all processes of the job (proctrack/linuxproc) or to
# the first one alone (proctrack/cgroup): by then run_all has begun to stop, and heeds no second one.
AFTER = 1.0
RESERVE = 30.0  # seconds before the job's end, to queue it again
LONGEST_GRACE = 1800.0  # seconds
# What a job goes on from; and every file of features or weights.
KEPT = (RECORD_FILE, CHECKPOINT_FILE, RESULT_FILE)


class OnNode:
    """Runs a command within a SLURM job; submitit calls it in one process of each node.

    Before the time limit, or a preemption where the site says so, SLURM sends USR2: the command saves and ends, and
    the job is queued again to go on. Other preemptions, `scancel` and `scontrol requeue` send SIGTERM: the command
    saves, and what becomes of the job is SLURM's.

    limit: the job's seconds; delay: those between USR2 and the limit. results: the folder of the checkpoint's runs,
    and the seed of this one. idle: how often in a row a job of this command has used up its limit for nothing.
    """

    def __init__(
        self, command: list[str], nodes: int, limit: float, delay: float, results: Path, seed: int, idle: int = 0
    ) -> None:
        self.command, self.nodes, self.limit, self.delay = command, nodes, limit, delay
        self.results, self.seed, self.idle = results, seed, idle
        self.begun: float | None = None  # when; None: not yet
        self.before: dict[Path, int] = {}
        self.process: subprocess.Popen | None = None
        self.waiter: threading.Thread | None = None
        self.asked = 0.0  # when the command was to be stopped
        self.passed_on = False

    def __call__(self) -> None:
        signal.signal(signal.SIGTERM, self.ask)
        self.before = self.kept()
        self.begun = time.monotonic()
        command = [*self.command, *self.meeting()]
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
        try:
            self.process = subprocess.Popen(command, preexec_fn=ignore_usr2)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        # Waited for in a thread: the signal's handler runs within this one, which must hold no lock of Popen's.
        self.waiter = threading.Thread(target=self.process.wait, daemon=True)
        self.waiter.start()
        self.join()
        if self.asked and self.process.returncode:
            # SLURM ends the job now, or queues it again. If it ended by itself meanwhile, it would count as failed.
            time.sleep(LONGEST_GRACE)
        if code := self.process.returncode:
            raise SystemExit(code if code > 0 else 1)

    def ask(self, *_: Any) -> None:
        """Have the command save and end; a handler of signals."""
        self.asked = self.asked or time.monotonic()

    def join(self, seconds: float = float("inf")) -> bool:
        """Wait so long for the command's end, and pass on that it shall end; whether it has."""
        deadline = time.monotonic() + seconds
        while self.waiter is not None and self.process is not None and self.waiter.is_alive():
            self.waiter.join(POLL)
            now = time.monotonic()
            if self.asked and not self.passed_on and now >= self.asked + AFTER:
                self.passed_on = True
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.process.pid, signal.SIGTERM)
            if now >= deadline:
                return not self.waiter.is_alive()
        return True

    def meeting(self) -> list[str]:
        """Where the nodes of a job find each other."""
        if self.nodes == 1:
            return []
        names = subprocess.run(
            ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]],
            capture_output=True,
            text=True,
            check=True,
        )
        port = 20_000 + int(os.environ["SLURM_JOB_ID"]) % 20_000
        return ["--nodes", str(self.nodes), "--rdzv-endpoint", f"{names.stdout.split()[0]}:{port}"]

    def kept(self) -> dict[Path, int]:
        """The files that jobs of this checkpoint and seed go on from, and when each was written."""
        found = {}
        for path in self.results.rglob("*"):
            name = str(path.relative_to(self.results))
            of_another_seed = "-seed" in name and f"-seed{self.seed}-" not in name
            if not of_another_seed and (path.name in KEPT or path.suffix == ".safetensors"):
                with contextlib.suppress(OSError):  # deleted meanwhile
                    found[path] = path.stat().st_mtime_ns
        return found

    def checkpoint(self) -> Any:
        """Stop the command, by force if it does not end in time; what submitit shall queue again. UserError if the
        second time in a row all the job's time led to nothing that the next one could go on from."""
        from submitit.helpers import DelayedSubmission

        self.ask()
        if not self.join(max(self.delay - RESERVE, self.delay / 2)) and self.process is not None:
            kill_with_descendants(self.process.pid)
        began = time.monotonic() if self.begun is None else self.begun
        used_up = time.monotonic() - began >= 0.8 * (self.limit - self.delay)  # else it was preempted
        idle = self.idle if not used_up else self.idle + 1 if self.kept() == self.before else 0
        if idle > 1:
            raise UserError(
                f"the time limit has ended it {idle} times before it had anything to go on from: give a longer --slurm "
                f"time, it is {self.limit / 60:.0f} minutes ({' '.join(self.command)})"
            )
        again = OnNode(self.command, self.nodes, self.limit, self.delay, self.results, self.seed, idle)
        return DelayedSubmission(again)


def ignore_usr2() -> None:
    """In a new process, for it and its children, which SLURM's signal before the limit may reach too: its default would
    end them before they have saved."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])
