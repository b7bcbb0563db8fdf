"""From a plan to units: what one child process runs, the GPUs it wants, and what must have ended before."""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.plan import Item
from transfer.run import slug
from transfer.task import Job, Needs


@dataclass(eq=False)
class Unit:
    """Items that share a child process. gpus: how many of a machine it takes. after: the units whose results it takes.
    weight: how long it is: seconds, or for want of an estimate its tasks' rank."""

    items: list[Item]
    gpus: int = 1
    after: list["Unit"] = field(default_factory=list)
    weight: float = 0.0

    @property
    def first(self) -> Job:
        return self.items[0].job

    @property
    def label(self) -> str:
        """ "mae_vit_l imagenet_a imagenet_r seed 0"."""
        return label_of([item.job for item in self.items])


def label_of(jobs: Sequence[Job]) -> str:
    names = " ".join(job.task.name for job in jobs)
    return f"{jobs[0].checkpoint.name} {names} seed {jobs[0].seed}"


def log_name(jobs: Sequence[Job]) -> str:
    names = "-".join(job.task.name for job in jobs)
    return f"{slug(jobs[0].checkpoint.name)}-{names}-seed{jobs[0].seed}"


def make_units(items: Sequence[Item]) -> list[Unit]:
    """The units of a plan, in its order: the data sets that one classifier is evaluated on share one, so that it is
    loaded once; any other item has its own."""
    units: dict[tuple, Unit] = {}
    for item in items:
        job = item.job
        alone = job.task.name if job.task.needs is Needs.ENCODER or job.overrides else ""
        unit = units.setdefault((job.checkpoint.path, job.seed, job.task.module, alone), Unit([]))
        unit.items.append(item)
        unit.gpus = job.machine.processes
        unit.weight += job.task.cost if job.estimated_seconds is None else job.estimated_seconds
    found = list(units.values())
    for unit in found:
        unit.after = [other for other in found if other is not unit and any(waits_for(i, other) for i in unit.items)]
    return found


def in_order(units: Sequence[Unit], places: int, wanted: Callable[[Unit], int]) -> list[Unit]:
    """Longest first, which fills the places best; one after the other they stay cheapest first, for early numbers.
    wanted: how many places a unit takes."""
    if any(wanted(unit) < places for unit in units):
        return sorted(units, key=lambda unit: -unit.weight)
    return list(units)


def wall_time(units: Sequence[Unit], places: int, wanted: Callable[[Unit], int]) -> float:
    """Seconds from the first start to the last end, if each unit takes its weight and starts, in order, as soon as what
    it waits for has ended and there is room."""
    now, free, waiting = 0.0, places, list(units)
    running: list[tuple[float, int]] = []  # (when it ends, its number)
    ended: set[Unit] = set()
    while True:
        for unit in in_order(waiting, places, wanted):
            if wanted(unit) <= free and ended.issuperset(unit.after):
                waiting.remove(unit)
                free -= wanted(unit)
                heapq.heappush(running, (now + unit.weight, units.index(unit)))
        if not running:
            return now
        now, number = heapq.heappop(running)
        ended.add(units[number])
        free += wanted(units[number])


def waits_for(item: Item, other: Unit) -> bool:
    """Whether an item takes a result of the other unit."""
    job, theirs = item.job, other.first
    if item.finetune is not None and item.finetune.work == theirs.work:
        return True
    same = (theirs.checkpoint.path, theirs.seed) == (job.checkpoint.path, job.seed)
    return same and theirs.task.name in job.task.after
