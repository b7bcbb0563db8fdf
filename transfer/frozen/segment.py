"""Linear segmentation: a BatchNorm and one layer on the patch tokens of a frozen encoder, as DINOv2 and DINOv3 do."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mae_core import distributed
from mae_core.data import Normalization
from mae_core.errors import UserError
from mae_core.loop import batch_objections, batch_within
from mae_core.machine import Machine
from mae_core.optim import adamw
from mae_core.outputs import forward
from mae_core.progress import Progress
from mae_core.settings import bounded, check_ranges, choose
from mae_core.space import Space, training_space
from mae_core.vit import get_arch
from transfer.data.findings import Data
from transfer.data.inputs import input_objections
from transfer.data.miou import columns_of, scores
from transfer.data.predictions import MAIN, names_of, write_predictions
from transfer.frozen.encoder import Tokens, frozen_encoder, in_float32, train_heads
from transfer.frozen.scenes import VOID, SceneSet, Views, areas_of, readable, whole_image
from transfer.run import origin, save_trained
from transfer.task import Job, Objection, Part, Result

DINOV3 = "facebookresearch/dinov3 dinov3/eval/segmentation, config-ade20k-linear-training.yaml"
HEAD_FILE = "head.safetensors"


@dataclass(frozen=True, kw_only=True)
class SegLinearRecipe:
    """image_size: side of the training crops and of the windows of the test, and the short side of a test image.
    stride: of the windows. lr: of a batch of `batch`. The rest is `scenes.Views`'."""

    image_size: int = bounded(1)
    iterations: int = bounded(1)
    warmup_iterations: int = bounded(0)
    batch: int = bounded(1)
    lr: float = bounded(0)
    betas: tuple[float, float] = bounded(0, 1, below=True, default=(0.9, 0.999))
    weight_decay: float = bounded(0, default=1e-3)
    dropout: float = bounded(0, 1, below=True, default=0.1)
    min_scale: float = bounded(0.01)
    max_scale: float = bounded(0.01)
    max_class_share: float = bounded(0.01, 1, default=0.75)
    flip: float = bounded(0, 1, default=0.5)
    photometric: bool = True
    stride: int = bounded(1)

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.min_scale > self.max_scale or self.stride > self.image_size:
            raise UserError("min_scale must not be above max_scale, nor stride above image_size")
        if self.warmup_iterations >= self.iterations:
            raise UserError(f"warmup_iterations={self.warmup_iterations} must be below iterations={self.iterations}")


def recipe(arch: str, name: str) -> SegLinearRecipe:
    patch = get_arch(arch).patch
    paper = SegLinearRecipe(
        image_size=512 - 512 % patch,
        iterations=40_000,
        warmup_iterations=1500,
        batch=16,
        lr=1e-3,
        min_scale=0.5,
        max_scale=2.0,
        stride=341,
    )
    # The miniature's images have 42 to 64 px; as for `ade20k`, scales are narrower.
    side = 48 - 48 % patch
    mini = replace(
        paper, image_size=side, iterations=300, warmup_iterations=15, batch=8, lr=1e-2, min_scale=0.8, max_scale=1.25,
        photometric=False, stride=min(32, side),
    )  # fmt: skip
    return choose("recipe", name, {"paper": paper, "mini": mini})


def sources(arch: str, name: str = "paper") -> dict[str, str]:
    found = {field.name: DINOV3 for field in fields(SegLinearRecipe)}
    return found | {"image_size": f"{DINOV3}; rounded down to a multiple of the patch"}


