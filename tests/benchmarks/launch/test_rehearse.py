"""How well the pool fills a node: sleeping jobs with the estimated times of the whole plan of a ViT-L."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.cost import Rates, estimate
from benchmarks.launch import rehearse
from benchmarks.launch.rehearse import shortest, units_of
from benchmarks.launch.units import Unit, make_units, wall_time
from benchmarks.plan import Item
from benchmarks.suite import TASKS
from tests.benchmarks.test_cost import job_of, on_h100  # noqa: F401  # a fixture
from transfer.task import Needs

# Those that every checkpoint of an encoder gets, and the two that are run by name.
PLANNED = [task for task in TASKS if task.needs is not Needs.FINE_TUNED_FILE and not task.of]


def plan(path: Path, per_training: int, on_h100: dict) -> Path:  # noqa: F811
    """The plan of a node with eight H100, as run_all.py --json writes it."""
    items = []
    finetune = job_of("imagenet_finetune", "vit_large_patch16", **on_h100)
    for task in PLANNED:
        machine = on_h100 | {"processes": per_training if task.trains else 1}
        job = job_of(task.name, "vit_large_patch16", **machine)
        seconds = estimate(job, Rates())
        assert seconds is not None, task.name
        job = replace(job, work=Path(task.name), estimated_seconds=seconds.seconds)
        after = replace(finetune, work=Path(finetune.task.name)) if task.needs is Needs.CLASSIFIER else None
        items.append(Item(job, "to do", "", after))
    units = make_units(items)
    names = {unit: f"job{number}" for number, unit in enumerate(units)}
    jobs = [
        {"id": names[u], "gpus": u.gpus, "hours": u.weight / 3600, "after": [names[other] for other in u.after]}
        for u in units
    ]
    path.write_text(json.dumps({"jobs": jobs}))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("per_training", [8, 4, 2, 1])
def test_a_node_of_eight_is_filled(tmp_path, on_h100, per_training):  # noqa: F811
    """No more than a tenth is lost against the shortest time that any order could take."""
    units = units_of(plan(tmp_path / "plan.json", per_training, on_h100))
    assert len(units) > 12
    assert shortest(units, 8) >= 0.9 * wall_time(units, 8, lambda unit: unit.gpus)


def test_a_rehearsal_takes_no_less_than_any_order_must(tmp_path, on_h100, capsys):  # noqa: F811
    path = plan(tmp_path / "plan.json", 4, on_h100)
    assert rehearse.main([str(path), "--gpus", "8", "--seconds", "3"]) == 0
    found = re.fullmatch(r"(\d+) jobs, .*\n(\S+) hours, at least (\S+) in any order: .*\n", capsys.readouterr().out)
    units = units_of(path)
    assert (int(found[1]), float(found[3])) == (len(units), pytest.approx(shortest(units, 8), rel=1e-3))
    assert float(found[2]) >= float(found[3])


def test_the_shortest_time_is_that_of_all_gpus_or_of_the_longest_chain():
    a, b = Unit([], 2, weight=3.0), Unit([], 1, weight=1.0)
    assert shortest([a, b], 2) == 3.5
    b.after = [a]
    assert shortest([a, b], 8) == 4.0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is no plan"),
        ('{"jobs": [{"id": "a", "gpus": 1, "hours": null, "after": []}]}', "how long a takes is not known"),
        ('{"jobs": [{"id": "a", "gpus": 9, "hours": 1, "after": []}]}', "--gpus 8: a job of the plan wants 9"),
        ('{"jobs": []}', "how long nothing takes"),
    ],
)
def test_a_plan_that_cannot_be_rehearsed_is_a_sentence(tmp_path, capsys, content, said):
    (tmp_path / "plan.json").write_text(content)
    assert rehearse.main([str(tmp_path / "plan.json"), "--gpus", "8"]) == 2
    assert said in capsys.readouterr().err
