"""The frozen encoder under what is trained on it: its tokens, the images, and the training of heads on both."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mae_core import distributed
from mae_core.checkpoint import load_encoder, model_of, parameters_sha256
from mae_core.data import Samples, seed_all
from mae_core.loop import check_batch, fit, micro_batch_for
from mae_core.optim import half_cosine, learning_rate
from mae_core.outputs import forward
from mae_core.training import State, Training
from mae_core.vit import ViT
from transfer.data.imagenet import read_split
from transfer.data.split import Split, few_of_both
from transfer.task import Job

# As the logs of efficient-probing's MAE rows say (logs/mae_*/ep.txt; its README's commands have 512), so that a
# BatchNorm sees as many.
IMAGES_OF_A_GPU = 256


class Tokens(nn.Module):
    """Images -> [B, blocks, 1 + N, D]: class token and patch tokens after each of the encoder's last blocks, the last
    one last, or after those of the given numbers, from 0. norm: through the final norm. Registers are left out."""

    def __init__(self, encoder: ViT, blocks: int | list[int] = 1, norm: bool = False) -> None:
        super().__init__()
        self.encoder, self.blocks, self.norm = encoder.eval().requires_grad_(False), blocks, norm

    def forward(self, images: Tensor) -> Tensor:
        found: Any = self.encoder.forward_intermediates(
            images,
            indices=self.blocks,
            norm=self.norm,
            output_fmt="NLC",
            return_prefix_tokens=True,
            intermediates_only=True,
        )
        return torch.stack([torch.cat([prefix[:, :1], patches], dim=1) for patches, prefix in found], dim=1)


def in_float32(forward: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """A head's `forward` on the tokens in float32, also where the encoder runs in bf16: as the originals train their
    heads, and since bf16 has steps of 3 cm at 5 m."""

    @wraps(forward)
    def wrapped(head: Any, tokens: Tensor) -> Tensor:
        kind = tokens.device.type  # "meta", where only FLOPs are counted, has no autocast
        with nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False):
            return forward(head, tokens.float())

    return wrapped


def frozen_encoder(job: Job) -> tuple[ViT, str]:
    """The checkpoint's encoder at the recipe's size, strictly loaded, and what the load did. Then all is seeded."""
    encoder = model_of(job.checkpoint, job.recipe.image_size)
    summary = load_encoder(encoder, job.checkpoint).summary()
    seed_all(job.seed)
    return encoder.to(job.machine.device), summary


def imagenet_of(job: Job) -> tuple[Split, Split]:
    """ImageNet's training images (the recipe's share of them) and its validation images."""
    train, val = (read_split(Path(job.data.root) / "imagenet" / name)[0] for name in ("train", "val"))
    train, val = few_of_both(train, val, job.data.limit)
    return train.share(job.recipe.train_fraction, job.seed), val


def epoch_rate(r: Any, images: int, base_lr: float, min_lr: float = 0.0) -> Callable[[int], float]:
    """The rate of a step by the recipe's epochs and warm-up, half a cosine; base_lr: before scaling by the batch."""
    steps, lr = images // r.batch, learning_rate(base_lr, r.batch)
    return lambda step: half_cosine(step, steps, lr, r.epochs, r.warmup_epochs, min_lr)


def train_heads(
    job: Job,
    tokens: nn.Module,
    heads: nn.Module,
    dataset: Samples,
    optimizer: Optimizer,
    loss_of: Callable[[nn.Module, Tensor, Tensor], Tensor],
    lr_at: Callable[[int], float],
    epochs: int,
    synchronised: bool = False,
    before_step: Callable[[int], None] | None = None,
) -> tuple[State, str]:
    """Train the heads on the tokens of the dataset, in job.recipe's batches, resuming from the checkpoint in job.work,
    which holds the heads alone. loss_of: (heads, tokens, labels) -> loss; lr_at: step -> rate. before_step: as
    `Training` takes it. Returns the final state and a checksum of the encoder, which proves that it did not change."""
    r, machine = job.recipe, job.machine
    check_batch(len(dataset), r.batch, f"the training split of {job.data.root}")
    before = parameters_sha256(tokens.state_dict().items())
    compiled = cast(nn.Module, torch.compile(tokens, dynamic=False)) if machine.compile else tokens
    micro_batch = micro_batch_for(r.batch // machine.processes, machine.micro_batch or IMAGES_OF_A_GPU)
    size = micro_batch

    @torch.no_grad()
    def prepare(images: Tensor, labels: Any, step: int, first: int) -> tuple[Tensor, Tensor]:
        nonlocal size
        found, size = forward(compiled, images, job.checkpoint.normalization, machine, size)
        return found, labels if isinstance(labels, Tensor) else torch.stack([one["label"] for one in labels])

    state = fit(
        heads,
        optimizer,
        Training(
            label=f"{job.task.name} {job.checkpoint.name}",
            work=job.work,
            dataset=dataset,
            epochs=epochs,
            batch=r.batch,
            micro_batch=micro_batch,
            seed=job.seed,
            machine=machine,
            fixed=job.identity(),
            tracker=job.tracker,
            lr_at=lr_at,
            synchronised=synchronised,
            prepare=prepare,
            loss_of=loss_of,
            before_step=before_step,
        ),
    )
    if parameters_sha256(tokens.state_dict().items()) != before:
        raise RuntimeError("the frozen encoder changed while its heads were trained")
    distributed.broadcast_buffers(heads)
    return state, before
