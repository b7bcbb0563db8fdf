"""Task, Job, Record: the whole vocabulary; how one job is run and its record written."""

import dataclasses
import hashlib
import json
import math
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mae_core import distributed
from mae_core.checkpoint import Checkpoint
from mae_core.errors import UserError
from mae_core.machine import Machine, commit, hardware, peak_memory_gib, versions
from mae_core.settings import as_typed, differences, write_json
from mae_core.training import CHECKPOINT_FILE
from transfer.data.findings import Data


@dataclass(frozen=True)
class Result:
    """What running a job gives. Metrics and standard errors in the metric's own unit (accuracies in percent)."""

    metrics: dict[str, float]
    stderr: dict[str, float] = field(default_factory=dict)
    n_eval: int = 0
    images_seen: int = 0
    seconds: float | None = None  # over all resumed parts; None: this process's own wall time
    tables: dict[str, Any] = field(default_factory=dict)  # e.g. error per corruption and severity
    resolved: dict[str, Any] = field(default_factory=dict)  # what the recipe left open and the run decided
    artifacts: dict[str, str] = field(default_factory=dict)  # file name in the work folder -> sha256
    notes: tuple[str, ...] = ()  # deviations from the recipe that the reader of the number must know


@dataclass(frozen=True)
class Task:
    """One transfer experiment.

    needs: "encoder" (a pre-trained one), "classifier" (a fine-tuned file, or what imagenet_finetune made of the
    encoder) or "fine-tuned file" (that alone).
    """

    name: str
    title: str
    module: str  # python -m MODULE runs it
    metric: str  # the headline
    higher_is_better: bool
    version: int  # raised whenever the same inputs give another number
    needs: str
    cost: int  # rank for "cheapest first"
    recipe: Callable[[str, str], Any]  # (arch, "paper" | "mini" | a name of its own) -> recipe dataclass
    sources: Callable[..., dict[str, str]]  # (arch[, name of its own]) -> where each value comes from
    look: Callable[[Path], Data]
    run: Callable[["Job"], Result]
    miniature: Callable[[Path], Path]  # writes its generated data below a root
    engines: dict[str, str] = field(default_factory=lambda: {"torch": "torch"})  # name -> module it needs, best first
    install: str = ""  # how to install an engine that is absent
    packages: tuple[str, ...] = ()  # further distributions whose versions the record names
    plain_vit: bool = False  # it can hold no encoder but a plain ViT
    opt_in: bool = False  # run only if it is named
    from_scratch: bool = False  # of a checkpoint it takes the size alone
    of: Callable[[str], "Task"] | None = None  # "NAME:PATH" -> the task on that folder
    path: str = ""  # that folder
    weights: Callable[["Job"], int] | None = None  # numbers in its model; None: encoder and 1000 classes


@dataclass(frozen=True)
class Job:
    """One task on one checkpoint with one seed, and the folder it works in."""

    task: Task
    checkpoint: Checkpoint
    recipe: Any
    recipe_name: str
    overrides: dict[str, Any]
    data: Data
    work: Path
    seed: int = 0
    engine: str = "torch"
    machine: Machine = field(default_factory=Machine)
    parent: Checkpoint | None = None  # the fine-tuned classifier that a robustness task evaluates

    @property
    def recipe_label(self) -> str:
        return recipe_label(self.recipe_name, self.overrides)

    def identity(self) -> dict[str, Any]:
        """What must agree for a number to be this job's number."""
        precision, parent = self.machine.precision, self.parent.sha256 if self.parent else ""
        return identity(self.task, self.checkpoint, self.recipe, self.seed, self.data, precision, self.engine, parent)


def identity(
    task: Task,
    checkpoint: Checkpoint,
    recipe: Any,
    seed: int,
    data: Data,
    precision: str,
    engine: str = "torch",
    parent: str = "",
) -> dict[str, Any]:
    """The fields that make two runs the same experiment, as plain JSON values. parent: SHA-256 of the classifier that a
    robustness task evaluates."""
    fields = {
        "task": task.name,
        "task_version": task.version,
        "checkpoint": checkpoint.identity,
        "recipe": dataclasses.asdict(recipe),
        "engine": engine,
        "seed": seed,
        "precision": precision,
        "data": data.fingerprint,
        "parent": parent,
    }
    return json.loads(json.dumps(fields))


@dataclass(frozen=True)
class Record:
    """The outcome of one job and its biography: the only source of the tables. One JSON file, written atomically."""

    task: str
    status: str  # "ok", "failed" or "skipped"
    reason: str = ""
    metric: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    stderr: dict[str, float] = field(default_factory=dict)
    chance: float | None = None
    n_eval: int = 0
    checkpoint: dict[str, Any] = field(default_factory=dict)  # name, path, format, arch, sha256, meta
    recipe_name: str = ""
    overrides: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    resolved: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    engine: str = "torch"
    data: dict[str, Any] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    hardware: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    commit: str = ""
    images_seen: int = 0
    seconds: float = 0.0
    images_per_second: float = 0.0
    peak_memory_gib: float = 0.0
    tables: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    finished: str = ""  # UTC, ISO 8601

    @property
    def recipe_label(self) -> str:
        return recipe_label(self.recipe_name, self.overrides)


