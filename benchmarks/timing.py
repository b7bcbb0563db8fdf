"""Timing several workloads against each other: warm-up, repeats in alternation, median and spread."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

PEERS = ("detectron2", "mmsegmentation")  # whose versions a figure names where they are installed


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat of one workload."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float | None:
        """Half the distance between the quartiles, in percent of the median; None for fewer than two repeats."""
        if len(self.seconds) < 2:
            return None
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return 50 * (high - low) / self.median


def alternate(
    workloads: Mapping[str, Callable[[], object]],
    warmup: int,
    repeats: int,
    device: str,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Run the workloads in turn, `warmup` times untimed and `repeats` times timed, so that whatever else the machine
    does slows all of them alike. clock: or time.process_time."""
    seconds: dict[str, list[float]] = {name: [] for name in workloads}
    for turn in range(warmup + repeats):
        for name, work in workloads.items():
            synchronize(device)
            started = clock()
            work()
            synchronize(device)
            if turn >= warmup:
                seconds[name].append(clock() - started)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def matmul_rate(
    device: str, precision: str, sides: Sequence[int] = (), clock: Callable[[], float] = time.perf_counter
) -> float:
    """FLOP/s of the fastest of a few square matrix products in that precision, of these sides or of those that suit the
    device: the yardstick for a step's FLOP/s."""
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    best = 0.0
    for side in sides or ((1024, 2048) if device == "cpu" else (4096, 8192)):
        a, b = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
        product = partial(torch.matmul, a, b)
        timing = alternate({"product": product}, warmup=2, repeats=5, device=device, clock=clock)["product"]
        best = max(best, 2 * side**3 / min(timing.seconds))
    return best
