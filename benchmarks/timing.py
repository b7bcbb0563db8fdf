"""Timing pieces of work against each other: warm-up, repeats in alternation, median and spread."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat of one piece of work."""

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


def alternate(works: dict[str, Callable[[], object]], warmup: int, repeats: int, device: str) -> dict[str, Timing]:
    """Every piece of work in turn, `warmup` times untimed and `repeats` times timed: what else the machine does in the
    meantime then falls on all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(warmup + repeats):
        for name, work in works.items():
            wait(device)
            started = time.perf_counter()
            work()
            wait(device)
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def matmul_rate(device: str, precision: str) -> float:
    """FLOP/s of the best of a few square matrix products in that precision: what a step's FLOP/s are measured by."""
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    best = 0.0
    for side in (1024, 2048) if device == "cpu" else (4096, 8192):
        a, b = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
        timing = alternate({"product": lambda a=a, b=b: a @ b}, warmup=2, repeats=5, device=device)["product"]
        best = max(best, 2 * side**3 / min(timing.seconds))
    return best
