"""Where the time of a step goes: by known work, and by the parts of the models that are timed."""

import sys
from types import ModuleType

import pytest
import torch

from benchmarks import speed_parts
from benchmarks.speed_dense import dense_workloads
from benchmarks.speed_parts import named_parts, parts_table, seconds_of_parts
from mae_core.machine import Machine


def test_time_is_the_parts_that_spent_it_forward_and_backward(monkeypatch):
    """A part of many large products beside one of a small one; an inner part counts by itself; what no part has is
    other."""
    module = ModuleType("shown")
    large, small = (torch.nn.Parameter(torch.randn(side, side)) for side in (600, 60))
    module.inner = lambda: (small @ small).sum()
    module.outer = lambda: sum((large @ large).sum() for _ in range(4)) + module.inner()
    monkeypatch.setitem(sys.modules, "shown", module)
    monkeypatch.setattr(speed_parts, "PARTS", (("shown", "inner", "small"), ("shown", "outer", "large")))
    optimizer = torch.optim.SGD([large, small], lr=0.0)

    def work() -> None:
        module.outer().backward()
        optimizer.step()

    found = seconds_of_parts(work, "cpu")
    assert set(found) == {"small", "large", "update", "other"}
    assert all(seconds > other for seconds, other in zip(found["large"], found["small"]))  # of 4,000 times the work
    assert all(seconds > 0 for seconds in found["small"])
    assert found["update"][1] == 0
    shares = [int(line.split("|")[-2].strip(" %")) for line in parts_table(found).splitlines()[2:]]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=2)


def test_every_name_is_there_and_is_given_back():
    """Those of the libraries that are imported here."""
    dense_workloads("coco", "vit_mini_patch8", 64, 1, Machine())
    dense_workloads("ade20k", "vit_mini_patch8", 64, 2, Machine())
    seen = {}
    for module, path, _ in speed_parts.PARTS:
        if module in sys.modules:
            owner = sys.modules[module]
            for name in path.split("."):
                owner = getattr(owner, name)
            seen[module, path] = owner
    assert len(seen) >= 20
    with named_parts():
        pass
    for (module, path), before in seen.items():
        owner = sys.modules[module]
        for name in path.split("."):
            owner = getattr(owner, name)
        assert owner is before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("task", "forward_only"), [("coco", {"targets: matching, sampling"}), ("ade20k", set())])
def test_a_dense_step_is_told_apart(task, forward_only):
    step = next(iter(dense_workloads(task, "vit_mini_patch8", 64, 2, Machine()).values()))
    parts = seconds_of_parts(step, "cpu", steps=1)
    wanted = {
        "coco": {"patch embedding", "blocks: attention", "blocks: MLP", "blocks: relative positions", "RPN", "RoIAlign"}
        | {"maps of four strides", "box head", "mask head", "update"},
        "ade20k": {"patch embedding", "blocks: attention", "blocks: MLP", "UperNet", "auxiliary head", "update"},
    }[task]
    assert wanted | forward_only <= set(parts)
    for part in wanted - {"update"}:
        assert all(seconds > 0 for seconds in parts[part]), part
    assert all(parts[part][1] == 0 for part in forward_only)
    assert sum(parts["other"]) < 0.5 * sum(map(sum, parts.values()))
