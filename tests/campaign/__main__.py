"""python -m tests.campaign: every fault against every command, and one table of what held.

Exit code 0 if all held, 1 if something broke. What a broken case left stays below the folder that is printed.
"""

import argparse
import dataclasses
import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    # Sums over one thread: others have other last bits. Before torch is imported.
    os.environ |= {"OMP_NUM_THREADS": "1", "MAE_TRANSFER_CAMPAIGN": "1"}

from tests.campaign import arguments, checkpoints, datasets, faults, files, kills, payloads, starts
from tests.campaign.cases import Case, Outcome, attempt, table
from tests.campaign.tiny import World, make_world


def all_cases(world: World, seed: int, examples: int) -> list[Case]:
    return [
        *checkpoints.cases(seed, examples),
        *files.cases(world),
        *datasets.cases(world),
        *arguments.cases(world),
        *payloads.cases(world),
        *kills.cases(world, seed),
        *faults.cases(world, seed),
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="only the cases that the tests run")
    parser.add_argument("--seed", type=int, default=0, help="of kills and generated inputs")
    parser.add_argument("--examples", type=int, default=100, help="generated checkpoints of each kind")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="cases with one of these in kind or name")
    parser.add_argument("--json", type=Path, help="also write every outcome there")
    return parser.parse_args()


def main() -> int:
    args = parse()
    faults.with_own_mounts()
    began = time.monotonic()
    starts.preload()
    memory = Path("/dev/shm")  # of a disk every saved state would be waited for
    room = memory.is_dir() and shutil.disk_usage(memory).free > 4 * 2**30
    folder = Path(tempfile.mkdtemp(prefix="campaign-", dir=memory if room else None))
    outcomes: list[Outcome] = []
    try:
        world = make_world(folder)
        chosen = [case for case in all_cases(world, args.seed, args.examples) if case.small or not args.small]
        chosen = [case for case in chosen if not args.only or any(t in f"{case.kind}: {case.name}" for t in args.only)]
        for number, case in enumerate(chosen, 1):
            one = attempt(case, folder / "cases" / f"{number:03}")
            outcomes.append(one)
            why = f": {one.why}" if one.why else ""
            print(
                f"[{number}/{len(chosen)}] {one.result}: {one.kind}: {one.name} ({one.seconds:.0f} s){why}", flush=True
            )
    finally:
        if args.json:
            args.json.write_text(json.dumps([dataclasses.asdict(one) for one in outcomes]))
        broken = [one for one in outcomes if one.result == "broken"]
        shutil.rmtree(folder, ignore_errors=True) if not broken else print(f"what they left: {folder}")
    minutes = (time.monotonic() - began) / 60
    print(f"\n{table(outcomes)}\n\nseed {args.seed}, {minutes:.0f} minutes", flush=True)
    for one in broken:
        print(f"broken: {one.kind}: {one.name}")
    return 1 if broken or not outcomes else 0


if __name__ == "__main__":
    random.seed(0)
    sys.exit(main())
