"""The units of a plan on this machine, side by side as far as its GPUs, or --jobs on a CPU, go."""

import argparse
import contextlib
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.children import Child, stop_all, task_command
from benchmarks.launch.board import Board
from benchmarks.launch.units import Unit, in_order, label_of, log_name, wall_time
from benchmarks.plan import with_classifier
from benchmarks.report import report
from mae_core.claim import Watch, allocation, in_words, place
from mae_core.errors import UserError
from mae_core.machine import cores
from mae_core.progress import duration
from mae_core.stopping import stop_postponed
from transfer.jobs import cached_or_skipped
from transfer.run import describe, read_record, shortened, write_record
from transfer.task import RECORD_FILE, Job, Record

POLL = 0.1  # seconds between two looks at the children
LATE = 60.0  # seconds
LOOK = 1.0  # seconds between two looks at a claim that another run holds
Mark = tuple[int, int]  # inode and time of a record


@dataclass
class Running:
    """A child at work. before: by work folder, its record when the child was started."""

    unit: Unit
    jobs: list[Job]
    slots: list[int]
    child: Child
    title: str
    started: float
    before: dict[Path, Mark | None] = field(default_factory=dict)


@dataclass
class Suite:
    """Units on their way. free: the numbers of the GPUs, or of the places on a CPU, that are not taken."""

    args: argparse.Namespace
    waiting: list[Unit]
    free: list[int]
    gpus: bool  # the places are GPUs
    running: list[Running] = field(default_factory=list)
    ended: set[Unit] = field(default_factory=set)
    records: list[Record] = field(default_factory=list)
    board: Board = field(default_factory=Board)
    watches: dict[Path, Watch] = field(default_factory=dict)
    told: set[Path] = field(default_factory=set)
    look_at: dict[Unit, float] = field(default_factory=dict)
    numbers: dict[Unit, int] = field(default_factory=dict)
    taken: set[int] = field(default_factory=set)  # of the GPUs that are free, those that other runs use
    next_look: float = 0.0
    # Trainings on several nodes whose part here ended early, and their records when it began.
    parted: dict[Unit, dict[Path, Mark | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.total, self.places = len(self.waiting), len(self.free)

    def goes_on(self) -> bool:
        """Take what has ended, start what can start; whether there is anything left."""
        for running in list(self.running):
            code = running.child.wait(0)
            if code is not None:
                self.running.remove(running)
                self.free = sorted([*self.free, *running.slots])
                self.take(running, code)
        if self.waiting and time.monotonic() >= self.next_look:
            self.look()
            self.next_look = time.monotonic() + LOOK
        self.start_what_can_start()
        self.board.show({running.title: running.child.last for running in self.running})
        return bool(self.waiting or self.running)

    def start_what_can_start(self) -> None:
        """With several nodes, each of which decides by itself, all must come to the same training: they take the plan's
        order, whatever they estimate, and start none before what stands before it has ended on every node."""
        several = any(unit.nodes > 1 for unit in self.waiting)
        unfinished = False  # something that could run has yet to end, here or on another node
        for unit in list(self.waiting) if several else in_order(self.waiting, self.places, self.wanted):
            if not all(other in self.ended for other in unit.after):
                continue
            if several and unfinished and unit.nodes > 1:
                break
            if time.monotonic() >= self.look_at.get(unit, 0.0):
                self.start(unit)
            unfinished = unfinished or unit in self.waiting

    def look(self) -> None:
        """At the claims of others: a machine that has gone shows only to who looks again and again. The GPUs that other
        runs of this machine use for jobs of this plan are not free: children of a run_all that was killed go on. Two
        allocations of a scheduler may each call their own GPU 0."""
        for watch in self.watches.values():
            watch.holder()
        if not (self.gpus and self.free):
            return
        owners = [owner for unit in self.waiting for owner in self.owners(unit, [item.job for item in unit.items])]
        here = {"place": place(), "allocation": allocation()}
        own = [owner for owner in owners if here.items() <= owner.items()]
        names = {name for owner in own for name in str(owner.get("gpus", "")).split(",")}
        self.taken = {slot for slot in range(self.places) if self.gpu_name(slot) in names}

    def gpu_name(self, slot: int) -> str:
        """What CUDA_VISIBLE_DEVICES calls it, for this process and for its children."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return visible.split(",")[slot] if visible else str(slot)

    def position(self, unit: Unit) -> str:
        return f"[{self.numbers.setdefault(unit, len(self.numbers) + 1)}/{self.total}]"

    def wanted(self, unit: Unit) -> int:
        return wanted(unit, self.gpus)

    def start(self, unit: Unit) -> None:
        """Start what is left of a unit, if there is room for it and no other run is at work on it."""
        slots = [slot for slot in self.free if slot not in self.taken][: self.wanted(unit)]
        if len(slots) < self.wanted(unit):
            return
        jobs, before = [], {}
        for item in unit.items:
            # The fine-tuning that it waited for may have run by now.
            job = with_classifier(item.job, item.finetune) if item.finetune else item.job
            if any(record.identity == job.identity() for record in self.records):
                continue
            before[job.work] = mark_of(job)
            record = cached_or_skipped(job)
            if record is None:
                jobs.append(job)
            else:
                self.records.append(record)
                self.board.say(f"{self.position(unit)} {job.checkpoint.name} {record.headline}")
        if not jobs:
            self.end(unit)
        elif not self.owners(unit, jobs):
            if unit in self.parted:
                self.take_from_other_nodes(unit, jobs)
                return
            self.free = [slot for slot in self.free if slot not in slots]
            self.launch(unit, jobs, slots, before)
            self.waiting.remove(unit)
        else:
            self.look_at[unit] = time.monotonic() + LOOK

    def end(self, unit: Unit) -> None:
        self.ended.add(unit)
        if unit in self.waiting:
            self.waiting.remove(unit)

    def watch(self, job: Job) -> Watch:
        return self.watches.setdefault(job.work, Watch(job.work))

    def owners(self, unit: Unit, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """What the claims of other runs on these jobs of a unit say; each is told of once."""
        found = []
        for job in jobs:
            owner = self.watch(job).holder()
            if owner is None:
                continue
            found.append(owner)
            if owner and job.work not in self.told:
                self.told.add(job.work)
                which = f"{self.position(unit)} {label_of([job])}"
                self.board.say(f"{which}: {in_words(owner)} is at work on it; its result will do")
        return found

    def launch(self, unit: Unit, jobs: list[Job], slots: list[int], before: dict[Path, Mark | None]) -> None:
        where = f" ({'GPU' if self.gpus else 'place'} {', '.join(map(str, slots))})" if self.places > 1 else ""
        title = f"{self.position(unit)} {label_of(jobs)}{where}"
        log = log_of(jobs, self.args.out)
        command = task_command(jobs, self.args)
        with stop_postponed():  # or nobody would know of a child that has just begun
            child = Child(command, log, self.environment(slots))
            self.running.append(Running(unit, jobs, slots, child, title, time.monotonic(), before))

    def environment(self, slots: Sequence[int]) -> dict[str, str]:
        """What confines a child to its places."""
        if self.gpus:
            return {"CUDA_VISIBLE_DEVICES": ",".join(map(self.gpu_name, slots))}
        if self.places == 1 or "OMP_NUM_THREADS" in os.environ:
            return {}
        return {"OMP_NUM_THREADS": str(max(1, cores() // self.places))}

    def take_from_other_nodes(self, unit: Unit, jobs: list[Job]) -> None:
        """Take the records of a training that this node's processes have left early, once nobody is at work on it.
        UserError if there is none: the nodes would not come to the same training again by themselves."""
        before = self.parted[unit]
        wait_for_records(jobs, before)
        if not all(has_record(job, before) for job in jobs):
            what = f"{label_of(jobs)} has ended early on this node, and no other one has left its result"
            raise UserError(f"{what}: start the same command again on all nodes ({log_of(jobs, self.args.out)})")
        for job in jobs:
            self.records.append(read_record(job.work / RECORD_FILE))
            self.board.say(f"{self.position(unit)} {job.checkpoint.name} {self.records[-1].headline}")
        self.end(unit)

    def take(self, running: Running, code: int) -> None:
        """Take the records that a child has left. One that ended early took the rest of its unit with it: the next one
        runs what is left of it."""
        took = duration(time.monotonic() - running.started)
        if code == 0:
            wait_for_records(running.jobs, running.before)
        left = [job for job in running.jobs if not has_record(job, running.before)]
        elsewhere = any(self.watch(job).holder() is not None for job in left)
        parted = running.unit.nodes > 1 and code != 0 and bool(left)
        if parted:
            self.parted[running.unit] = running.before
        again = left if parted or elsewhere or len(left) < len(running.jobs) else []
        for job in (job for job in running.jobs if job not in again):
            record = read_or_write_failure(job, running.before, code, running.child.last_word, running.child.log)
            self.records.append(record)
            where = f"seed {job.seed}, {took}"
            self.board.say(f"{self.position(running.unit)} {job.checkpoint.name} {record.headline} ({where})")
        if again:
            self.waiting.insert(0, running.unit)
        else:
            self.end(running.unit)
        with contextlib.suppress(Exception):  # the report at the end says what is wrong; the jobs go on meanwhile
            report(self.args.out, going=bool(self.waiting or self.running))


def log_of(jobs: Sequence[Job], out: Path) -> Path:
    return out / "logs" / f"{shortened(log_name(jobs))}.log"


def mark_of(job: Job) -> Mark | None:
    """What tells the record in a job's folder from an earlier one; None if there is none. The earlier one stays until
    the job itself begins: another run may have put its result there meanwhile."""
    try:
        descriptor = os.open(job.work / RECORD_FILE, os.O_RDONLY)  # only then does NFS ask the server
    except FileNotFoundError:
        return None
    try:
        status = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    return status.st_ino, status.st_mtime_ns


def has_record(job: Job, before: Mapping[Path, Mark | None]) -> bool:
    """Whether there is another record than before."""
    return mark_of(job) not in (None, before.get(job.work))


def wait_for_records(jobs: Sequence[Job], before: Mapping[Path, Mark | None]) -> None:
    """A record that another node has written may take a moment to show on a shared file system."""
    deadline = time.monotonic() + LATE
    while not all(has_record(job, before) for job in jobs) and time.monotonic() < deadline:
        time.sleep(1.0)


def read_or_write_failure(job: Job, before: Mapping[Path, Mark | None], code: int, last: str, log: Path) -> Record:
    """The record the child wrote, or a failed one in its place if it died without writing any."""
    if has_record(job, before):
        return read_record(job.work / RECORD_FILE)
    died = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    reason = f"its process ended with {died} and left no record; last line: {last} (log: {log})"
    record = describe(job, status="failed", reason=reason)
    write_record(record, job.work)
    return record


def wanted(unit: Unit, gpus: bool) -> int:
    return unit.gpus if gpus else 1


def on_gpus(units: Sequence[Unit]) -> bool:
    return any(unit.first.machine.device.startswith("cuda") for unit in units)


def expected_time(units: Sequence[Unit], args: argparse.Namespace) -> tuple[float, str]:
    """Seconds that the units take on this machine as `run_units` runs them, and how that is."""
    gpus = on_gpus(units)
    places = args.gpus if gpus else args.jobs
    pool = f"on {places} GPU{'s' * (places > 1)}" if gpus else f"with --jobs {places}"
    how = pool if gpus or places > 1 else "one after the other"
    return wall_time(units, places, partial(wanted, gpus=gpus)), how


def run_units(units: Sequence[Unit], args: argparse.Namespace) -> list[Record]:
    """Run them to their end; one Record for every item. Ctrl-C stops the children, which save, and is raised again."""
    gpus = on_gpus(units)
    suite = Suite(args, list(units), list(range(args.gpus if gpus else args.jobs)), gpus)
    run_suite(suite)
    return suite.records


def run_suite(suite: Suite) -> None:
    try:
        while suite.goes_on():
            time.sleep(POLL)
    except BaseException:  # Ctrl-C, or nobody reads what is printed here any more
        stop_all([running.child for running in suite.running])
        raise
