"""Table 2: the time of several recipes' pre-training steps, measured in alternation in one process."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.flops import build_autoencoder, random_inputs, training_flops
from benchmarks.speed_workloads import prepared
from benchmarks.timing import Timing, alternate
from mae_core.machine import Machine
from mae_core.recipe import PretrainRecipe


@dataclass(frozen=True)
class Step:
    """The forward and backward pass of one recipe over `images` images. flops: per image."""

    images: int
    timing: Timing
    flops: int

    @property
    def rate(self) -> float:
        return self.images / self.timing.median


def training_step(arch: str, r: PretrainRecipe, images: int, machine: Machine) -> Callable[[], None]:
    """A function that runs the forward and backward pass on random images. It leaves out the optimizer, whose share of
    the time is small at the recipe's batch of 4096 but not at a batch that is small enough to be timed."""
    torch.manual_seed(0)
    model = build_autoencoder(arch, r, "cpu", machine.activation_checkpointing)
    forward = prepared(model, machine)
    pixels, noise = random_inputs(arch, r, images, machine.device)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with machine.autocast():
            loss = forward(pixels, noise, r.mask_ratio).loss
        loss.backward()

    return step


def measure(
    recipes: dict[str, tuple[str, PretrainRecipe]], images: int, machine: Machine, warmup: int = 2, repeats: int = 7
) -> dict[str, Step]:
    """{name: (arch, recipe)} -> {name: its step of that many images}."""
    steps = {name: training_step(arch, r, images, machine) for name, (arch, r) in recipes.items()}
    timings = alternate(steps, warmup, repeats, machine.device)
    return {name: Step(images, timings[name], training_flops(*recipes[name])) for name in recipes}
