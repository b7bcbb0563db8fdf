"""Our own trainings, watched while they run as they always do: what each step was given, its loss and its rate."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import ToPILImage

from benchmarks.originals import Difference
from mae_core.errors import UserError
from mae_core.training import State, Training


@dataclass
class Step:
    """Of each micro-batch, images: uint8 [B, 3, S, S], cropped and augmented, before normalisation; labels [B]; more:
    what the model and the loss got beside the images, noise or targets. random: the states of torch's and numpy's
    generators before the first of these was made."""

    images: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    more: list[Tensor] = field(default_factory=list)
    random: Any = None
    loss: float = 0.0
    rate: float = 0.0


@dataclass
class Watched:
    """One training of ours. start: its weights before the first step."""

    start: dict[str, Tensor] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        return [step.loss for step in self.steps]

    @property
    def rates(self) -> list[float]:
        return [step.rate for step in self.steps]


@contextmanager
def watched(module: ModuleType, other_order: bool = False) -> Iterator[Watched]:
    """What the next `fit` that this module of ours calls is given, and does. other_order: each batch goes through the
    model backwards, and attention is computed by its formula: the same work with its sums in another order."""
    found, fit, drop = Watched(), module.fit, DropPath.forward

    def watching(model: nn.Module, optimizer: Any, t: Training, *more: Any) -> State:
        found.start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for part in model.modules():
            if hasattr(part, "fused_attn"):
                part.fused_attn = not other_order  # type: ignore[assignment]  # torch says: a Tensor or a Module

        def lr_at(step: int) -> float:
            rate = t.lr_at(step)
            if step == len(found.steps):
                found.steps.append(Step(rate=rate))
            return rate

        def prepare(images: Tensor, labels: Tensor, step: int, first: int) -> tuple[Tensor, ...]:
            seen = found.steps[step]
            seen.random = seen.random or (torch.get_rng_state(), np.random.get_state())
            seen.images.append(images.clone())
            seen.labels.append(labels.clone())
            tensors = t.prepare(images, labels, step, first)
            seen.more.append(tensors[1])
            return tensors

        def loss_of(m: nn.Module, *tensors: Tensor) -> Tensor:
            loss = t.loss_of(m, *(tensor.flip(0) for tensor in tensors)) if other_order else t.loss_of(m, *tensors)
            found.steps[-1].loss += loss.item() * len(tensors[0]) / t.batch
            return loss

        return fit(model, optimizer, replace(t, lr_at=lr_at, prepare=prepare, loss_of=loss_of), *more)

    def dropping(self: DropPath, x: Tensor) -> Tensor:
        return drop(self, x.flip(0)).flip(0)  # each image keeps what was drawn for it

    with patch.object(module, "fit", watching), patch.object(DropPath, "forward", dropping if other_order else drop):
        yield found


class Replay(Dataset):
    """The images of our steps in their order, whatever index is asked for, with the last two transforms of the
    original, ToTensor and Normalize. Before a step is computed, the random generators are put where they were in ours.
    """

    def __init__(self, steps: list[Step], epochs: int, transform: Any) -> None:
        self.steps, self.size, self.transform = steps, len(steps) // epochs, transform
        self.transforms = [ToPILImage(), *transform.transforms[-2:]]
        self.waiting: Iterator[tuple[Tensor, int]] = self.images()
        self.current = steps[0]

    def __len__(self) -> int:
        """Images of an epoch."""
        return self.size * sum(map(len, self.steps[0].images))

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return next(self.waiting)

    def images(self) -> Iterator[tuple[Tensor, int]]:
        for step in self.steps:
            self.current = step
            images, labels = torch.cat(step.images), torch.cat(step.labels)
            for number, (image, label) in enumerate(zip(images, labels.tolist()), 1):
                for transform in self.transforms:
                    image = transform(image)
                if number == len(images):
                    torch.set_rng_state(step.random[0])
                    np.random.set_state(step.random[1])
                yield image, label


ROUNDING = 1e-6


def relative(a: float, b: float) -> float:
    return abs(a - b) / abs(b)


def apart(again: Watched, ours: Watched) -> float:
    """How far losses may differ, relative: as far as those of `again`, which is ours with sums in another order, ever
    do from ours, but at least 1e-6, some eight units in the last place of a float32."""
    return max([ROUNDING, *(relative(a, b) for a, b in zip(again.losses, ours.losses))])


def curves(name: str, ours: Watched, allowed: float, losses: list[float], rates: list[float]) -> list[Difference]:
    """The original's losses and rates beside ours. At the first step the losses may differ by 1e-5 relative, from then
    on by `allowed`. Rates: to rounding."""
    steps, last = len(ours.steps), len(ours.steps) - 1
    if not len(losses) == len(rates) == steps:
        raise UserError(f"{name}: the original made {len(losses)} steps and logged {len(rates)} rates, ours {steps}")
    gaps = [relative(a, b) for a, b in zip(ours.losses, losses)]
    worst = gaps.index(max(gaps))
    rated = [abs(a - b) / max(rates) for a, b in zip(ours.rates, rates)]
    farthest = rated.index(max(rated))

    def at(what: str, step: int, allowed: float) -> Difference:
        return Difference(what, ours.losses[step], losses[step], gaps[step], allowed)

    return [
        at(f"{name}: loss of step 1, relative", 0, 1e-5),
        at(f"{name}: loss of step {steps}, relative", last, allowed),
        at(f"{name}: largest gap of the losses (step {worst + 1}), relative", worst, allowed),
        Difference(
            f"{name}: largest gap of the rates (step {farthest + 1}), of the highest",
            *(ours.rates[farthest], rates[farthest], rated[farthest], 1e-9),
        ),
    ]
