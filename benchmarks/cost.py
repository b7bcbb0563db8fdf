"""What a job costs: its wall time, estimated from rates that were measured, from records, or from FLOPs."""

import contextlib
import dataclasses
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.timing import matmul_rate
from mae_core.errors import UserError
from mae_core.machine import Machine, hardware
from mae_core.writing import read_object, write_json
from transfer.run import altered, read_record
from transfer.task import RECORD_FILE, Job, Part, Record

# Seconds before the first image, where they were not measured: the imports, the checkpoint, the model; of a fork of a
# process that has imported everything (warm.py), as one process of its own is, the last two.
STARTUP, FORKED = 10.0, 1.0
RATES_FILE = "rates.json"
MEASURED, RECORDS, FLOPS = "measured rates", "records", "FLOPs"  # the sources, best first
# The share of the peak at which a job's FLOPs are computed. Of a GPU's data sheet: assumed, since no GPU has been
# measured. Of the products that a CPU is timed with: speed.py says 41 % for vit_mini_patch8, trained or evaluated.
GPU_SHARE, CPU_SHARE = 0.35, 0.4
# Dense TFLOP/s from NVIDIA's data sheets, without sparsity: bf16 with float32 sums, and fp32 without TF32. The first
# name that a GPU's own contains.
PEAKS = {
    "B200": (2250, 75),
    "H200": (989, 67),
    "H100 PCIe": (756, 51),
    "H100 NVL": (835, 60),
    "H100": (989, 67),
    "A100": (312, 19.5),
    "A40": (149.7, 37.4),
    "A10": (125, 31.2),
    "L40S": (362, 91.6),
    "L4": (121, 30.3),
    "RTX 6000 Ada": (364, 91.1),
    "RTX A6000": (154.8, 38.7),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71, 35.6),
}


@dataclass(frozen=True)
class Estimate:
    """seconds: wall time on the GPUs, or the cores, that the job gets, with start-up. source: MEASURED, RECORDS or
    FLOPS, of the part that takes longest."""

    seconds: float
    source: str


@dataclass(frozen=True)
class Rates:
    """Images per second of each process on a GPU, or of all on a CPU, by `key_of`."""

    measured: Mapping[str, float] = field(default_factory=dict)
    recorded: Mapping[str, float] = field(default_factory=dict)

    def of(self, job: Job, part: Part) -> tuple[float, str] | None:
        key = key_of(job, part.kind, hardware(job.machine))
        for known, source in ((self.measured, MEASURED), (self.recorded, RECORDS)):
            if known.get(key):
                return known[key], source
        return None

    def startup(self, job: Job, part: Part) -> float:
        """Seconds before the first image."""
        usual = FORKED if sys.platform == "linux" and job.machine.processes == 1 else STARTUP
        return self.measured.get(startup_key(key_of(job, part.kind, hardware(job.machine))), usual)


def key_of(job: Job, kind: str, where: str) -> str:
    """All that a rate depends on, in words. where: `hardware` of the job's machine, or of a record's."""
    m = job.machine
    gpu = m.device.startswith("cuda")
    how = [re.sub(r"^\d+x ", "", where)] if gpu else [where, f"{m.processes} x {m.threads} threads"]
    how += [m.precision, *["compiled"] * m.compile, *["activation checkpointing"] * m.activation_checkpointing]
    how += [f"micro-batch {m.micro_batch}"] if m.micro_batch else []
    return " | ".join([*how, job.checkpoint.arch, job.task.module, job.engine, kind])


def startup_key(key: str) -> str:
    """Where rates.json keeps the seconds before the first image of what has this key."""
    return f"start-up in seconds | {key}"


def side_by_side(machine: Machine) -> int:
    """How many times a rate counts: once for each GPU; a CPU's is that of all its processes."""
    return machine.processes if machine.device.startswith("cuda") else 1


def estimate(job: Job, rates: Rates) -> Estimate | None:
    """The job's wall time from its start to its end; None if its data were not found, or its task does not say what it
    computes. A part without a rate goes as fast, by its passes, as the job's first one with a rate does."""
    parts = job.task.parts(job) if job.data.status == "found" else ()
    if not parts:
        return None
    known = {part.kind: rates.of(job, part) for part in parts}
    measured = ((rate * part.passes, source) for part in parts for rate, source in filter(None, [known[part.kind]]))
    passes, source = next(measured, None) or (peak_passes(job), FLOPS)
    spent = []
    for part in parts:
        rate, of = known[part.kind] or (passes / part.passes, source)
        spent.append((part.images / (rate * side_by_side(job.machine)), of))
    return Estimate(rates.startup(job, parts[0]) + sum(seconds for seconds, _ in spent), max(spent)[1])


