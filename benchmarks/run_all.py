"""One checkpoint through every transfer experiment, to the paper's tables.

python benchmarks/run_all.py --ckpt mae_vit_l.pth
"""

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

try:
    from benchmarks.children import run_child, take_out, task_command
    from benchmarks.plan import Item, jobs_to_do, make_plan, print_plan, with_classifier
    from benchmarks.report import report
    from benchmarks.suite import TASKS
    from mae_core.command_line import answered, describe_os_error
    from mae_core.distributed import check_alone
    from mae_core.errors import UserError
    from mae_core.lock import Lock
    from mae_core.machine import seed
    from mae_core.progress import duration
    from mae_core.stopping import stop_on_signals
    from transfer.cli import add_common_flags
    from transfer.data.shipped import shipped
    from transfer.jobs import cached_or_skipped
    from transfer.run import describe, read_record, shortened, slug, write_record
    from transfer.space import check_space
    from transfer.task import RECORD_FILE, Job, Needs, Record
except ModuleNotFoundError as e:
    where = "run it with the Python that has this project installed: .venv/bin/python after `make install`"
    print(f"error: {sys.executable} lacks {e.name}: {where}", file=sys.stderr)
    sys.exit(2)


def mae_mini() -> str:
    """The path of the shipped checkpoint; below the current folder a relative one, as records name it."""
    path = shipped("miniature/mae_mini.safetensors")
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    several: dict[str, Any] = {"nargs": "+", "action": "extend"}
    ckpt_help = "files, folders, hf:NAME, timm:NAME or random:ARCH (default: mae_mini, and random weights of its size)"
    parser.add_argument("--ckpt", **several, metavar="FILE", help=ckpt_help)
    parser.add_argument("--tasks", **several, metavar="TASK", help="only these (default: all that fit the checkpoint)")
    parser.add_argument("--seeds", **several, type=seed, help="run every task once per seed (default: 0)")
    parser.add_argument("--set", **several, default=[], metavar="TASK.KNOB=VALUE", help="override recipe knobs")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="processes per task, by torchrun (default: 1)")
    parser.add_argument("--plan", action="store_true", help="print what would be done, and stop")
    parser.add_argument("--list", action="store_true", help="list the tasks, and stop")
    add_common_flags(parser, TASKS)
    args = parser.parse_args(arguments)
    args.ckpt = list(dict.fromkeys(args.ckpt or [mae_mini(), "random:vit_mini_patch8"]))
    args.seeds = list(dict.fromkeys(args.seeds or [0]))
    return args


def group_by_process(items: Sequence[Item]) -> list[list[Item]]:
    """The items of each child process: the data sets that one classifier is evaluated on share one, so that it is
    loaded once; any other item has its own."""
    groups: dict[tuple, list[Item]] = {}
    for item in items:
        job = item.job
        alone = job.task.name if job.task.needs is Needs.ENCODER or job.overrides else ""
        groups.setdefault((job.checkpoint.path, job.seed, job.task.module, alone), []).append(item)
    return list(groups.values())


def run(items: Sequence[Item], args: argparse.Namespace, lock: Lock) -> list[Record]:
    """Run the plan; one Record for every item."""
    records = []
    groups = group_by_process(items)
    for number, group in enumerate(groups, 1):
        position = f"[{number}/{len(groups)}]"
        todo = []
        for item in group:
            # The fine-tuning that it waited for may have run by now.
            job = with_classifier(item.job, item.finetune) if item.finetune else item.job
            record = cached_or_skipped(job)
            if record is None:
                (job.work / RECORD_FILE).unlink(missing_ok=True)  # of an earlier attempt that failed
                todo.append(job)
            else:
                records.append(record)
                print(f"{position} {job.checkpoint.name} {record.headline}", flush=True)
        while todo:
            names, started = [job.task.name for job in todo], time.monotonic()
            checkpoint, seed = todo[0].checkpoint.name, todo[0].seed
            name = f"{slug(checkpoint)}-{'-'.join(names)}-seed{seed}"
            log = args.out / "logs" / f"{shortened(name)}.log"
            title = f"{position} {checkpoint} {' '.join(names)} seed {seed}"
            code, last = run_child(task_command(todo, args), log, lock, title)
            took = duration(time.monotonic() - started)
            # A child that ended early took the rest of its group with it: the next one runs what is left of it.
            left = [job for job in todo if not (job.work / RECORD_FILE).exists()]
            again = left if len(left) < len(todo) else []
            for job in (job for job in todo if job not in again):
                record = read_or_write_failure(job, code, last, log)
                records.append(record)
                start = "\r\033[K" if sys.stdout.isatty() else ""
                print(f"{start}{position} {checkpoint} {record.headline} (seed {seed}, {took})", flush=True)
            todo = again
    return records


def read_or_write_failure(job: Job, code: int, last: str, log: Path) -> Record:
    """The record the child wrote, or a failed one in its place if it died without writing any."""
    path = job.work / RECORD_FILE
    if path.exists():
        return read_record(path)
    died = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    reason = f"its process ended with {died} and left no record; last line: {last} (log: {log})"
    record = describe(job, status="failed", reason=reason)
    write_record(record, job.work)
    return record


def nothing_can_run(items: Sequence[Item]) -> bool:
    return all(item.state in ("skipped", "failed") for item in items)


def exit_code(records: Sequence[Record], items: Sequence[Item], named: bool) -> int:
    """0: all gave a number, or were skipped without being named; 1: one failed, or a named one was skipped; 2: nothing
    could run."""
    if nothing_can_run(items):
        return 2
    bad = {"failed", "skipped"} if named else {"failed"}
    return 1 if any(record.status in bad for record in records) else 0


def list_tasks() -> None:
    for task in TASKS:
        direction = "higher" if task.higher_is_better else "lower"
        print(f"{task.name:<18} {task.title:<50} {task.metric} ({direction} is better); needs: {task.needs.value}")


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    stop_on_signals()
    return answered(partial(plan_and_run, args), "stopped; the same command goes on from here")


def plan_and_run(args: argparse.Namespace) -> int:
    if args.list:
        list_tasks()
        return 0
    check_alone(", with --gpus N")
    items = make_plan(args)
    print_plan(items, args)
    check_space(jobs_to_do(items), args.out)
    if args.plan:
        return 2 if nothing_can_run(items) else 0
    lock = take_out(args.out)
    try:
        records = run(items, args, lock)
    except (KeyboardInterrupt, BrokenPipeError):
        with contextlib.suppress(BrokenPipeError):
            if any(args.out.glob(f"runs/**/{RECORD_FILE}")):
                write_report(args.out)
        raise
    except (UserError, OSError) as e:
        what = describe_os_error(e) if isinstance(e, OSError) else e
        print(f"error: {what}; the same command goes on from here", file=sys.stderr)
        return 1
    written = write_report(args.out)
    return exit_code(records, items, args.tasks is not None) or (0 if written else 1)


def write_report(out: Path) -> bool:
    """Write the tables of all records in `out` and print their paths; False, after printing why, if a record could not
    be read or a table not be written."""
    try:
        written = report(out)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return False
    print("tables: " + ", ".join(str(path) for path in written), flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
