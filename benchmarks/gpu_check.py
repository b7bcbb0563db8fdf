"""The first half hour on a GPU: does everything run on it, with the CPU's numbers, and how fast?

python benchmarks/gpu_check.py            # results/gpu/NAME.json and NAME.md; the same command goes on where it stopped
"""

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

try:
    import torch

    from benchmarks.gpu import faults, numerics, trainings
    from benchmarks.gpu.room import FAIL, PASS, Line, Room, last_line
    from benchmarks.markdown import markdown_table
    from mae_core.command_line import answered
    from mae_core.errors import UserError
    from mae_core.flags import non_negative_int
    from mae_core.machine import Machine, commit, hardware, versions
    from mae_core.settings import choose
    from mae_core.writing import write_json, write_texts
except ModuleNotFoundError as e:
    where = "run it with the Python that has this project installed: .venv/bin/python after `make install`"
    print(f"error: {sys.executable} lacks {e.name}: {where}", file=sys.stderr)
    sys.exit(2)

# In order of worth: if time runs out, the last ones are missing. With each, the minutes after which it is ended.
CHECKS: dict[str, tuple[Callable[[Room], Iterator[Line]], float]] = {
    "device": (numerics.device, 2),
    "forward": (numerics.forward, 4),
    "curve": (trainings.curve, 5),
    "pretraining": (trainings.pretraining, 6),
    "classification": (trainings.classification, 8),
    "kill": (faults.kill_and_resume, 5),
    "memory": (faults.out_of_memory, 5),
    "coco": (trainings.coco, 8),
    "boxes": (numerics.boxes, 2),
    "ade20k": (trainings.ade20k, 6),
    "knn": (numerics.knn, 4),
    "processes": (faults.two_processes, 5),
}
NOT_RUN = "not run"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="CHECK", help=f"of {', '.join(CHECKS)} (default: all)")
    parser.add_argument("--minutes", type=non_negative_int, default=30, help="start no check after these (default: 30)")
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="default: results/gpu")
    parser.add_argument("--work", type=Path, default=Path("gpu-check"), help="data, runs, logs (default: gpu-check)")
    parser.add_argument("--name", help="of the files in --out (default: the GPU's)")
    parser.add_argument(
        "--rehearse", action="store_true", help="on the CPU, with tiny models: tries the checks, not a GPU"
    )
    parser.add_argument("--check", choices=CHECKS, help=argparse.SUPPRESS)  # what a child is started with
    return parser.parse_args(arguments)


def run_child(name: str, args: argparse.Namespace, seconds: float) -> list[Line]:
    """The check's lines, from a process of its own: what it breaks or leaves behind in the GPU ends with it."""
    log, result = args.work / f"{name}.log", args.work / f"{name}.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--check", name, "--work", str(args.work), *["--rehearse"] * args.rehearse]
    with open(log, "w", encoding="utf-8") as file:
        try:
            code: Any = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, timeout=seconds, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = f"no end after {seconds / 60:.0f} minutes"
    lines = [Line(**values) for values in json.loads(result.read_text(encoding="utf-8"))] if result.exists() else []
    if code != 0:
        said = last_line(log.read_text(encoding="utf-8", errors="replace"))
        lines.append(Line(name, FAIL, f"ended with {code}: {said} (log: {log})", {}))
    return lines


def as_child(name: str, room: Room) -> int:
    """Run one check; each line is written as soon as it is known."""
    lines = []
    for line in CHECKS[name][0](room):
        lines.append(dataclasses.asdict(line))
        write_json(room.work / f"{name}.json", lines)
        print(f"{line.status}: {line.name}: {line.figure}", flush=True)
    return 0


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def driver() -> str:
    """The version of NVIDIA's driver; empty where nvidia-smi says none."""
    try:
        call = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(call, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return said.stdout.splitlines()[0].strip() if said.returncode == 0 and said.stdout.strip() else ""


def table(found: dict[str, Any]) -> str:
    rows = [
        (line["name"], line["status"], line["figure"])
        for name in CHECKS
        for line in found["checks"].get(name, {"lines": [{"name": name, "status": NOT_RUN, "figure": ""}]})["lines"]
    ]
    software = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    about = f"{found['hardware']}, driver {found['driver'] or 'unknown'}; {software}; commit {found['commit'][:12]}"
    return f"{about}\n\n{markdown_table([('check', 'result', 'measured'), *rows])}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 if every check that ran passed, 1 if not, 2 for a wrong call, 130 after Ctrl-C."""
    args = parse(arguments)
    return answered(partial(run, args), "stopped; the same command goes on with the check under way")


def run(args: argparse.Namespace) -> int:
    device = "cpu" if args.rehearse else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch sees no GPU here (nvidia-smi names its driver); --rehearse tries the checks on a CPU")
    chosen = [name for name in args.only or CHECKS if choose("check", name, CHECKS)]
    args.work = args.work.absolute()
    args.work.mkdir(parents=True, exist_ok=True)
    room = Room(device, args.work)
    if args.check:
        return as_child(args.check, room)
    about = {"hardware": hardware(Machine(device=device)), "versions": versions()}
    about |= {"commit": commit(), "driver": driver()}
    name = args.name or slug(torch.cuda.get_device_name() if room.device == "cuda" else "rehearsal")
    path = args.out / f"{name}.json"
    found: dict[str, Any] = {**about, "checks": {}}
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if all(before.get(key) == value for key, value in about.items()):
            found = before
    started = time.monotonic()
    for number, check in enumerate(chosen, 1):
        done = found["checks"].get(check, {"lines": []})["lines"]
        if done and not any(line["status"] == FAIL for line in done):
            print(f"[{number}/{len(chosen)}] {check}: passed before", flush=True)
            continue
        left = 60 * args.minutes - (time.monotonic() - started)
        if left <= 0:
            print(f"[{number}/{len(chosen)}] {check}: {args.minutes} minutes are over; the same command goes on")
            break
        print(f"[{number}/{len(chosen)}] {check} ...", flush=True)
        before_check = time.monotonic()
        lines = run_child(check, args, 60 * CHECKS[check][1] * room.many(1, 10))
        for line in lines:
            print(f"  {line.status}: {line.name}: {line.figure}", flush=True)
        found["checks"][check] = {
            "lines": [dataclasses.asdict(line) for line in lines],
            "seconds": round(time.monotonic() - before_check, 1),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_texts({path: json.dumps(found, indent=1) + "\n", path.with_suffix(".md"): table(found)})
    print(path.with_suffix(".md"))
    ran = [line["status"] for check in chosen for line in found["checks"].get(check, {"lines": []})["lines"]]
    return 0 if PASS in ran and FAIL not in ran else 1


if __name__ == "__main__":
    sys.exit(main())
