"""The README against the files that exist."""

import re

import pytest

from benchmarks.suite import TASKS
from tests.fixtures import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
MAP = README[README.index("## Map") : README.index("## How to add a task")]


@pytest.mark.parametrize("package", ["mae_core", "transfer", "benchmarks"])
def test_the_map_names_every_module_and_no_other(package):
    there = {path.name for path in (ROOT / package).glob("*.py")} - {"__init__.py"}
    named = set()
    for line in MAP.splitlines():
        files = re.match(r"\s+((?:[\w/]+\.py(?:, )?)+)", line)
        if files and files[1].startswith(f"{package}/"):
            named |= {name.removeprefix(f"{package}/") for name in files[1].split(", ") if name}
    assert named == there


def test_every_task_is_in_the_table_of_tasks():
    table = README[README.index("## Tasks") : README.index("`run_all.py` first prints a plan")]
    assert {task.name for task in TASKS} <= set(re.findall(r"`([\w]+)(?:[:/\w]*)`", table))
