"""The plan of a call: every job, its checkpoint and data, and whether it is done, to do, or cannot run."""

import argparse
import os
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache

from benchmarks.cost import hours_in_words
from benchmarks.inspections import inspect_all
from benchmarks.suite import TASKS
from mae_core.checkpoint import Checkpoint, read_checkpoint
from mae_core.errors import UserError
from mae_core.machine import Machine, cores, default_workers, hardware, machine_from
from mae_core.progress import duration
from mae_core.settings import did_you_mean
from mae_core.space import space_line
from transfer.cli import data_root
from transfer.jobs import find_tasks, make_job, needed, obstacle, resolve
from transfer.run import finished, with_work_folder
from transfer.task import CLASSIFIER_FILE, Job, Needs, Task

FINETUNE = "imagenet_finetune"
STATES = ("done", "at work", "queued", "to do", "skipped", "failed", "left out")


@dataclass(frozen=True)
class Item:
    """One line of the plan.

    state: "done", "to do", "left out" (by the budget), or why it cannot run: "skipped" or "failed". finetune: the job
    whose classifier this one evaluates, if that has yet to run. source: what the job's estimate is made from.
    """

    job: Job
    state: str
    why: str
    finetune: Job | None = None
    source: str = ""


def make_plan(args: argparse.Namespace) -> list[Item]:
    """Every job of this call, cheapest tasks first. Reads the checkpoints strictly and inspects the data."""
    named = find_tasks(args.tasks, TASKS) if args.tasks else None
    # "folder" without a path is no task: its knobs are those of the folder that is named.
    settings = settings_by_task(args.set, [*(task for task in TASKS if not task.of), *(named or ())])
    machine = machine_of(args)
    read = cache(read_checkpoint)
    # Random weights are drawn for each seed; a file is read once.
    checkpoints = [(read(c, s if c.startswith("random:") else 0), s) for c in args.ckpt for s in args.seeds]
    for task in TASKS:
        resolve(task, "vit_base_patch16", args.recipe, settings.get(task.name, ()))  # also for tasks that are not run
    root = data_root(args, named or TASKS)
    of_each = [named or [task for task in TASKS if runs_by_default(task, one)] for one, _ in checkpoints]
    wanted = [*find_tasks([FINETUNE], TASKS), *(task for chosen in of_each for task in chosen)]
    # Tasks may share their data: it is listed once.
    found = inspect_all({task.inspect: task.name for task in wanted}, root, args.limit)

    def job_of(checkpoint: Checkpoint, seed: int, task: Task) -> Job:
        data, knobs = found[task.inspect], settings[task.name]
        own = replace(machine, processes=(args.gpus_per_job or args.gpus) * args.nodes if task.trains else 1)
        return make_job(task, checkpoint, args.recipe, knobs, data, args.out, seed, own, args.engine)

    items, run = [], set()
    for (checkpoint, seed), chosen in zip(checkpoints, of_each):
        finetune = job_of(checkpoint, seed, *find_tasks([FINETUNE], TASKS))
        coming = finetune.task in chosen and not obstacle(finetune)[0]
        run |= {task.name for task in chosen} | {FINETUNE for task in chosen if task.needs is Needs.CLASSIFIER}
        for task in chosen:
            items.append(plan_item(job_of(checkpoint, seed, task), finetune, coming))
    check_used(settings, run)
    own = {item.job.work: item for item in items}  # from scratch, checkpoints of one size are one job
    return sorted(own.values(), key=lambda item: item.job.task.cost)


