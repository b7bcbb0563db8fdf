"""From a plan to units: what one child process runs, the GPUs it wants, and what must have ended before."""

import argparse
import hashlib
import heapq
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.children import machine_flags
from benchmarks.plan import FINETUNE, Item
from mae_core.writing import write_json
from transfer.jobs import needed, task_argument
from transfer.run import slug
from transfer.task import Job, Needs


@dataclass(eq=False)
class Unit:
    """Items that share a child process. gpus: how many of each machine it takes; nodes: how many machines. after: the
    units whose results it takes. weight: how long it is: seconds, or for want of an estimate its tasks' rank."""

    items: list[Item]
    gpus: int = 1
    after: list["Unit"] = field(default_factory=list)
    weight: float = 0.0
    nodes: int = 1

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


def make_units(items: Sequence[Item], nodes: int = 1) -> list[Unit]:
    """The units of a plan, in its order: the data sets that one classifier is evaluated on share one, so that it is
    loaded once; any other item has its own."""
    units: dict[tuple, Unit] = {}
    for item in items:
        job = item.job
        alone = job.task.name if job.task.needs is Needs.ENCODER or job.overrides else ""
        unit = units.setdefault((job.checkpoint.path, job.seed, job.task.module, alone), Unit([]))
        unit.items.append(item)
        unit.gpus = job.machine.processes // (nodes if job.task.trains else 1)
        unit.nodes = nodes if job.task.trains else 1
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


def unit_command(items: Sequence[Item], args: argparse.Namespace, gpus: int) -> list[str]:
    """The command that runs items of a unit by themselves, in the same folder on any machine that shares --out."""
    job = items[0].job
    names = [item.job.task.name for item in items]
    own = {*names, *([FINETUNE] if any(item.job.task.needs is Needs.CLASSIFIER for item in items) else [])}
    command = [sys.executable, "-m", "benchmarks.run_all", "--ckpt", job.checkpoint.path]
    command += ["--tasks", *(task_argument(item.job.task) for item in items), "--seeds", str(job.seed)]
    command += ["--recipe", args.recipe, "--out", str(args.out), "--engine", args.engine, "--gpus", str(gpus)]
    command += ["--data", str(args.data)] if args.data else []
    command += ["--limit", str(args.limit)] if args.limit else []
    if settings := [setting for setting in args.set if setting.partition("=")[0].rpartition(".")[0] in own]:
        command += ["--set", *settings]
    return command + machine_flags(args)


def key_of(job: Job) -> str:
    """Names an item in every plan of the same --out. Not its work folder: that of an evaluation depends on the
    classifier, which may not be trained yet."""
    identity = {name: value for name, value in job.identity().items() if name != "parent"}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def export(units: Sequence[Unit], args: argparse.Namespace) -> None:
    """Print the plan as JSON, for another scheduler, or write it to --json FILE."""
    left = {unit: [item for item in unit.items if item.state == "to do"] for unit in units}
    names = {unit: f"job{number}" for number, unit in enumerate((u for u in units if left[u]), 1)}
    jobs = []
    for unit, name in names.items():
        job: dict[str, Any] = {"id": name, "after": [names[other] for other in unit.after if other in names]}
        job |= {"checkpoint": unit.first.checkpoint.name, "seed": unit.first.seed}
        job |= {"tasks": [item.job.task.name for item in left[unit]], "gpus": unit.gpus, "nodes": unit.nodes}
        seconds = [item.job.estimated_seconds for item in left[unit]]
        job |= {"hours": None if None in seconds else round(sum(filter(None, seconds)) / 3600, 4)}
        job |= {"bytes": needed([item.job for item in left[unit]]).peak}
        jobs.append(job | {"command": unit_command(left[unit], args, unit.gpus)})
    plan = {"folder": os.getcwd(), "out": str(args.out), "jobs": jobs}
    if args.json == Path("-"):
        print(json.dumps(plan, indent=1))
    else:
        write_json(args.json, plan)
