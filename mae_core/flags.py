"""Flags that several commands share, and how their values are read. Without torch: a command line is read before what
takes seconds to import."""

import argparse
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mae_core.settings import did_you_mean

RECIPES = ("paper", "mini")  # of every task
TRACKERS = ("wandb", "trackio")  # the names of their packages


def non_negative_int(text: str) -> int:
    """A whole number, 0 or more, on a command line."""
    if not text.isdecimal() or len(text) > 18:
        raise argparse.ArgumentTypeError(f"{text[:40]} is not a whole number, 0 or more")
    return int(text)


def named_path(text: str) -> Path:
    """A path on a command line: "" would be the current folder, and is what an unset variable of a shell gives."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: give a path")
    return Path(text)


def seed(text: str) -> int:
    """A seed on a command line: a whole number below 2^63."""
    if not text.isdecimal() or len(text) > 19 or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text[:40]} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def program(module: str) -> str:
    """What usage lines call a command: `mae-transfer NAME` where that started it, else `python -m MODULE`."""
    return sys.argv[0] if sys.argv[0].startswith("mae-transfer ") else f"python -m {module}"


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    """--device, --precision, --micro-batch, --workers, --activation-checkpointing, --compile."""
    group = parser.add_argument_group("machine (recorded, never part of the recipe)")
    group.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    group.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="auto: bf16 on GPU")
    group.add_argument("--micro-batch", type=int, default=0, help="images per process and forward pass")
    group.add_argument("--workers", type=int, default=-1, help="processes that decode images (default: up to 16)")
    group.add_argument("--activation-checkpointing", action="store_true", help="less memory, about a third more time")
    group.add_argument("--compile", action="store_true", help="torch.compile the model")
    group.add_argument("--save-minutes", type=float, default=10.0, help="between two training checkpoints")


def tracker(name: str) -> str:
    """A tracker on a command line, whose package is installed here; "" is none."""
    if name not in ("", *TRACKERS):
        raise argparse.ArgumentTypeError(f"there is no tracker {name[:40]!r}: {did_you_mean(name, TRACKERS)}")
    found = importlib.util.find_spec(name) if name else None
    if name and (found is None or found.origin is None):  # none: a folder of that name, such as wandb leaves
        raise argparse.ArgumentTypeError(f"{name} is not installed here: {sys.executable} -m pip install {name}")
    return name


def add_tracker_flag(parser: argparse.ArgumentParser) -> None:
    names = ",".join(TRACKERS)
    parser.add_argument(
        "--tracker", type=tracker, default="", metavar=f"{{{names}}}", help="send the curves of each training there too"
    )


def add_limit_flag(parser: argparse.ArgumentParser) -> None:
    limit_help = "a quick look: at most N training and N validation images of each task; never called paper"
    parser.add_argument("--limit", type=at_least_two, default=0, metavar="N", help=limit_help)


def at_least_two(text: str) -> int:
    if not text.isdecimal() or len(text) > 9 or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text[:40]} is not a number of images from 2 on")
    return int(text)


def add_common_flags(parser: argparse.ArgumentParser, several: Mapping[str, Sequence[str]]) -> None:
    """--recipe, --data, --out, --tracker, the machine's flags, and --engine if there are tasks with several of them.
    several: {task: its engines, best first} of those tasks."""
    parser.add_argument("--recipe", default="paper", choices=RECIPES, help="default: paper")
    parser.add_argument(
        "--data", type=Path, help="root of the datasets (default: $MAE_TRANSFER_DATA, else ./datasets; mini: generated)"
    )
    parser.add_argument(
        "--out", type=named_path, default=Path("results"), help="folder for runs and tables (default: results)"
    )
    names = list(dict.fromkeys(name for engines in several.values() for name in engines))
    which = "; ".join(f"{task}: the first installed of {', '.join(engines)}" for task, engines in several.items())
    if several:
        parser.add_argument("--engine", default="auto", choices=("auto", *names), help=f"default: auto ({which})")
    else:
        parser.set_defaults(engine="auto")
    add_tracker_flag(parser)
    add_machine_flags(parser)