def machine_of(args: argparse.Namespace) -> Machine:
    """The machine that the jobs share; UserError for numbers that do not fit together."""
    numbers = {"--gpus": args.gpus, "--jobs": args.jobs, "--gpus-per-job": args.gpus_per_job, "--nodes": args.nodes}
    for flag, number in numbers.items():
        if number is not None and number < 1:
            raise UserError(f"{flag} {number}: give 1 or more")
    if args.gpus_per_job and args.gpus_per_job > args.gpus:
        raise UserError(f"--gpus-per-job {args.gpus_per_job} is more than --gpus {args.gpus}")
    if args.launcher == "slurm":
        return machine_elsewhere(args)
    if args.nodes > 1 and not args.rdzv_endpoint:
        raise UserError(f"--nodes {args.nodes}: say where they meet, --rdzv-endpoint HOST:PORT of one of them")
    if args.nodes > 1 and ((args.gpus_per_job or args.gpus) < args.gpus or args.jobs > 1):
        flag = "--jobs" if args.jobs > 1 else "--gpus-per-job"
        raise UserError(f"{flag} with --nodes: two trainings would meet at one endpoint; leave it out")
    machine = machine_from(args, args.gpus)
    if args.jobs > 1 and machine.device == "cuda":
        raise UserError(f"--jobs {args.jobs} is for CPUs: on GPUs --gpus and --gpus-per-job say what runs side by side")
    workers = args.workers if args.workers >= 0 else default_workers(args.gpus * args.jobs)
    threads = machine.threads if args.jobs == 1 or "OMP_NUM_THREADS" in os.environ else max(1, cores() // args.jobs)
    return replace(machine, workers=workers, threads=threads)


def machine_elsewhere(args: argparse.Namespace) -> Machine:
    """The machine of a SLURM job: with GPUs unless --device cpu, whatever the one has that submits it."""
    if args.jobs > 1:
        raise UserError(f"--jobs {args.jobs} is for this machine: SLURM runs as many jobs as fit")
    args.device = "cuda" if args.device == "auto" else args.device
    asked = argparse.Namespace(**vars(args) | {"device": "cpu"})
    machine = machine_from(asked, args.gpus)
    precision = "bf16" if args.device == "cuda" and args.precision == "auto" else machine.precision
    return replace(machine, device=args.device, precision=precision)


def plan_item(job: Job, finetune: Job, coming: bool) -> Item:
    """What is known of a job now. coming: this call will run the fine-tuning that the job may wait for."""
    waits = job.task.needs is Needs.CLASSIFIER and job.checkpoint.kind != "classifier"
    job = with_classifier(job, finetune) if waits else job
    record = finished(job)
    if record is not None:
        return Item(job, "done", record.headline)
    if waits and job.parent is None and coming and job.data.status == "found":
        return Item(job, "to do", f"{job.data.detail} (after {FINETUNE})", finetune)
    state, why = obstacle(job)
    return Item(job, state or "to do", why or job.task.detail(job))


def with_classifier(job: Job, finetune: Job) -> Job:
    """The job with the classifier that imagenet_finetune left for the same checkpoint, recipe and seed, identified by
    its hash; the job as it is if there is none."""
    record = finished(finetune)
    file = finetune.work / CLASSIFIER_FILE
    if record is None or not file.exists() or CLASSIFIER_FILE not in record.artifacts:
        return job
    parent = replace(job.checkpoint, path=str(file), sha256=record.artifacts[CLASSIFIER_FILE], encoder={}, decoder={})
    return with_work_folder(replace(job, parent=parent))


def settings_by_task(settings: Sequence[str], tasks: Sequence[Task]) -> dict[str, list[str]]:
    """["a.knob=1"] -> {"a": ["knob=1"]}; UserError for a task that is not among these."""
    names = list(dict.fromkeys(task.name for task in tasks))
    found: dict[str, list[str]] = {name: [] for name in names}
    for setting in settings:
        task, equals, _ = setting.partition("=")
        task, dot, _ = task.rpartition(".")  # a folder's name may have a dot
        if not dot or not equals:
            raise UserError(f"--set {setting}: write TASK.KNOB=VALUE, as in imagenet_knn.k=10")
        if task not in found:
            raise UserError(f"--set {setting}: '{task}' is not among the tasks; {did_you_mean(task, names)}")
        found[task].append(setting[len(task) + 1 :])
    return found


def check_used(settings: dict[str, list[str]], run: Collection[str]) -> None:
    """UserError for a setting of a task that this call neither runs nor takes a classifier from: it would change
    nothing."""
    for task, given in settings.items():
        if given and task not in run:
            which = f"{task}.{given[0]}"
            raise UserError(
                f"--set {which}: this call does not run {task}; add it to --tasks, or leave the setting out"
            )


def runs_by_default(task: Task, checkpoint: Checkpoint) -> bool:
    """Whether a task runs on this kind of checkpoint when no tasks are named."""
    if task.opt_in:
        return False
    if checkpoint.kind == "classifier":
        return task.needs in (Needs.CLASSIFIER, Needs.FINE_TUNED_FILE)
    return task.needs in (Needs.ENCODER, Needs.CLASSIFIER)


def print_plan(items: Sequence[Item], args: argparse.Namespace, cost: str = "") -> None:
    """cost: what all jobs together will take."""
    print(f"plan: recipe {args.recipe}, data {items[0].job.data.root if items else args.data}, out {args.out}")
    machines = [item.job.machine for item in items]
    where = ((args.launcher == "slurm" and "SLURM") or hardware(machine) for machine in machines)
    for line in dict.fromkeys(f"{name}, {machine.precision}" for name, machine in zip(where, machines)):
        print(f"  on {line}")
    by_checkpoint: dict[tuple, list[Item]] = {}
    for item in items:
        c = item.job.checkpoint
        by_checkpoint.setdefault((c.name, c.arch, c.kind, c.sha256[:8], item.job.seed), []).append(item)
    findings = findings_by_task(items)
    told: dict[str, str] = {}
    for (name, arch, kind, sha, seed), group in by_checkpoint.items():
        print(f"  {name}: {arch}, {kind}, sha256 {sha}, seed {seed}")
        for item in group:
            job = item.job
            reason = reason_or_task(item, told) + expected(item)
            print(f"    {job.task.name:<18} {job.recipe_label:<8} {job.engine:<14} {item.state:<8} {reason}")
            for line in findings.pop(job.task.name, ()):
                print(f"      data: {line}")
    states = [item.state for item in items]
    print("  " + ", ".join(f"{states.count(state)} {state}" for state in STATES if state in states))
    if jobs := jobs_to_do(items):
        print(f"  cost: {cost}")
        print(f"  disk: {space_line(needed(jobs), args.out)}")
    sys.stdout.flush()


def reason_or_task(item: Item, told: dict[str, str]) -> str:
    """Why an item is in its state; "as TASK" for a reason that was printed for that task already. told: reason -> the
    first task that it was printed for."""
    task = told.setdefault(item.why, item.job.task.name)
    again = item.state in ("skipped", "failed") and task != item.job.task.name
    return f"as {task}" if again else item.why


def expected(item: Item) -> str:
    """What a job is expected to take, behind what is said of it; "" if that is not known."""
    job = item.job
    if job.estimated_seconds is None:
        return ""
    return f"; {duration(job.estimated_seconds)}, {hours_in_words([job])} by {item.source}"


def findings_by_task(items: Sequence[Item]) -> dict[str, list[str]]:
    """What each task's data lack; "as for TASK" in place of what is printed for an earlier task."""
    told: dict[str, str] = {}
    found: dict[str, list[str]] = {}
    for task, findings in {item.job.task.name: item.job.data.findings for item in items}.items():
        known = dict.fromkeys(f"as for {told[finding]}" for finding in findings if finding in told)
        found[task] = [*(finding for finding in findings if finding not in told), *known]
        for finding in findings:
            told.setdefault(finding, task)
    return found


def jobs_to_do(items: Sequence[Item]) -> list[Job]:
    return [item.job for item in items if item.state == "to do"]
