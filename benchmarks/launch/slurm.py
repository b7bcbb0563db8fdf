"""The units of a plan as SLURM jobs, by submitit: each runs its part of the plan with the command that a user would."""

import argparse
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.launch.on_node import OnNode
from benchmarks.launch.units import Unit, key_of, unit_command
from benchmarks.plan import Item
from mae_core.claim import claimed
from mae_core.errors import UserError
from mae_core.settings import did_you_mean
from mae_core.stopping import stop_held
from mae_core.writing import read_object, write_json
from transfer.jobs import cached_or_skipped

INSTALL = "install it with pip install 'mae-transfer[slurm]'"
DEFAULTS = {"time": 24 * 60, "signal_delay_s": 120}  # minutes; seconds before the limit, for the last save
# What --slurm takes: submitit's names, which are sbatch's.
KNOWN: tuple[str, ...] = ("partition", "account", "qos", "time", "cpus_per_task", "mem", "constraint", "exclude")
KNOWN += ("nodelist", "comment", "array_parallelism", "signal_delay_s", "mail_type", "mail_user")
REQUEUES = 10_000  # submitit's own limit of 3 would end a long training


def parameters(settings: Sequence[str]) -> dict[str, Any]:
    """["time=1-12:00:00", "partition=gpu"] -> submitit's parameters; UserError for any other."""
    found: dict[str, Any] = dict(DEFAULTS)
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not value:
            raise UserError(f"--slurm {setting}: write KEY=VALUE, as in partition=gpu")
        if key not in KNOWN:
            raise UserError(f"--slurm {setting}: unknown key; {did_you_mean(key, KNOWN)}")
        if key == "signal_delay_s" and not value.isdecimal():
            raise UserError(f"--slurm {setting}: give seconds")
        found[key] = minutes(value) if key == "time" else int(value) if value.isdecimal() else value
    return found


