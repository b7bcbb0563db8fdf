"""Running one job: its work folder, what marks it as its own, and the record that is written whatever happens."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import sys
import time
import traceback
from dataclasses import replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from types import UnionType
from typing import Any, get_origin

import torch
from torch import Tensor

from mae_core import distributed
from mae_core.checkpoint import Checkpoint, save_weights, sha256_of
from mae_core.claim import clear_leftovers
from mae_core.errors import UserError
from mae_core.files import printable
from mae_core.machine import commit, hardware, peak_memory_gib, versions
from mae_core.settings import differences
from mae_core.training import CHECKPOINT_FILE
from mae_core.writing import read_object, write_json, write_text
from transfer.task import RECORD_FILE, Job, Record, Result

TRACEBACK_FILE = "error.txt"
LONGEST_NAME = 200  # bytes


def write_record(record: Record, work: Path) -> None:
    write_json(work / RECORD_FILE, dataclasses.asdict(sealed(record)))


def sealed(record: Record) -> Record:
    return replace(record, digest=digest_of(record))


def altered(record: Record) -> bool:
    """Whether a record that came out of a file is not the one that was written. Earlier versions wrote no digest."""
    return bool(record.digest) and record.digest != digest_of(record)


def digest_of(record: Record) -> str:
    """SHA-256 of the record's fields but its own digest and those that are empty: a field that a later version adds
    changes no earlier record's."""
    fields = {name: value for name, value in dataclasses.asdict(record).items() if name != "digest" and value}
    as_read = json.loads(json.dumps(fields))  # keys are texts in a file, and sorted as such
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def read_record(path: Path) -> Record:
    """The Record in a file; UserError if it holds none: another version, an editor or a full disk may have left it."""
    try:
        values = read_object(path)
        record = Record(**values)
        if wrong := wrong_fields(record):
            raise ValueError(f"wrong: {', '.join(wrong)}")
        return replace(record, notes=tuple(record.notes))
    except (OSError, ValueError, TypeError) as e:
        raise UserError(f"{path} is not a record of this version ({e}); move it away or delete it") from e


STATUS = ("skipped", "failed", "ok")  # from the weakest
# What the plan and the tables read of the dictionaries in a record; None stands for "not known".
INNER: dict[str, type | dict[str, type]] = {
    "metrics": float,
    "stderr": float,
    "artifacts": str,
    "predictions": str,
    "checkpoint": dict.fromkeys(("name", "path", "format", "arch", "sha256"), str) | {"meta": dict, "input": dict},
    "data": dict.fromkeys(("root", "status", "label", "detail", "fingerprint"), str) | {"findings": list, "limit": int},
    "identity": {"task": str, "parent": str},
    "machine": {"device": str, "precision": str, "processes": int},
}


def wrong_fields(record: Record) -> list[str]:
    """The fields of a record, as it came out of a file, that are not what they should be."""
    kinds = {f.name: list | tuple if f.name == "notes" else f.type for f in dataclasses.fields(Record)}
    wrong = {name for name, kind in kinds.items() if not fits(getattr(record, name), kind)}
    wrong |= {"status"} if record.status not in STATUS else set()
    for name in set(INNER) - wrong:
        inner, found = INNER[name], getattr(record, name)
        if isinstance(inner, dict):
            found = {key: value for key, value in found.items() if key in inner and value is not None}
        else:
            inner = dict.fromkeys(found, inner)  # one kind for all of its values
        wrong |= {f"{name}.{key}" for key, value in found.items() if not fits(value, inner[key])}
    if not wrong:
        texts = {"notes": record.notes, "data.findings": record.data.get("findings") or []}
        wrong = {name for name, found in texts.items() if not all(isinstance(text, str) for text in found)}
        wrong |= {"metric"} if record.status == "ok" and record.metric not in record.metrics else set()
    return sorted(wrong)


def fits(value: Any, kind: Any) -> bool:
    """Whether a value out of JSON is of that kind. A number is finite, and true is none."""
    kind = kind if isinstance(kind, UnionType) else get_origin(kind) or kind
    if isinstance(value, bool):
        return False
    if isinstance(value, int | float) and isinstance(0.0, kind):
        return abs(value) <= sys.float_info.max
    return isinstance(value, kind)


def shortened(name: str) -> str:
    """The name, or what fits into a file's name (255 bytes, less what stands beside it) and is still unique."""
    content = os.fsencode(name)
    if len(content) <= LONGEST_NAME:
        return name
    return f"{content[: LONGEST_NAME - 9].decode(errors='ignore')}-{hashlib.sha256(content).hexdigest()[:8]}"


def slug(text: str) -> str:
    return shortened("".join(c if c.isalnum() or c in "._-" else "-" for c in text))


def checkpoint_folder(out: Path, checkpoint: Checkpoint) -> Path:
    return out / "runs" / f"{slug(checkpoint.name)}-{checkpoint.sha256[:8]}"


def with_work_folder(job: Job) -> Job:
    """The job with its work folder below --out: readable names for people, and the identity's hash so that different
    experiments never collide."""
    digest = hashlib.sha256(json.dumps(job.identity(), sort_keys=True).encode()).hexdigest()[:8]
    run = f"{slug(job.recipe_label)[:40]}-seed{job.seed}-{digest}"
    return replace(job, work=checkpoint_folder(job.out, job.checkpoint) / shortened(job.task.name) / run)


