"""From names and settings to jobs, the reasons why a job cannot run, and the disk space that jobs need below --out."""

import dataclasses
import fnmatch
import hashlib
import importlib.util
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

from mae_core import distributed
from mae_core.checkpoint import Checkpoint, Drawn, numbers_of, read_checkpoint, sha256_of
from mae_core.errors import UserError
from mae_core.flags import RECIPES
from mae_core.machine import Machine
from mae_core.settings import differences, override, unknown
from mae_core.space import Space, check_free
from mae_core.timm_encoder import is_timm
from transfer.data.findings import Data
from transfer.run import describe, finished, tidy, with_work_folder, write_record
from transfer.task import Job, Needs, Record, Task


def split_names(names: Sequence[str], known: Collection[str]) -> list[str]:
    """["a,b", "c"] -> ["a", "b", "c"]. A comma in a "NAME:PATH" belongs to the path, unless a known name follows it."""
    found = []
    for name in names:
        parts: list[str] = []
        for part in name.split(","):
            if parts and ":" in parts[-1] and part.strip().partition(":")[0] not in known:
                parts[-1] += f",{part}"
            elif part.strip():
                parts.append(part.strip())
        found += parts or [name]
    return found


def find_tasks(names: Sequence[str], tasks: Sequence[Task]) -> list[Task]:
    """The tasks with these names, also as "NAME,NAME"; "NAME:PATH" is the task NAME on that folder, and "vtab_*" are
    all whose names begin so."""
    known = {task.name: task for task in tasks}
    found: dict[str, Task] = {}
    several = (matching(name, known) or [name] for name in split_names(names, known))
    for name in dict.fromkeys(chain.from_iterable(several)):
        family, colon, path = name.partition(":")
        of = known[family].of if family in known else None
        if family not in known or (colon and not of):
            raise unknown("task", name, known)
        if of and not path:
            raise UserError(f"--tasks {name}: say which folder, as {family}:/path/to/images")
        task = of(path) if of else known[family]
        other = found.setdefault(task.name, task)
        if other.path != task.path:
            raise UserError(
                f"--tasks: {other.path} and {task.path} would both be called {task.name}: link one of them under "
                "another name"
            )
    return list(found.values())


def matching(name: str, known: Mapping[str, Task]) -> list[str]:
    """Those that a name with "*" stands for, but for what needs a folder."""
    return [each for each in fnmatch.filter(known, name) if not known[each].of] if "*" in name else []


def task_argument(task: Task) -> str:
    """The name from which `find_tasks` makes this task."""
    return f"{task.name.partition(':')[0]}:{task.path}" if task.path else task.name


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # another package has blocked the module
        return False


def choose_engine(task: Task, asked: str = "auto") -> str:
    """The engine that a task runs on: the one asked for if the task has it, else the first that is installed, else the
    first. UserError if the one asked for is not installed."""
    if asked in task.engines:
        if not installed(task.engines[asked]):
            raise UserError(f"--engine {asked}: it is not installed here; {task.install}")
        return asked
    return next((name for name, module in task.engines.items() if installed(module)), next(iter(task.engines)))


def make_job(
    task: Task,
    checkpoint: Checkpoint,
    recipe_name: str,
    settings: Sequence[str],
    data: Data,
    out: Path,
    seed: int,
    machine: Machine,
    engine: str = "auto",
    parent: Checkpoint | None = None,
) -> Job:
    """The job and its work folder; UserError for an unknown knob or an engine that is not installed."""
    if task.from_scratch and not is_timm(checkpoint.arch):  # which it does not take
        checkpoint = scratch_of(checkpoint.arch, seed)
    task, recipe_name, recipe, overrides = resolve(task, checkpoint.arch, recipe_name, settings)
    if data.limit and data.status == "found":
        fitted = task.few(recipe, data)
        changes = differences(dataclasses.asdict(recipe), dataclasses.asdict(fitted))
        said = (f"{task.name}, fitted to so few images: {', '.join(changes)}",) if changes else ()
        recipe, data = fitted, replace(data, findings=(*data.findings, *said))
    engine = choose_engine(task, engine)
    if task.exact and not machine.precision_given:
        machine = replace(machine, precision="fp32")
    job = Job(task, checkpoint, recipe, recipe_name, overrides, data, Path(), seed, engine, machine, parent, out)
    return with_work_folder(job)