def minutes(text: str) -> int:
    """SLURM's forms of a time: "90", "1:30:00", "2-12", "2-12:30:00"."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not found:
        raise UserError(f"--slurm time={text}: give minutes, H:MM:SS or D-HH:MM:SS")
    days, first, second, third = (int(part) if part else 0 for part in found.groups())
    if found[1]:  # D-HH, D-HH:MM, D-HH:MM:SS
        return (days * 24 + first) * 60 + second + bool(third)
    if found[4]:
        return first * 60 + second + bool(third)
    return first + bool(second)  # M, M:SS


def jobs_file(out: Path) -> Path:
    return out / "slurm" / "jobs.json"


def submitted(out: Path) -> dict[str, str]:
    """key_of an item -> the id of the last SLURM job that was submitted for it."""
    path = jobs_file(out)
    try:
        return {key: str(job) for key, job in read_object(path).items()} if path.exists() else {}
    except (OSError, ValueError) as e:
        raise UserError(f"{path} is damaged ({e}): delete it; jobs that are queued will be submitted again") from None


def queue() -> dict[str, str]:
    """Id -> "STATE, why it waits or where it runs" of every job of this user that is not over."""
    call = ["squeue", "--me", "-h", "-r", "-o", "%i|%T|%R"]
    try:
        done = subprocess.run(call, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise UserError("there is no squeue here: submit from a machine of the SLURM cluster") from None
    except subprocess.TimeoutExpired:
        raise UserError("squeue does not answer: try again when SLURM's controller is back") from None
    if done.returncode:
        raise UserError(f"squeue failed ({' '.join(done.stderr.split())[:200]}): try again when SLURM is back")
    lines = (line.split("|", 2) for line in done.stdout.splitlines() if line.count("|") >= 2)
    return {name: f"{state} {where}".strip() for name, state, where in lines}


def in_queue(items: Sequence[Item], out: Path) -> dict[str, str]:
    """key_of an item -> "SLURM job 12: PENDING (Priority)", for those whose job is not over."""
    known = submitted(out)
    waiting = queue() if known else {}
    keys = {key_of(item.job) for item in items} & known.keys()
    return {key: f"SLURM job {known[key]}: {waiting[known[key]]}" for key in keys if known[key] in waiting}


def submit(units: Sequence[Unit], args: argparse.Namespace) -> int:
    """Submit what is neither done nor queued, in arrays where jobs ask for the same, and return at once. Exit code."""
    try:
        import submitit
    except ModuleNotFoundError:
        raise UserError(f"--launcher slurm needs submitit: {INSTALL}") from None
    wanted = parameters(args.slurm)
    with claimed(args.out / "slurm", wait=True):
        known = submitted(args.out)
        there = in_queue([item for unit in units for item in unit.items], args.out)
        ids = {key: known[key] for key in there}
        try:
            executor = submitit.SlurmExecutor(args.out.absolute() / "slurm" / "%j", max_num_timeout=REQUEUES)
        except RuntimeError as e:
            raise UserError(f"--launcher slurm: {e}") from None
        left = {unit: to_submit(unit, ids) for unit in units}
        for item in (item for unit in units for item in unit.items if item.state in ("skipped", "failed")):
            cached_or_skipped(item.job)  # its record says why
        waiting = [unit for unit, items in left.items() if items]
        count = 0
        while waiting:
            ready = [unit for unit in waiting if not any(other in waiting for other in unit.after)]
            groups: dict[tuple, list[Unit]] = {}
            for unit in ready:
                groups.setdefault((unit.gpus, unit.nodes, dependency(unit, ids)), []).append(unit)
            for (gpus, nodes, after), members in groups.items():
                executor.parameters.clear()
                executor.update_parameters(**wanted, **resources(members[0], gpus, nodes), dependency=after)
                calls = [on_node(unit, unit_command(left[unit], args, gpus), wanted) for unit in members]
                with stop_held():  # for sbatch too: a job that nobody has noted would be submitted again
                    jobs = send(executor, calls)
                    for unit, job in zip(members, jobs):
                        ids |= {key_of(item.job): job for item in left[unit]}
                    write_json(jobs_file(args.out), {**known, **ids})
                for unit, job in zip(members, jobs):
                    print(f"SLURM job {job}: {unit.label}{f' (after {after})' if after else ''}", flush=True)
                count += len(jobs)
            waiting = [unit for unit in waiting if unit not in ready]
    # SLURM lists a job for a while after its record is there.
    queued = sum(item.state != "done" and key_of(item.job) in there for unit in units for item in unit.items)
    print(f"{count} submitted, {queued} tasks queued before; `mae-transfer status` with the same flags shows them")
    return 0


def to_submit(unit: Unit, ids: Mapping[str, str]) -> list[Item]:
    return [item for item in unit.items if item.state == "to do" and key_of(item.job) not in ids]


def dependency(unit: Unit, ids: Mapping[str, str]) -> str | None:
    """sbatch's words for what must have succeeded; None if nothing that is queued."""
    needed = sorted({ids[key] for other in unit.after for item in other.items if (key := key_of(item.job)) in ids})
    return f"afterok:{':'.join(needed)}" if needed else None


def resources(unit: Unit, gpus: int, nodes: int) -> dict[str, Any]:
    on_gpus = unit.first.machine.device.startswith("cuda")
    asked: dict[str, Any] = {"nodes": nodes, "ntasks_per_node": 1, "job_name": "mae-transfer"}
    return asked | ({"gpus_per_node": gpus} if on_gpus else {})


def on_node(unit: Unit, command: list[str], wanted: Mapping[str, Any]) -> OnNode:
    """What a unit's job runs. wanted: submitit's parameters."""
    results = unit.first.work.absolute().parents[1]
    return OnNode(command, unit.nodes, 60.0 * wanted["time"], float(wanted["signal_delay_s"]), results, unit.first.seed)


def send(executor: Any, calls: Sequence[OnNode]) -> list[str]:
    """Their ids; UserError if sbatch refuses."""
    import submitit

    try:
        with executor.batch():
            jobs = [executor.submit(call) for call in calls]
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as e:
        raise UserError(f"sbatch refused the job: {' '.join(str(e).split())[-400:]}") from None
    return [job.job_id for job in jobs]
