"""python -m tests.guard: short runs of the mini recipes beside the numbers in expected.json, within its tolerances.

Exit code 0 if all agree, 1 if not. --fault plants a fault, which must turn it red; --write makes expected.json anew.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from tests.guard.faults import FAULTS
from tests.guard.runs import RUNS, Numbers

EXPECTED = Path(__file__).with_name("expected.json")
# How far a number may be off. Losses: a share of the expected one; short trainings on other processors and with other
# versions of torch differ by rounding only, which grows. Metrics: points. Maps: of their standard deviation.
LOSS, POINTS, VALUE = 0.02, 5.0, 2e-4


def compare(expected: Numbers, found: Numbers) -> list[str]:
    """A sentence for each number that is absent, new or off by more than its tolerance."""
    wrong = [f"{name}: absent" for name in expected.keys() - found.keys()]
    wrong += [f"{name}: nothing is expected" for name in found.keys() - expected.keys()]
    for name in expected.keys() & found.keys():
        allowed = POINTS
        if name.startswith("loss"):
            allowed = LOSS * abs(expected[name])
        elif "value" in name:
            allowed = VALUE
        if not abs(found[name] - expected[name]) <= allowed:  # a NaN is wrong too
            wrong.append(f"{name}: {found[name]:.6g}, expected {expected[name]:.6g} within {allowed:.2g}")
    return sorted(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.guard", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=RUNS, default=[], help="only these runs")
    parser.add_argument("--fault", choices=FAULTS, help="plant this fault; the runs are those that must notice")
    parser.add_argument("--write", action="store_true", help="write what the runs leave to expected.json")
    args = parser.parse_args()
    if args.write and args.fault:
        parser.error("--write with --fault would expect the fault")
    torch.set_num_threads(1)
    everything = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}
    chosen = args.only or (FAULTS[args.fault][0] if args.fault else tuple(RUNS))
    red = []
    with pytest.MonkeyPatch.context() as patch:
        if args.fault:
            FAULTS[args.fault][1](patch)
        for name in chosen:
            with tempfile.TemporaryDirectory(prefix="guard-") as folder:
                found = RUNS[name](Path(folder))
            if args.write:
                everything[name] = found
                continue
            wrong = compare(everything[name], found)
            red += [name] if wrong else []
            print(f"{name}: {'; '.join(wrong) or 'as expected'}", flush=True)
    if args.write:
        EXPECTED.write_text(json.dumps(everything, indent=1) + "\n")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
