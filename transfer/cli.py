"""What every task script and benchmarks/run_all.py share: the flags, the making of jobs, the reasons not to run one."""

import argparse
import hashlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mae_core import distributed
from mae_core.checkpoint import Checkpoint, read_checkpoint
from mae_core.errors import UserError
from mae_core.machine import Machine, add_machine_flags, machine_from, non_negative_int
from mae_core.settings import differences, override, unknown
from mae_core.vit import variant_in_words, vit_arguments
from transfer.checks import objections
from transfer.data.findings import Data, guarded
from transfer.pyramid import patch_side
from transfer.space import check_space
from transfer.task import Job, Record, Task, describe, done, run_job, work_folder, write_record

RECIPES = ("paper", "mini")  # of every task


def add_common_flags(parser: argparse.ArgumentParser, tasks: Sequence[Task]) -> None:
    """--recipe, --data, --out, --engine where a task has a choice, and the machine's flags."""
    parser.add_argument("--recipe", default="paper", choices=RECIPES, help="default: paper")
    parser.add_argument(
        "--data", type=Path, help="root of the datasets (default: $MAE_TRANSFER_DATA, else ./datasets; mini: generated)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results"), help="folder for runs and tables (default: results)"
    )
    several = {task.name: list(task.engines) for task in tasks if len(task.engines) > 1}
    names = list(dict.fromkeys(name for engines in several.values() for name in engines))
    which = "; ".join(f"{task}: the first installed of {', '.join(engines)}" for task, engines in several.items())
    if several:
        parser.add_argument("--engine", default="auto", choices=("auto", *names), help=f"default: auto ({which})")
    else:
        parser.set_defaults(engine="auto")
    add_machine_flags(parser)


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # a module that another one has barred
        return False


def choose_engine(task: Task, asked: str = "auto") -> str:
    """The engine that a task runs on: the one asked for where the task has it, else the first that is installed, else
    the first. UserError if the one asked for is not installed."""
    if asked in task.engines:
        if not installed(task.engines[asked]):
            raise UserError(f"--engine {asked}: it is not installed here; {task.install}")
        return asked
    return next((name for name, module in task.engines.items() if installed(module)), next(iter(task.engines)))


def data_root(args: argparse.Namespace, tasks: Sequence[Task]) -> Path:
    """The root of the datasets; the mini recipe without --data gets the generated miniature, written if need be."""
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is a file: give a folder")
    if args.data is not None:
        if not args.data.is_dir():
            raise UserError(f"--data {args.data} is not a folder")
        return readable(args.data)
    if args.recipe != "mini":
        root = Path(os.environ.get("MAE_TRANSFER_DATA", "datasets"))
        if not root.is_dir() and not all(task.path for task in tasks):
            named = "$MAE_TRANSFER_DATA" if "MAE_TRANSFER_DATA" in os.environ else "--data"
            raise UserError(
                f"no data: there is no folder {root}; let {named} name the folder that holds imagenet/, coco/ and the "
                "others (docs/data.md), or take --recipe mini, which generates its own"
            )
        return readable(root)
    root = args.out / "data"
    if distributed.is_main():
        for write in dict.fromkeys(task.miniature for task in tasks):
            write(root)
    distributed.barrier()
    return root


def readable(root: Path) -> Path:
    if root.is_dir() and not os.access(root, os.R_OK | os.X_OK):
        raise UserError(f"no data: {root} may not be read by this user: change its permissions (chmod)")
    return root


def find_tasks(names: Sequence[str], tasks: Sequence[Task]) -> list[Task]:
    """The tasks of these names; "NAME:PATH" is the task NAME on that folder."""
    known, found = {task.name: task for task in tasks}, []
    for name in dict.fromkeys(names):
        family, colon, path = name.partition(":")
        if family not in known or (colon and not known[family].of):
            raise unknown("task", name, known)
        if known[family].of and not path:
            raise UserError(f"--tasks {name}: say which, as {family}:/path/to/images")
        task = known[family].of(path) if colon else known[family]
        if other := next((t for t in found if t.name == task.name and t.path != task.path), None):
            raise UserError(
                f"--tasks: {other.path} and {task.path} would both be called {task.name}: link one of them under "
                "another name"
            )
        found.append(task)
    return list({task.name: task for task in found}.values())


