"""The command line of every task family: its flags, and its main, which runs some of its tasks on one checkpoint."""

import argparse
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from mae_core import distributed
from mae_core.checkpoint import read_checkpoint
from mae_core.command_line import answered
from mae_core.errors import UserError
from mae_core.flags import add_common_flags, add_limit_flag, seed
from mae_core.machine import Machine, commit, machine_from
from mae_core.settings import finite
from mae_core.stopping import stop_on_signals
from transfer.data.findings import Data, guarded, limited
from transfer.jobs import cached_or_skipped, check_space, classifier_of, find_tasks, make_job
from transfer.run import run_job
from transfer.task import RECORD_FILE, Needs, Record, Task


def data_root(args: argparse.Namespace, tasks: Sequence[Task]) -> Path:
    """The root of the datasets. The mini recipe without --data uses the miniature, which is generated if missing."""
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is a file: give a folder")
    if args.data is None and args.recipe == "mini":
        root = args.out / "data"
        if distributed.is_main():
            for write in dict.fromkeys(task.miniature for task in tasks):
                write(root)
        distributed.barrier()
        return root
    root = args.data or Path(os.environ.get("MAE_TRANSFER_DATA", "datasets"))
    if args.data and not root.is_dir():
        raise UserError(f"--data {root} is not a folder")
    if not root.is_dir() and not all(task.path for task in tasks):
        named = "$MAE_TRANSFER_DATA" if "MAE_TRANSFER_DATA" in os.environ else "--data"
        raise UserError(
            f"no data: there is no folder {root}; set {named} to the folder that holds imagenet/, coco/ and the "
            "others (docs/data.md), or use --recipe mini, which generates its own data"
        )
    if root.is_dir() and not os.access(root, os.R_OK | os.X_OK):
        raise UserError(f"no data: {root} may not be read by this user: change its permissions (chmod)")
    return root


def found_before(text: str) -> dict[str, Data]:
    """{task: its Data} on a command line, as `task_command` of benchmarks writes it."""
    try:
        return {name: Data(**{**data, "findings": tuple(data["findings"])}) for name, data in json.loads(text).items()}
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise argparse.ArgumentTypeError(f"it is not what a plan writes: {e}") from None


@distributed.ends_alone
def main(tasks: Sequence[Task], arguments: list[str] | None = None) -> int:
    """Run some of a family's tasks on one checkpoint. Exit code: 0 if all gave a number, 1 if not, 2 for a
    wrong call, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog=f"python -m {tasks[0].module}")
    parser.add_argument(
        "--task", nargs="+", action="extend", required=True, metavar="TASK", help=", ".join(t.name for t in tasks)
    )
    parser.add_argument("--ckpt", required=True, help="checkpoint file or folder, hf:NAME, timm:NAME or random:ARCH")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KNOB=VALUE", help="override recipe knobs"
    )
    estimate_help = "wall time that a plan expects of each task, for its record"
    parser.add_argument("--estimated-seconds", nargs="+", type=finite, default=[], metavar="S", help=estimate_help)
    found_help = "what a plan has found of the data of tasks that look through them again as they run"
    parser.add_argument("--found", type=found_before, default={}, metavar="JSON", help=found_help)
    if any(task.needs is Needs.CLASSIFIER for task in tasks):
        parser.add_argument("--classifier", type=Path, help="classifier.safetensors of imagenet_finetune")
    add_limit_flag(parser)
    add_common_flags(parser, {task.name: list(task.engines) for task in tasks if len(task.engines) > 1})
    args = parser.parse_args(arguments)
    return answered(partial(run, tasks, args), "stopped; the same command goes on from here")


def run(tasks: Sequence[Task], args: argparse.Namespace) -> int:
    commit()  # of the code that runs: the checkout may be updated while the data are looked at
    if distributed.world_size() == 1:  # torchrun ends its processes itself
        stop_on_signals()
    chosen = find_tasks(args.task, tasks)
    machine = machine_from(args)
    with distributed.process_group(machine.device) as device:
        records = run_tasks(chosen, args, replace(machine, device=device))
    return 0 if all(record.status == "ok" for record in records) else 1


def run_tasks(tasks: Sequence[Task], args: argparse.Namespace, machine: Machine) -> list[Record]:
    checkpoint = read_checkpoint(args.ckpt, args.seed)
    classifier = getattr(args, "classifier", None)
    parent = classifier_of(checkpoint, classifier, args.recipe, args.seed) if classifier else None
    root = data_root(args, tasks)
    records = []
    expected = itertools.chain(args.estimated_seconds, itertools.repeat(None))
    for task, seconds in zip(tasks, expected):
        evaluated = parent if task.needs is Needs.CLASSIFIER and checkpoint.kind != "classifier" else None
        data = args.found.get(task.name) or limited(guarded(task.inspect, root), args.limit)
        job = make_job(
            task, checkpoint, args.recipe, args.set, data, args.out, args.seed, machine, args.engine, evaluated
        )
        job = replace(job, estimated_seconds=seconds, tracker=args.tracker)
        record = cached_or_skipped(job)
        if record is None:
            check_space([job], args.out)
            if distributed.is_main():
                for finding in job.data.findings:
                    print(f"{task.name}: data: {finding}", flush=True)
            record = run_job(job)
        if distributed.is_main():
            print(f"{record.headline} ({job.work / RECORD_FILE})", flush=True)
        records.append(record)
    return records
