"""Rates measured on this machine: each distinct part of a plan is run for a little while, as the plan would run it."""

import argparse
import contextlib
import os
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.children import Child, task_command
from benchmarks.cost import keep_measured, key_of, side_by_side, startup_key
from benchmarks.warm import forks
from mae_core.machine import hardware
from transfer.task import Job

# Seconds from the first progress on that are not measured, while queues fill; seconds that are; seconds that a child
# may take to end.
SETTLING, MEASURED, ENDING = 3.0, 30.0, 60.0
PROGRESS = re.compile(r"(?P<label>.+) (?P<done>\d+)/(?P<total>\d+) \| (?P<rate>\d+) images/s \| (?P<unit>\S+ s/it)?")


@dataclass
class Sightings:
    """What was seen of a job's progress: (seconds, share done) of its training, or of the latest of its evaluations.

    images: of the whole training; None for an evaluation, whose progress counts images. foreign: the line of another
    training came first, which is none of this part.
    """

    label: str
    images: int | None
    seen: list[tuple[float, float]] = field(default_factory=list)
    said: float = 0.0  # images/s, by the latest line
    total: int = 0
    foreign: bool = False

    def add(self, line: str, now: float) -> None:
        found = PROGRESS.match(line)
        if not found or bool(found["unit"]) != (self.images is not None):
            return
        if self.images is None:
            if found["label"] != self.label:
                self.label, self.seen = found["label"], []
        elif not found["label"].startswith(f"{self.label} "):
            self.foreign = True
            return
        self.total, self.said = int(found["total"]), float(found["rate"])
        share = int(found["done"]) / self.total
        if not self.seen or share != self.seen[-1][1]:
            self.seen.append((now, share))

    @property
    def settled(self) -> list[tuple[float, float]]:
        return [one for one in self.seen if one[0] >= self.seen[0][0] + SETTLING]

    def enough(self) -> bool:
        return self.foreign or (len(self.settled) > 1 and self.settled[-1][0] - self.settled[0][0] >= MEASURED)

    def rate(self) -> float | None:
        """Images per second; None if there was no progress of this part. Between the first and the last sighting, as
        far as they are settled; of a short job what its last line says, which counts from its start."""
        if self.foreign or not self.seen:
            return None
        if len(self.settled) < 2:
            return self.said or None
        (start, before), (end, after) = self.settled[0], self.settled[-1]
        return (after - before) * self.counted / (end - start)

    @property
    def counted(self) -> int:
        return self.total if self.images is None else self.images

    def started(self) -> float | None:
        """When the first image was begun, by the rate; None without one."""
        rate = self.rate()
        return self.seen[0][0] - self.seen[0][1] * self.counted / rate if rate else None


def measure(jobs: Sequence[Job], args: argparse.Namespace) -> None:
    """Measure the rate of the first part of these jobs and how long they take to start, once for each kind, and keep
    both in --out's rates.json."""
    distinct: dict[str, Job] = {}
    for job in jobs:
        for part in job.task.parts(job)[:1]:
            distinct.setdefault(key_of(job, part.kind, hardware(job.machine)), job)
    for number, (key, job) in enumerate(distinct.items(), 1):
        print(f"measuring [{number}/{len(distinct)}] {job.task.name} {job.checkpoint.arch}", end=": ", flush=True)
        rate, startup, last = measured(job, args)
        if rate:
            own = round(rate / side_by_side(job.machine), 4)
            keep_measured(args.out, {key: own, startup_key(key): max(round(startup, 1), 0.1)})
        found = f"{rate:.4g} images/s, {startup:.0f} s to start" if rate else f"no rate; its last line: {last}"
        print(found, flush=True)


def measured(job: Job, args: argparse.Namespace) -> tuple[float | None, float, str]:
    """Images per second of the first part of a job, run in a folder of its own until that is known, the seconds before
    its first image, and what the child said last."""
    part = job.task.parts(job)[0]
    sightings = Sightings(job.task.name, part.images if job.task.trains else None)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".measure-", dir=args.out, ignore_cleanup_errors=True) as scratch:
        own = argparse.Namespace(**{**vars(args), "out": Path(scratch), "tracker": ""})
        threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(job.machine.threads)}
        command = task_command([job], own)
        if forks(command):  # in a run the imports are not this job's
            Child([*command[:3], "--help"], Path(scratch) / "log", threads).wait()
        began = time.monotonic()
        child = Child(command, Path(scratch) / "log", threads)
        try:
            while child.wait(0.05) is None and not sightings.enough():
                sightings.add(child.last, time.monotonic())
            sightings.add(child.last, time.monotonic())
        finally:
            if child.wait(0) is None:
                with contextlib.suppress(ProcessLookupError):
                    child.stop()
                child.wait(ENDING)
                child.process.kill()
                child.wait()
    rate = sightings.rate()
    if rate and not job.task.trains:
        rate /= part.passes  # the images that it shows are features alone; a search or a fit follows
    return rate, (sightings.started() or began) - began, child.last_word