def recipe_label(name: str, overrides: dict[str, Any]) -> str:
    """ "paper" only for the untouched recipe; else "paper with knob=value, ..."."""
    knobs = ", ".join(f"{knob}={as_typed(value)}" for knob, value in sorted(overrides.items()))
    return f"{name} with {knobs}" if overrides else name


RECORD_FILE = "record.json"
TRACEBACK_FILE = "error.txt"
CLASSIFIER_FILE = "classifier.safetensors"  # what fine-tuning leaves in its work folder


def write_record(record: Record, work: Path) -> None:
    write_json(work / RECORD_FILE, dataclasses.asdict(record))


def read_record(path: Path) -> Record:
    """The Record in that file; UserError if it is not one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Record(**{**values, "notes": tuple(values.get("notes", ()))})
    except (OSError, ValueError, TypeError) as e:
        raise UserError(f"{path} is not a record of this version ({e}); move it away or delete it") from e


def slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in text)


def checkpoint_folder(out: Path, checkpoint: Checkpoint) -> Path:
    return out / "runs" / f"{slug(checkpoint.name)}-{checkpoint.sha256[:8]}"


def work_folder(out: Path, checkpoint: Checkpoint, task: str, recipe_label: str, seed: int, identity: dict) -> Path:
    """Where a job works: readable names for people, the identity's hash so that different experiments never collide."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    return checkpoint_folder(out, checkpoint) / task / f"{slug(recipe_label)[:40]}-seed{seed}-{digest}"


def claim(work: Path, identity: dict[str, Any]) -> None:
    """Mark a work folder as this experiment's; UserError with the differences if it is another's."""
    marker = work / "job.json"
    if marker.exists():
        changed = differences(json.loads(marker.read_text()), identity)
        if changed:
            raise UserError(f"{work} holds another experiment ({'; '.join(changed)}): choose another --out")
    elif distributed.is_main():
        write_json(marker, identity)


def done(work: Path, identity: dict[str, Any]) -> Record | None:
    """The successful record of exactly this experiment in that folder, if there is one."""
    path = work / RECORD_FILE
    if path.exists():
        record = read_record(path)
        if record.status == "ok" and record.identity == identity:
            return record
    return None


def run_job(job: Job) -> Record:
    """Run a job in its work folder and write its record, whatever happens; Ctrl-C alone leaves none.

    With several processes a failure ends them all (SystemExit): one that failed alone would leave the others waiting
    for it, or mixing its next job's numbers with theirs.
    """
    started = time.monotonic()
    claim(job.work, job.identity())
    if distributed.is_main():
        for name in (RECORD_FILE, TRACEBACK_FILE):  # of an earlier attempt
            (job.work / name).unlink(missing_ok=True)
    distributed.barrier()
    if job.machine.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    try:
        result, status, reason = job.task.run(job), "ok", ""
        numbers = (*result.metrics.items(), *result.stderr.items())
        if bad := [name for name, value in numbers if not math.isfinite(value)]:
            raise UserError(f"{', '.join(dict.fromkeys(bad))} came out as infinite or NaN: no number is given")
    except UserError as e:
        result, status, reason = Result({}), "failed", str(e)
    except Exception as e:
        (job.work / TRACEBACK_FILE).write_text(traceback.format_exc(), encoding="utf-8")
        first_line = (str(e).strip().splitlines() or [""])[0]
        result, status = Result({}), "failed"
        reason = f"{type(e).__name__}: {first_line} (the traceback is in {job.work / TRACEBACK_FILE})"
    seconds = result.seconds if result.seconds is not None else time.monotonic() - started
    record = describe(
        job,
        status=status,
        reason=reason,
        images_per_second=round(result.images_seen / seconds, 2) if seconds else 0.0,
        peak_memory_gib=round(peak_memory_gib(job.machine.device), 2),
        **vars(replace(result, seconds=round(seconds, 1))),
    )
    if status == "failed" and distributed.world_size() > 1:
        # The first reason stands: the other processes fail because this one is gone.
        if not (job.work / RECORD_FILE).exists():
            write_record(record, job.work)
        raise SystemExit(f"error: {job.task.name}: {reason}")
    if distributed.is_main():
        write_record(record, job.work)
        if status == "ok":  # a kill before the record was written must not cost the training
            (job.work / CHECKPOINT_FILE).unlink(missing_ok=True)
    return record


def describe(job: Job, **outcome: Any) -> Record:
    """The record of a job: what it was, where it ran, and the outcome given by name."""
    c = job.checkpoint
    return Record(
        task=job.task.name,
        metric=job.task.metric,
        chance=job.data.chance,
        checkpoint={
            "name": c.name,
            "path": str(c.path),
            "format": c.format,
            "arch": c.arch,
            "sha256": c.sha256,
            "meta": dict(c.meta),
            "dropped": len(c.dropped),
            "input": {"mean": list(c.mean), "std": list(c.std), "eps": c.eps, "pool": c.pool, "plain": c.plain},
        },
        recipe_name=job.recipe_name,
        overrides=job.overrides,
        recipe=job.identity()["recipe"],
        sources=job.task.sources(c.arch) if job.recipe_name != "mini" else {},
        seed=job.seed,
        engine=job.engine,
        data=json.loads(json.dumps(dataclasses.asdict(job.data))),
        identity=job.identity(),
        machine=dataclasses.asdict(job.machine),
        hardware=hardware(job.machine.device),
        versions=versions(job.task.packages),
        commit=commit(),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        **outcome,
    )
