"""Table 2: the time of a pre-training step of several recipes, in alternation in one process."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.flops import inputs_of, model_of, training_flops
from benchmarks.timing import Timing, alternate
from mae_core.machine import Machine, suit_attention
from mae_core.recipe import PretrainRecipe


@dataclass(frozen=True)
class Step:
    """One recipe's forward and backward pass over `images` images, and its FLOPs per image."""

    images: int
    timing: Timing
    flops: int

    @property
    def rate(self) -> float:
        return self.images / self.timing.median


def training_step(arch: str, r: PretrainRecipe, images: int, machine: Machine) -> Callable[[], None]:
    """A function that runs forward and backward on random images: all of a step but the optimizer, whose share of a
    batch of 4096 is small, and of a small batch is not."""
    torch.manual_seed(0)
    model = model_of(arch, r, "cpu", machine.activation_checkpointing).to(machine.device).train()
    suit_attention(model, machine)
    forward = torch.compile(model) if machine.compile else model
    pixels, noise = inputs_of(arch, r, images, machine.device)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with machine.autocast():
            loss = forward(pixels, noise, r.mask_ratio).loss
        loss.backward()

    return step


def measure(
    recipes: dict[str, tuple[str, PretrainRecipe]], images: int, machine: Machine, warmup: int = 2, repeats: int = 7
) -> dict[str, Step]:
    """Steps of (arch, recipe) by name, each of `images` images."""
    works = {name: training_step(arch, r, images, machine) for name, (arch, r) in recipes.items()}
    timings = alternate(works, warmup, repeats, machine.device)
    return {name: Step(images, timings[name], training_flops(*recipes[name])) for name in recipes}
