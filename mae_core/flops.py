"""Counting the FLOPs of a model without running it.

A stop waits for the end of a count: torch calls Python for every operation then, and a KeyboardInterrupt that is raised
there passes through C++ that may not throw, which aborts the process (about one in 50 stops of COCO's plan)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mae_core.stopping import stop_postponed


@stop_postponed()
def count_flops(work: Callable[[], object], model: nn.Module) -> int:
    """FLOPs of the matrix products and convolutions that `work` computes with the model, two for each multiply-add.
    Nothing is computed if model and inputs are on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode  # late: it imports triton

    for module in model.modules():
        if hasattr(module, "fused_attn"):
            # The counter sees the products of the explicit form on every device.
            module.fused_attn = False  # type: ignore[assignment]
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@stop_postponed()
def forward_flops(build: Callable[[], nn.Module], forward: Callable[[Any], object]) -> int:
    """FLOPs of what `forward` does with the model in evaluation mode; both are called on the meta device, where what
    they make has no values."""
    with torch.device("meta"):
        model = build().eval()
        return count_flops(lambda: forward(model), model)