def resolve(task: Task, arch: str, name: str, settings: Sequence[str]) -> tuple[Task, str, Any, dict[str, Any]]:
    """The recipe with its settings applied: (the task with that recipe's sources, the recipe's name, the recipe, the
    overridden values). The setting recipe=NAME selects one of the task's further recipes instead of --recipe's."""
    names = [setting.removeprefix("recipe=") for setting in settings if setting.startswith("recipe=")]
    if names:
        name = names[-1]
        if name in RECIPES:
            raise UserError(f"--set recipe={name}: --recipe chooses that, for all tasks")
        task = replace(task, sources=partial(task.sources, name=name))
    settings = [setting for setting in settings if not setting.startswith("recipe=")]
    try:
        return task, name, *override(task.recipe(arch, name), settings)
    except UserError as e:
        raise UserError(f"{task.name}: {e}") from None


def scratch_of(arch: str, seed: int) -> Checkpoint:
    """Random weights named by their size, so that all checkpoints of one size share the same run from scratch."""
    name = f"scratch:{arch}"
    sha256 = hashlib.sha256(name.encode()).hexdigest()
    return replace(read_checkpoint(f"random:{arch}", seed), name=name, sha256=sha256)


def classifier_of(checkpoint: Checkpoint, path: Path, recipe_name: str, seed: int) -> Checkpoint:
    """The classifier in a file; UserError unless imagenet_finetune made it from this checkpoint with this recipe and
    seed: its numbers go into this checkpoint's row."""
    classifier = read_checkpoint(path)
    wanted = {"encoder_sha256": checkpoint.sha256, "recipe": recipe_name, "seed": str(seed)}
    if changed := differences({name: classifier.meta.get(name) for name in wanted}, wanted):
        raise UserError(
            f"--classifier {path} was not made by imagenet_finetune from {checkpoint.name} ({'; '.join(changed)}): "
            "give the one that was, or evaluate this one as --ckpt"
        )
    return classifier


def obstacle(job: Job) -> tuple[str, str]:
    """("skipped" or "failed", why) if the job cannot run; ("", "") if it can. UserError if a knob or flag given by the
    user is why it cannot."""
    task, kind = job.task, job.checkpoint.kind
    if why := task.refuses(job.checkpoint.arch):
        return "skipped", f"{task.name} {why}"
    found = list(task.objections(job))
    for knob, why in found:
        if knob.startswith("--") or knob in job.overrides:
            raise UserError(f"{task.name}: {why}")
    if task.needs is Needs.ENCODER and kind == "classifier":
        return "skipped", f"{job.checkpoint.name} is a fine-tuned classifier, not a pre-trained encoder"
    if not installed(task.engines[job.engine]):
        return "skipped", f"{job.engine} is not installed here; {task.install}"
    if job.data.status == "missing":
        return "skipped", job.data.detail
    if job.data.status == "incomplete":
        return "failed", job.data.detail
    if found:
        return "failed", found[0][1]
    if task.needs is Needs.FINE_TUNED_FILE and "head.weight" not in job.checkpoint.classifier:
        return "skipped", f"{job.checkpoint.name} has no head: give a fine-tuned classifier as --ckpt"
    if task.needs is Needs.CLASSIFIER and kind != "classifier" and job.parent is None:
        where = "same checkpoint, recipe and seed, with its classifier.safetensors"
        return "skipped", f"needs imagenet_finetune ({where}), or a fine-tuned file as --ckpt"
    if job.parent is not None and is_changed(job.parent):
        what = "is not the file that imagenet_finetune wrote, by its hash"
        return "failed", f"{job.parent.path} {what}: put that back, or delete its folder to fine-tune again"
    return "", ""


def is_changed(classifier: Checkpoint) -> bool:
    """Whether the file is no longer the one of its record."""
    found = os.stat(classifier.path)
    return hash_of_file(classifier.path, found.st_size, found.st_mtime_ns) != classifier.sha256


@cache
def hash_of_file(path: str, size: int, changed: int) -> str:
    """SHA-256 of the file as it was at that time: the sets that one classifier is evaluated on share it."""
    return sha256_of(Path(path))


def cached_or_skipped(job: Job) -> Record | None:
    """The record of a job that is done or cannot run (in which case it is written now); None if it must run."""
    record = finished(job)
    if record is not None:
        tidy(job)
    status, reason = obstacle(job) if record is None else ("", "")
    if status:
        record = describe(job, status=status, reason=reason)
        if distributed.is_main():
            write_record(record, job.work)
    return record


def needed(jobs: Sequence[Job]) -> Space:
    """The space for jobs that run one after the other."""
    peak = stays = 0
    for space in (job.task.space(job) for job in jobs):
        peak = max(peak, stays + space.peak)
        stays += space.stays
    return Space(peak, stays)


def encoder_numbers(checkpoint: Checkpoint) -> int:
    if isinstance(checkpoint.encoder, Drawn):
        return numbers_of(checkpoint.arch)
    return sum(tensor.numel() for tensor in checkpoint.encoder.values())


def check_space(jobs: Sequence[Job], out: Path) -> None:
    """UserError if the jobs' files would not fit."""
    check_free(needed(jobs), out)