def mark(job: Job) -> None:
    """Mark the work folder as this experiment's; UserError with the differences if it belongs to another."""
    marker = job.work / "job.json"
    if marker.exists():
        try:
            theirs = read_object(marker)
        except (OSError, ValueError) as e:
            raise UserError(f"{marker} is damaged ({e}): delete it, or choose another --out") from None
        if changed := differences(theirs, job.identity()):
            raise UserError(f"{job.work} holds another experiment ({'; '.join(changed)}): choose another --out")
    elif distributed.is_main():
        write_json(marker, job.identity())


def finished(job: Job) -> Record | None:
    """The successful record of exactly this job in its work folder, if there is one: the job need not run again.
    UserError if it was altered: what rests on it would be too."""
    path = job.work / RECORD_FILE
    record = read_record(path) if path.exists() else None
    if record and altered(record):
        raise UserError(f"{path} was altered after its run: put the original back, or delete it to run the task again")
    return record if record and record.status == "ok" and record.identity == job.identity() else None


def tidy(job: Job) -> None:
    """Delete what a run that was killed behind its result would have deleted itself."""
    if not distributed.is_main():
        return
    with contextlib.suppress(OSError):  # a folder that may only be read
        (job.work / CHECKPOINT_FILE).unlink(missing_ok=True)
        forget_obstacles(job)
    clear_leftovers(job.work)


def forget_obstacles(job: Job) -> None:
    """Delete the records that say that this job could not run for want of its data or its classifier, which are there
    now: the tables would show them beside its number."""
    for fingerprint, parent in product({job.data.fingerprint, ""}, {job.parent, None}):
        other = with_work_folder(replace(job, data=replace(job.data, fingerprint=fingerprint), parent=parent)).work
        if other != job.work:
            (other / RECORD_FILE).unlink(missing_ok=True)


def run_job(job: Job, wait: bool = False) -> Record:
    """Run a job in its work folder and write its record whatever happens, except after Ctrl-C. If another run is at
    work there: UserError, or wait: take its record when it has one.

    With several processes a failure ends them all (SystemExit): if only one stopped, the others would wait for it, or
    mix the numbers of its next job with theirs.
    """
    with distributed.alone_in(job.work, wait):
        return finished(job) or run_claimed(job)  # another run may have finished it since the caller looked


def run_claimed(job: Job) -> Record:
    started = time.monotonic()
    commit()  # that of the code which runs, not of what lies there when the record is written
    mark(job)
    if distributed.is_main():
        for name in (RECORD_FILE, TRACEBACK_FILE):  # from an earlier attempt
            (job.work / name).unlink(missing_ok=True)
        forget_obstacles(job)
    distributed.barrier()
    if job.machine.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    try:
        result, status, reason = job.task.run(job), "ok", ""
        numbers = (*result.metrics.items(), *result.stderr.items())
        if bad := [name for name, value in numbers if not math.isfinite(value)]:
            raise UserError(f"{', '.join(dict.fromkeys(bad))} came out infinite or NaN, so there is no number")
    except UserError as e:
        result, status, reason = Result({}), "failed", str(e)
    except BrokenPipeError:  # who reads what is printed was killed: the same command goes on from here
        raise
    except Exception as e:
        if distributed.peer_is_gone(e):
            raise  # the other process's reason is the one to keep
        write_text(job.work / TRACEBACK_FILE, traceback.format_exc())
        first_line = (str(e).strip().splitlines() or [""])[0]
        result, status = Result({}), "failed"
        reason = printable(f"{type(e).__name__}: {first_line} (the traceback is in {job.work / TRACEBACK_FILE})")
    wall = time.monotonic() - started
    seconds = result.seconds if result.seconds is not None else wall
    record = describe(
        job,
        status=status,
        reason=reason,
        wall_seconds=round(max(wall, seconds), 1),
        images_per_second=round(result.images_seen / seconds, 2) if seconds else 0.0,
        peak_memory_gib=round(peak_memory_gib(job.machine.device), 2),
        **vars(replace(result, seconds=round(seconds, 1))),
    )
    if status == "failed" and distributed.world_size() > 1:
        # The first reason is the one to keep: others may fail because this process is gone.
        if not (job.work / RECORD_FILE).exists():
            write_record(record, job.work)
        raise SystemExit(f"error: {job.task.name}: {reason}")
    if distributed.is_main():
        write_record(record, job.work)
        if status == "ok":  # a kill before the record was written must not cost the training
            (job.work / CHECKPOINT_FILE).unlink(missing_ok=True)
    return record


def save_trained(job: Job, name: str, state: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, str]:
    """Write trained weights to the work folder. Returns {file name: SHA-256}; on all processes but the main one, writes
    nothing and returns {}."""
    if not distributed.is_main():
        return {}
    save_weights(job.work / name, state, metadata)
    return {name: sha256_of(job.work / name)}


def origin(job: Job) -> dict[str, str]:
    """Metadata of a file of trained weights: where they come from."""
    own = {"arch": job.checkpoint.arch, "encoder_sha256": job.checkpoint.sha256, "task": job.task.name}
    return {**own, "recipe": job.recipe_name, "seed": str(job.seed)}


def describe(job: Job, **outcome: Any) -> Record:
    """The record of a job: what it was, where it ran, and its outcome, given by field name."""
    c = job.checkpoint
    record = Record(
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
        hardware=hardware(job.machine),
        versions=versions(job.task.packages),
        commit=commit(),
        estimated_seconds=job.estimated_seconds,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        **outcome,
    )
    return sealed(record)
