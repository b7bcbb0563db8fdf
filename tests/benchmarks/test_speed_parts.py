"""Where the time of a step goes: by known work, and by the parts of the models that are timed."""

import sys
from types import ModuleType

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from benchmarks import speed_parts
from benchmarks.speed_dense import dense_workloads
from benchmarks.speed_parts import by_parts, named_parts, parts_table, seconds_of_parts
from mae_core.machine import Machine


def test_parts_are_told_apart_forward_and_backward(monkeypatch):
    """One within another; what no part has is other."""
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
    assert all(seconds > 0 for part in ("large", "small") for seconds in found[part])
    assert found["update"][1] == 0
    shares = [int(line.split("|")[-2].strip(" %")) for line in parts_table(found).splitlines()[2:]]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=2)


def event(name: str, start: int, end: int, parent=None, number: int = -1, device=DeviceType.CPU) -> FunctionEvent:
    """From `start` to `end` microseconds."""
    made = FunctionEvent(
        id=start, name=name, thread=0, start_us=start, end_us=end, sequence_nr=number, device_type=device
    )
    if parent is not None:
        parent.append_cpu_child(made)
        made.set_cpu_parent(parent)
    return made


def test_events_by_hand_give_the_seconds_of_each_part():
    """An operation counts where it lies, its backward node where the operation of its number lay, each without what
    lies in it. A GPU's own events are not counted again beside the operations that launched them."""
    outer = event("part: outer", 0, 100)
    inner = event("part: inner", 10, 50, outer)
    forward = event("aten::mm", 20, 40, inner, number=7)
    node = event("autograd::engine::evaluate_function: MmBackward0", 200, 260, number=7)
    backward = event("aten::mm", 210, 250, node)
    update = event("Optimizer.step#SGD.step", 300, 310)
    rest = event("aten::copy_", 400, 405)
    events = [outer, inner, forward, node, backward, update, rest]
    found = by_parts(events, gpu=False, steps=1)
    wanted = {"outer": (60, 0), "inner": (40, 60), "update": (10, 0), "other": (5, 0)}
    assert found == {part: pytest.approx((a / 1e6, b / 1e6)) for part, (a, b) in wanted.items()}
    for launched, kernel in ((forward, 1000), (backward, 3000)):
        launched.append_kernel("gemm", 0, kernel)
        launched.use_device = "cuda"
    on_gpu = [event("gemm", 600, 1600, device=DeviceType.CUDA), event("part: inner", 600, 5000, device=DeviceType.CUDA)]
    found = by_parts([*events, *on_gpu], gpu=True, steps=2)
    assert found["inner"] == pytest.approx((0.0005, 0.0015))
    assert found["other"] == (0, 0)


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
