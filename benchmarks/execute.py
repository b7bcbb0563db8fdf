"""What run_all.py does once its command line is read: plan the jobs, run them, write the tables."""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

import mae_core
import transfer
from benchmarks.budget import cost_line, with_estimates, within
from benchmarks.cost import read_rates
from benchmarks.launch.local import expected_time, run_units
from benchmarks.launch.progress import with_progress
from benchmarks.launch.slurm import submit
from benchmarks.launch.units import export, make_units
from benchmarks.measure import measure
from benchmarks.plan import Item, jobs_to_do, make_plan, print_plan
from benchmarks.report import report
from benchmarks.suite import TASKS
from mae_core.command_line import describe_os_error
from mae_core.distributed import check_alone
from mae_core.errors import UserError
from mae_core.remembered import memory_file, remembering
from transfer.jobs import check_space
from transfer.task import RECORD_FILE, Record

PACKAGES = [Path(str(package.__file__)).parent for package in (mae_core, transfer)]  # on whose sources FLOPs depend


def check_launcher(args: argparse.Namespace) -> None:
    """UserError for flags that do not go together."""
    slurm = args.launcher == "slurm"
    if args.slurm and not slurm:
        raise UserError(f"--slurm {args.slurm[0]}: it is for --launcher slurm")
    for flag, given in {"--measure": args.measure, "--budget": args.budget}.items():
        if given and (slurm or args.nodes > 1):
            raise UserError(f"{flag} knows only this machine: leave it out with --launcher slurm and --nodes")


def plan_and_run(args: argparse.Namespace) -> int:
    check_alone(", with --gpus N")
    check_launcher(args)
    with remembering(memory_file(), PACKAGES):
        items = planned(args)
        units = make_units([item for item in items if item.state != "left out"], args.nodes)
        if args.json:
            export(units, args)
        else:
            show(items, args)
    if args.plan or args.json:
        return 2 if nothing_can_run(items) else 0
    if args.launcher == "slurm":
        return submit(units, args)
    try:
        records = run_units(units, args)
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


def planned(args: argparse.Namespace) -> list[Item]:
    """The jobs of this call, with what they are expected to take."""
    items = make_plan(args)
    if args.measure:
        measure([item.job for item in items if item.state == "to do" and not item.finetune], args)
    if args.launcher == "local":  # elsewhere it is not known what the jobs will run on
        items = with_estimates(items, read_rates(args.out, [item.job for item in items]))
    return within(items, args.budget) if args.budget else items


def show(items: Sequence[Item], args: argparse.Namespace) -> None:
    """Print the plan; UserError if the jobs' files would not fit."""
    to_do = make_units([item for item in items if item.state == "to do"], args.nodes)
    local = args.launcher == "local"
    cost = cost_line(items, *expected_time(to_do, args)) if local else "not known before it runs on SLURM's machines"
    print_plan(with_progress(items, args) if args.plan else items, args, cost)
    check_space(jobs_to_do(items), args.out)


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


def nothing_can_run(items: Sequence[Item]) -> bool:
    return all(item.state in ("skipped", "failed", "left out") for item in items)


def exit_code(records: Sequence[Record], items: Sequence[Item], named: bool) -> int:
    """0: all gave a number, or were skipped or left out without being named; 1: one failed, or a named one was skipped
    or left out; 2: nothing could run."""
    if nothing_can_run(items):
        return 2
    bad = {"failed", "skipped", "left out"} if named else {"failed"}
    states = {record.status for record in records} | {item.state for item in items if item.state == "left out"}
    return 1 if states & bad else 0


def list_tasks() -> None:
    names, titles = (max(map(len, column)) for column in zip(*((task.name, task.title) for task in TASKS)))
    for task in TASKS:
        direction = "higher" if task.higher_is_better else "lower"
        line = f"{task.name:<{names}}  {task.title:<{titles}}  {task.metric} ({direction} is better)"
        print(f"{line}; needs: {task.needs.value}")
