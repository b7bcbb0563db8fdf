"""One checkpoint through every transfer experiment, to the paper's tables.

python benchmarks/run_all.py --ckpt mae_vit_l.pth
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

LACKS = "run it with the Python that has this project installed: .venv/bin/python after `make install`"
try:
    from benchmarks.imports import import_late_ones, importing
    from benchmarks.warm import fork_server, surroundings, waiting
    from mae_core.command_line import answered
    from mae_core.errors import UserError
    from mae_core.flags import add_common_flags, add_limit_flag, named_path, seed
    from mae_core.stopping import stop_on_signals
    from transfer.data.shipped import shipped
    from transfer.detection.engines import ENGINES
except ModuleNotFoundError as e:
    print(f"error: {sys.executable} lacks {e.name}: {LACKS}", file=sys.stderr)
    sys.exit(2)

HOURS = {"m": 1 / 60, "h": 1.0, "d": 24.0}


def budget(text: str) -> float:
    """Hours on a command line: "90m", "48h" or "2d"."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([mhd])", text)
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text[:40]} is no budget: give GPU hours as 48h, 90m or 2d")
    return float(found[1]) * HOURS[found[2]]


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
    add_common_flags(parser, {"coco": list(ENGINES)})
    args = parser.parse_args(arguments)
    if args.measure and not args.plan:
        parser.error("argument --measure: it goes with --plan")
    args.ckpt = list(dict.fromkeys(args.ckpt or [mae_mini(), "random:vit_mini_patch8"]))
    args.seeds = list(dict.fromkeys(args.seeds or [0]))
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    stop_on_signals()
    return answered(partial(run, args), "stopped; the same command goes on from here")


def run(args: argparse.Namespace) -> int:
    """Only now what takes seconds to import; if tasks are to run here, as they need it, and in a process of its own."""
    runs = sys.platform == "linux" and args.launcher == "local" and not (args.plan or args.json or args.list)
    forks = runs and "torch" not in sys.modules  # else it may have computed already
    if forks:
        os.environ.update(waiting(os.environ))
    try:
        with importing():
            from benchmarks.execute import list_tasks, plan_and_run

            if forks:
                import_late_ones()
    except ModuleNotFoundError as e:
        raise UserError(f"{sys.executable} lacks {e.name}: {LACKS}") from None
    if forks:
        fork_server(surroundings())
    if args.list:
        list_tasks()
        return 0
    return plan_and_run(args)


if __name__ == "__main__":
    sys.exit(main())
