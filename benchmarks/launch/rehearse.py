"""How well a plan fills a machine: its jobs as processes that only sleep, on the pool that runs the real ones.

python -m benchmarks.launch.rehearse plan.json --gpus 8
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from benchmarks.children import Child
from benchmarks.launch.local import Running, Suite, run_suite
from benchmarks.launch.units import Unit
from mae_core.command_line import answered
from mae_core.errors import UserError
from mae_core.flags import program
from mae_core.writing import read_object


class Rehearsal(Suite):
    """Units that sleep; seconds: how long an hour lasts."""

    logs: Path
    seconds: float

    def start(self, unit: Unit) -> None:
        if unit.gpus > len(self.free):
            return
        slots, self.free = self.free[: unit.gpus], self.free[unit.gpus :]
        child = Child(["sleep", f"{unit.weight * self.seconds:.4f}"], self.logs / "log")
        self.running.append(Running(unit, [], slots, child, f"job of {unit.weight:.2f} h", time.monotonic()))
        self.waiting.remove(unit)

    def take(self, running: Running, code: int) -> None:
        self.end(running.unit)


def units_of(path: Path) -> list[Unit]:
    """The units of a plan that `--json` wrote, their weights in hours; UserError if a job's hours are not known."""
    try:
        jobs: list[dict[str, Any]] = read_object(path)["jobs"]
        units = {job["id"]: Unit([], job["gpus"], weight=job["hours"]) for job in jobs}
        for job in jobs:
            units[job["id"]].after = [units[name] for name in job["after"]]
        unknown = [job["id"] for job in jobs if not isinstance(job["hours"], int | float)]
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise UserError(f"{path} is no plan ({type(e).__name__}: {e}): write one with run_all.py --json FILE") from None
    if unknown or not units:
        raise UserError(f"{path}: how long {', '.join(unknown) or 'nothing'} takes is not known: plan with --measure")
    return list(units.values())


def shortest(units: Sequence[Unit], gpus: int) -> float:
    """Hours below which no order can be: those of all GPUs together, and of the longest chain of jobs."""

    @cache
    def chain(unit: Unit) -> float:
        return unit.weight + max(map(chain, unit.after), default=0.0)

    return max(sum(unit.gpus * unit.weight for unit in units) / gpus, *map(chain, units))


def rehearse(units: Sequence[Unit], gpus: int, seconds: float) -> tuple[float, float]:
    """Hours that the units took, asleep, and that they must take. seconds: how long all should last at least."""
    if too_large := [unit.gpus for unit in units if unit.gpus > gpus]:
        raise UserError(f"--gpus {gpus}: a job of the plan wants {max(too_large)}")
    bound = shortest(units, gpus)
    with tempfile.TemporaryDirectory() as folder:
        suite = Rehearsal(argparse.Namespace(), list(units), list(range(gpus)), gpus=True)
        suite.logs, suite.seconds = Path(folder), seconds / bound
        started = time.monotonic()
        run_suite(suite)
        return (time.monotonic() - started) / suite.seconds, bound


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=program("benchmarks.launch.rehearse"), description=__doc__.splitlines()[0])
    parser.add_argument("plan", type=Path, help="what run_all.py --json FILE wrote")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="of the machine")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long it should last (default: 60)")
    return answered(partial(run, parser.parse_args(arguments)))


def run(args: argparse.Namespace) -> int:
    if args.gpus < 1 or not 0 < args.seconds < 1e6:
        raise UserError(f"--gpus {args.gpus} --seconds {args.seconds}: both must be more than 0")
    units = units_of(args.plan)
    hours, bound = rehearse(units, args.gpus, args.seconds)
    work = sum(unit.gpus * unit.weight for unit in units)
    print(f"{len(units)} jobs, {work:.4g} GPU hours on {args.gpus} GPUs")
    print(f"{hours:.4g} hours, at least {bound:.4g} in any order: {bound / hours:.3f} of the best")
    return 0


if __name__ == "__main__":
    sys.exit(main())