def peak_passes(job: Job) -> float:
    """Forward passes per second, of each process on a GPU or of all on a CPU, at the stated share of the peak."""
    gpu = job.machine.device.startswith("cuda")
    share = GPU_SHARE if gpu else CPU_SHARE
    return share * peak(hardware(job.machine), job.machine.device, job.machine.precision) / max(job.task.flops(job), 1)


@cache
def peak(where: str, device: str, precision: str) -> float:
    """FLOP/s of a GPU by its name; of a CPU, and of a GPU that is not listed, of matrix products timed now."""
    if device.startswith("cuda"):
        for name, (bf16, fp32) in PEAKS.items():
            if name in where:
                return 1e12 * (bf16 if precision == "bf16" else fp32)
        return matmul_rate(device, precision)
    return matmul_rate(device, precision, sides=(1024,))


def hours_of(job: Job) -> float:
    """The GPU hours, or on a CPU core hours, that a job is expected to take; 0 if that is not known."""
    m = job.machine
    places = m.processes if m.device.startswith("cuda") else m.processes * m.threads
    return places * (job.estimated_seconds or 0.0) / 3600


def hours_in_words(jobs: Sequence[Job]) -> str:
    unit = "GPU hours" if any(job.machine.device.startswith("cuda") for job in jobs) else "core hours"
    return f"{sum(map(hours_of, jobs)):.2f} {unit}"


def read_rates(out: Path, jobs: Sequence[Job]) -> Rates:
    """What is known in a folder of runs: rates.json, and the records of the jobs' tasks and architectures."""
    return Rates(read_measured(out), recorded_rates(read_records(out), jobs))


def read_measured(out: Path) -> dict[str, float]:
    """UserError if rates.json holds anything but positive numbers."""
    path = out / RATES_FILE
    if not path.exists():
        return {}
    try:
        values = read_object(path)
    except (OSError, ValueError) as e:
        raise UserError(f"{path} is damaged ({e}): delete it") from None
    if wrong := [key for key, rate in values.items() if type(rate) not in (int, float) or not 0 < rate < 1e12]:
        raise UserError(f"{path} is damaged (no rate: {wrong[0]}): delete it")
    return values


def keep_measured(out: Path, rates: Mapping[str, float]) -> None:
    write_json(out / RATES_FILE, {**read_measured(out), **rates})


def read_records(out: Path) -> list[Record]:
    """Those that can be read and are as they were written; the report says which are not."""
    records = []
    for path in sorted(out.glob(f"runs/**/{RECORD_FILE}")):
        with contextlib.suppress(UserError):
            records.append(read_record(path))
    return [record for record in records if not altered(record)]


def recorded_rates(records: Iterable[Record], jobs: Sequence[Job]) -> dict[str, float]:
    """The rate of each kind of part that a record times, over all records of it."""
    by_task = {(job.task.name, job.checkpoint.arch): job for job in jobs if job.data.status == "found"}
    images: defaultdict[str, int] = defaultdict(int)
    seconds: defaultdict[str, float] = defaultdict(float)
    for record in records:
        job = by_task.get((record.task, record.checkpoint.get("arch", "")))
        timed = as_recorded(job, record) if job and record.status == "ok" and record.images_seen > 0 else None
        parts = timed.task.parts(timed) if timed else ()
        if timed and parts:
            key = key_of(timed, parts[0].kind, record.hardware)
            images[key] += record.images_seen
            seconds[key] += max(record.seconds, 0.1) * side_by_side(timed.machine)
    return {key: images[key] / seconds[key] for key in images}


def as_recorded(job: Job, record: Record) -> Job | None:
    """The job with a record's recipe, engine and machine; None for a recipe of another version."""
    try:
        recipe = type(job.recipe)(**{knob: as_tuple(value) for knob, value in record.recipe.items()})
        names = {f.name for f in dataclasses.fields(Machine)} & record.machine.keys()
        machine = Machine(**{name: record.machine[name] for name in names})
    except (TypeError, UserError):
        return None
    return replace(job, recipe=recipe, recipe_name=record.recipe_name, engine=record.engine, machine=machine)


def as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
