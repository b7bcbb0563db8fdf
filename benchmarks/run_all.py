"""One checkpoint through every transfer experiment, to the paper's tables.

python benchmarks/run_all.py --ckpt mae_vit_l.pth
"""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

try:
    from benchmarks.budget import budget, cost_line, with_estimates, within
    from benchmarks.cost import read_rates
    from benchmarks.launch.local import expected_time, run_units
    from benchmarks.launch.progress import with_progress
    from benchmarks.launch.slurm import submit
    from benchmarks.launch.units import export, make_units
    from benchmarks.measure import measure
    from benchmarks.plan import Item, jobs_to_do, make_plan, print_plan
    from benchmarks.report import report
    from benchmarks.suite import TASKS
    from mae_core.command_line import answered, describe_os_error
    from mae_core.distributed import check_alone
    from mae_core.errors import UserError
    from mae_core.machine import named_path, seed
    from mae_core.stopping import stop_on_signals
    from transfer.cli import add_common_flags, add_limit_flag
    from transfer.data.shipped import shipped
    from transfer.jobs import check_space
    from transfer.task import RECORD_FILE, Record
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
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs shared out among the jobs (default: 1)")
    parser.add_argument("--gpus-per-job", type=int, metavar="M", help="GPUs of each training (default: all)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="on a CPU: jobs side by side (default: 1)")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines of each training (default: 1)")
    endpoint_help = "where --nodes meet; start the same command on each"
    parser.add_argument("--rdzv-endpoint", default="", metavar="HOST:PORT", help=endpoint_help)
    parser.add_argument(
        "--launcher", default="local", choices=("local", "slurm"), help="where jobs run (default: local)"
    )
    slurm_help = "of each SLURM job: partition, account, qos, time, cpus_per_task, mem, ..."
    parser.add_argument("--slurm", **several, default=[], metavar="KEY=VALUE", help=slurm_help)
    parser.add_argument("--plan", "--dry-run", action="store_true", help="print what would be done, and stop")
    measure_help = "with --plan: run a little of each kind of job first, to estimate their time from that"
    parser.add_argument("--measure", action="store_true", help=measure_help)
    budget_help = "run what fits into so many GPU hours (on a CPU core hours), cheapest first: 48h, 90m, 2d"
    parser.add_argument("--budget", type=budget, metavar="HOURS", help=budget_help)
    json_help = "print the plan as JSON, with a command for each job, or write it to FILE"
    parser.add_argument("--json", nargs="?", const="-", type=named_path, metavar="FILE", help=json_help)
    parser.add_argument("--list", "--ls", action="store_true", help="list the tasks, and stop")
    add_limit_flag(parser)
    add_common_flags(parser, TASKS)
    args = parser.parse_args(arguments)
    if args.measure and not args.plan:
        parser.error("argument --measure: it goes with --plan")
    args.ckpt = list(dict.fromkeys(args.ckpt or [mae_mini(), "random:vit_mini_patch8"]))
    args.seeds = list(dict.fromkeys(args.seeds or [0]))
    return args


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
    for task in TASKS:
        direction = "higher" if task.higher_is_better else "lower"
        print(f"{task.name:<18} {task.title:<50} {task.metric} ({direction} is better); needs: {task.needs.value}")


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    stop_on_signals()
    return answered(partial(plan_and_run, args), "stopped; the same command goes on from here")


def check_launcher(args: argparse.Namespace) -> None:
    """UserError for flags that do not go together."""
    slurm = args.launcher == "slurm"
    if args.slurm and not slurm:
        raise UserError(f"--slurm {args.slurm[0]}: it is for --launcher slurm")
    for flag, given in {"--measure": args.measure, "--budget": args.budget}.items():
        if given and (slurm or args.nodes > 1):
            raise UserError(f"{flag} knows only this machine: leave it out with --launcher slurm and --nodes")


def plan_and_run(args: argparse.Namespace) -> int:
    if args.list:
        list_tasks()
        return 0
    check_alone(", with --gpus N")
    check_launcher(args)
    items = make_plan(args)
    if args.measure:
        measure([item.job for item in items if item.state == "to do" and not item.finetune], args)
    if args.launcher == "local":  # elsewhere it is not known what the jobs will run on
        items = with_estimates(items, read_rates(args.out, [item.job for item in items]))
    if args.budget:
        items = within(items, args.budget)
    units = make_units([item for item in items if item.state != "left out"], args.nodes)
    if args.json:
        export(units, args)
        return 2 if nothing_can_run(items) else 0
    to_do = make_units([item for item in items if item.state == "to do"], args.nodes)
    local = args.launcher == "local"
    cost = cost_line(items, *expected_time(to_do, args)) if local else "not known before it runs on SLURM's machines"
    print_plan(with_progress(items, args) if args.plan else items, args, cost)
    check_space(jobs_to_do(items), args.out)
    if args.plan:
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