def task_argument(task: Task) -> str:
    """What find_tasks makes this task of."""
    return f"{task.name.partition(':')[0]}:{task.path}" if task.path else task.name


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
    if task.from_scratch:
        checkpoint = scratch_of(checkpoint.arch, seed)
    task, recipe_name, recipe, overrides = resolve(task, checkpoint.arch, recipe_name, settings)
    if not task.plain_vit:
        vit_arguments(checkpoint.arch, recipe.image_size or None)  # refuses a size that the patches do not divide
    elif recipe.image_size % (patch := patch_side(checkpoint.arch)):
        raise UserError(f"image_size={recipe.image_size}: {checkpoint.arch} has patches of {patch} px in {task.name}")
    engine = choose_engine(task, engine)
    job = Job(task, checkpoint, recipe, recipe_name, overrides, data, Path(), seed, engine, machine, parent)
    return place(job, out)


def resolve(task: Task, arch: str, name: str, settings: Sequence[str]) -> tuple[Task, str, Any, dict[str, Any]]:
    """The recipe with its settings applied: (the task with that recipe's sources, the recipe's name, the recipe, what
    differs from it). The setting recipe=NAME takes one of the task's own recipes instead of that of --recipe."""
    own = [setting.removeprefix("recipe=") for setting in settings if setting.startswith("recipe=")]
    if own:
        name = own[-1]
        if name in RECIPES:
            raise UserError(f"--set recipe={name}: --recipe chooses that, for all tasks")
        task = replace(task, sources=partial(task.sources, name=name))
    settings = [setting for setting in settings if not setting.startswith("recipe=")]
    try:
        return task, name, *override(task.recipe(arch, name), settings)
    except UserError as e:
        raise UserError(f"{task.name}: {e}") from None


def scratch_of(arch: str, seed: int) -> Checkpoint:
    """Random weights that are called by their size, so that all checkpoints of one size share what starts from them."""
    name = f"scratch:{arch}"
    sha256 = hashlib.sha256(name.encode()).hexdigest()
    return replace(read_checkpoint(f"random:{arch}", seed), name=name, sha256=sha256)


def place(job: Job, out: Path) -> Job:
    """The job with the work folder that its identity decides."""
    work = work_folder(out, job.checkpoint, job.task.name, job.recipe_label, job.seed, job.identity())
    return replace(job, work=work)


def obstacle(job: Job) -> tuple[str, str]:
    """("skipped" or "failed", why) where the job cannot run at all; ("", "") where it can. UserError where it cannot
    because of a knob or flag that the call gave."""
    task, kind = job.task, job.checkpoint.kind
    if task.needs == "encoder" and kind == "classifier":
        return "skipped", f"{job.checkpoint.name} is a fine-tuned classifier, not a pre-trained encoder"
    if task.plain_vit and not job.checkpoint.plain:
        return "skipped", f"not a plain ViT: {job.checkpoint.name} has {variant_in_words(job.checkpoint.variant)}"
    if not installed(task.engines[job.engine]):
        return "skipped", f"{job.engine} is not installed here; {task.install}"
    if job.data.status == "missing":
        return "skipped", job.data.detail
    if job.data.status == "incomplete":
        return "failed", job.data.detail
    for knob, why in objections(job):
        if knob.startswith("--") or knob in job.overrides:
            raise UserError(f"{task.name}: {why}")
        return "failed", why
    if task.needs == "fine-tuned file" and "head.weight" not in job.checkpoint.classifier:
        return "skipped", f"{job.checkpoint.name} has no head: give a fine-tuned classifier as --ckpt"
    if task.needs == "classifier" and kind != "classifier" and job.parent is None:
        where = "same checkpoint, recipe and seed, with its classifier.safetensors"
        return "skipped", f"needs imagenet_finetune ({where}), or a fine-tuned file as --ckpt"
    return "", ""