class PatchSegmenter(nn.Module):
    """`Tokens` [B, blocks, 1 + N, D] -> logits [B, classes, h, w] of the N = h * w patches of the last block."""

    def __init__(self, dim: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout, self.norm = nn.Dropout2d(dropout), nn.BatchNorm2d(dim)
        self.layer = nn.Conv2d(dim, classes, 1)
        nn.init.normal_(self.layer.weight, std=0.01)
        nn.init.zeros_(self.layer.bias)  # type: ignore[arg-type]  # it has one

    @in_float32
    def forward(self, tokens: Tensor) -> Tensor:
        side = math.isqrt(tokens.shape[2] - 1)
        maps = tokens[:, -1, 1:].mT.unflatten(2, (side, side))
        return self.layer(self.norm(self.dropout(maps)))


def loss(head: nn.Module, tokens: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy, 0 where a pixel has no class, averaged over all pixels: as in DINOv3 (dinov3/eval/segmentation/
    loss.py), and so the same whatever the micro-batch."""
    logits = F.interpolate(head(tokens), label.shape[1:], mode="bilinear")
    return F.cross_entropy(logits, label, ignore_index=VOID, reduction="sum") / label.numel()


def rate_of(r: SegLinearRecipe, step: int, steps: int) -> float:
    """Half a cosine down to 0; during the warm-up a line up, times one down."""
    if step < r.warmup_iterations:
        return r.lr * step / r.warmup_iterations * (1 - step / steps)
    return r.lr * 0.5 * (1 + math.cos(math.pi * (step + 1) / steps))


def epochs_of(r: SegLinearRecipe, images: int) -> int:
    return max(1, round(r.iterations * r.batch / images)) if images >= r.batch else 1


def segment(job: Job, scenes: SceneSet) -> Result:
    """Train the head, then score the validation images at their own size."""
    r, machine, dim = job.recipe, job.machine, get_arch(job.checkpoint.arch).dim
    train, val = (scenes.of(job, split) for split in ("train", "val"))
    encoder, load = frozen_encoder(job)
    tokens: Tokens = Tokens(encoder, norm=True)
    head: nn.Module = PatchSegmenter(dim, scenes.classes, r.dropout)
    synchronised = machine.device.startswith("cuda") and machine.processes > 1
    head = nn.SyncBatchNorm.convert_sync_batchnorm(head) if synchronised else head
    head = head.to(machine.device)
    optimizer = adamw([{"params": list(head.parameters()), "weight_decay": r.weight_decay}], r.betas)
    epochs = epochs_of(r, len(train))
    steps = epochs * (len(train) // r.batch)
    views = Views(train, scenes, r, job.seed)
    state, checksum = train_heads(
        job, tokens, head, views, optimizer, loss, lambda step: rate_of(r, step, steps), epochs, synchronised
    )
    areas = test(
        nn.Sequential(tokens, head.eval()), val, scenes, r, job.checkpoint.normalization, machine, job.task.name
    )
    metrics, stderr = scores(areas)
    seen = state.micro_batch * (machine.processes if synchronised else 1)
    return Result(
        metrics,
        stderr,
        len(val),
        images_seen=state.step * r.batch,
        seconds=state.seconds,
        artifacts=save_trained(job, HEAD_FILE, head.state_dict(), origin(job) | {"image_size": str(r.image_size)}),
        predictions=write_predictions(job.work, {MAIN: columns_of(names_of([image for image, _ in val]), areas)}),
        notes=state.notes + (f"BatchNorm saw batches of {seen}, not of {r.batch}",) * (seen != r.batch),
        resolved={
            "load": load,
            "iterations": state.step,
            "feature": "patch tokens after the final norm",
            "batchnorm_batch": seen,
            "backbone_sha256": checksum,
        },
    )


@torch.inference_mode()
def test(
    model: nn.Module,
    val: list,
    scenes: SceneSet,
    r: SegLinearRecipe,
    normalization: Normalization,
    machine: Machine,
    label: str,
) -> np.ndarray:
    """[images, 3, classes] pixels, as `areas_of` counts them: windows slide over the scaled image, their logits are
    averaged, scaled to the label's size, and the highest is the class."""
    progress, found = Progress(f"test {label}", len(val), enabled=distributed.is_main()), []
    mine = [index for batch in distributed.local_batches(len(val), 1) for index in batch]
    for done, index in enumerate(mine, 1):
        image, truth = whole_image(val[index][0], r.image_size), readable(val[index][1], scenes.label)
        logits = sliding(model, image, r.image_size, r.stride, normalization, machine)
        logits = F.interpolate(logits[None], truth.shape, mode="bilinear")[0]
        found.append(areas_of(logits.argmax(dim=0).cpu().numpy(), truth, scenes.classes)[None])
        progress.update(min(len(val), done * distributed.world_size()), 1)
    return np.concatenate(distributed.gather_in_turn(found))


def sliding(
    model: nn.Module, image: Tensor, side: int, stride: int, normalization: Normalization, machine: Machine
) -> Tensor:
    """Logits [classes, H, W] of an image uint8 [3, H, W] whose sides are at least `side`: the mean over the windows."""
    tops, lefts = ([*range(0, length - side, stride), length - side] for length in image.shape[1:])
    places = [(top, left) for top in tops for left in lefts]
    windows = torch.stack([image[:, top : top + side, left : left + side] for top, left in places])
    parts, _ = forward(model, windows, normalization, machine, machine.micro_batch or 16)
    parts = F.interpolate(parts, (side, side), mode="bilinear")
    total = torch.zeros(parts.shape[1], *image.shape[1:], device=parts.device)
    seen = torch.zeros(image.shape[1:], device=parts.device)
    for part, (top, left) in zip(parts, places):
        total[:, top : top + side, left : left + side] += part
        seen[top : top + side, left : left + side] += 1
    return total / seen


def few(r: SegLinearRecipe, data: Data) -> SegLinearRecipe:
    """The recipe with a batch that so few images fill, for as many epochs as on all."""
    iterations = max(2, round(r.iterations * data.counts["train"] / data.unlimited["train"]))
    warmup = min(r.warmup_iterations, iterations - 1)
    batch = batch_within(r.batch, data.counts["train"])
    return replace(r, batch=batch, iterations=iterations, warmup_iterations=warmup)


def objections(job: Job) -> Iterator[Objection]:
    yield from input_objections(job)
    if job.data.status == "found":
        yield from batch_objections(job.data.counts["train"], job.recipe.batch, job.machine.processes)


def space(job: Job, classes: int) -> Space:
    dim = get_arch(job.checkpoint.arch).dim
    numbers = dim * (classes + 4) + classes + 1  # BatchNorm's statistics are among them
    return training_space(job.work, numbers, numbers, moments=2)


def parts(job: Job) -> tuple[Part, ...]:
    """Training, and the windows of the test: two for an image of 4 : 3."""
    r, images = job.recipe, job.data.counts["train"]
    seen = epochs_of(r, images) * (images // r.batch) * r.batch
    how = f"{r.image_size} px, {job.recipe_name}"
    return Part(f"linear segmentation, {how}", seen), Part(f"windows, {how}", 2 * job.data.counts["val"])