def finished(job: Job) -> Record | None:
    """The record that makes running the job unnecessary."""
    return done(job.work, job.identity())


def settle(job: Job) -> Record | None:
    """The record of a job that is done or cannot run (the latter is written now); None if it is to be run."""
    record = finished(job)
    if record is None:
        status, reason = obstacle(job)
        if status:
            record = describe(job, status=status, reason=reason)
            if distributed.is_main():
                write_record(record, job.work)
    return record


def headline(record: Record) -> str:
    """ "imagenet_finetune: top1 83.66 +- 0.17" or "imagenet_a: skipped: ..."."""
    if record.status != "ok":
        return f"{record.task}: {record.status}: {record.reason}"
    error = f" ± {record.stderr[record.metric]:.2f}" if record.metric in record.stderr else ""
    return f"{record.task}: {record.metric} {record.metrics[record.metric]:.2f}{error}"


def main(tasks: Sequence[Task], arguments: list[str] | None = None) -> int:
    """Run some of a family's tasks on one checkpoint. Exit code: 0 all gave a number, 1 not all, 2 a wrong call."""
    parser = argparse.ArgumentParser(prog=f"python -m {tasks[0].module}")
    parser.add_argument(
        "--task", nargs="+", action="extend", required=True, metavar="TASK", help=", ".join(t.name for t in tasks)
    )
    parser.add_argument("--ckpt", required=True, help="checkpoint file or folder, hf:NAME, timm:NAME or random:ARCH")
    parser.add_argument("--seed", type=non_negative_int, default=0)
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KNOB=VALUE", help="override recipe knobs"
    )
    if any(task.needs == "classifier" for task in tasks):
        parser.add_argument("--classifier", type=Path, help="classifier.safetensors that imagenet_finetune left")
    add_common_flags(parser, tasks)
    args = parser.parse_args(arguments)
    try:
        chosen = find_tasks(args.task, tasks)
        machine = machine_from(args)
        with distributed.process_group(machine.device) as device:
            records = run_tasks(chosen, args, replace(machine, device=device))
    except (UserError, OSError) as e:  # OSError: a full or read-only disk
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0 if all(record.status == "ok" for record in records) else 1


def classifier_of(checkpoint: Checkpoint, path: Path, args: Any) -> Checkpoint:
    """The classifier in a file; UserError unless imagenet_finetune made it of this checkpoint, recipe and seed: its
    numbers will stand in this checkpoint's row."""
    classifier = read_checkpoint(path)
    wanted = {"encoder_sha256": checkpoint.sha256, "recipe": args.recipe, "seed": str(args.seed)}
    changed = differences({name: classifier.meta.get(name) for name in wanted}, wanted)
    if changed:
        raise UserError(
            f"--classifier {path} is not what imagenet_finetune made of {checkpoint.name} ({'; '.join(changed)}): "
            "give that one, or evaluate this one as --ckpt"
        )
    return classifier


def run_tasks(tasks: Sequence[Task], args: Any, machine: Machine) -> list[Record]:
    checkpoint = read_checkpoint(args.ckpt, args.seed)
    classifier = getattr(args, "classifier", None)
    parent = classifier_of(checkpoint, classifier, args) if classifier else None
    root = data_root(args, tasks)
    records = []
    for task in tasks:
        own = parent if task.needs == "classifier" and checkpoint.kind != "classifier" else None
        data = guarded(task.look, root)
        job = make_job(task, checkpoint, args.recipe, args.set, data, args.out, args.seed, machine, args.engine, own)
        record = settle(job)
        if record is None:
            check_space([job], args.out)
            if distributed.is_main():
                for finding in data.findings:
                    print(f"{task.name}: data: {finding}", flush=True)
            record = run_job(job)
        if distributed.is_main():
            print(f"{headline(record)} ({job.work / 'record.json'})", flush=True)
        records.append(record)
    return records
