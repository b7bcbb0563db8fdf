"""Depth on NYU Depth V2 by the tokens of a frozen encoder, as DINOv2 evaluates it: recipe, training and score, and its
linear head. `dpt` has the other one.

The depth of a place is a mean over bins, weighted by what the layer gives for each. DINOv2's second loss, of
gradients, takes differences along the axes of the batch and of the one channel in place of the image's, and is 0 for
the two images that a GPU had: it is left out.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mae_core import distributed
from mae_core.decode import read_image
from mae_core.errors import UserError
from mae_core.flops import count_flops
from mae_core.optim import adamw
from mae_core.progress import Progress
from mae_core.settings import bounded, check_ranges, choose
from mae_core.space import Space, training_space
from mae_core.vit import ViT, get_arch
from transfer.data import nyu
from transfer.data.predictions import MAIN, names_of, write_predictions
from transfer.frozen.depth_views import KINECT, DepthViews, at_least
from transfer.frozen.encoder import Tokens, frozen_encoder, in_float32, train_heads
from transfer.frozen.features import flops
from transfer.frozen.scenes import Pair, readable
from transfer.frozen.segment import HEAD_FILE, epochs_of, sliding
from transfer.run import origin, save_trained
from transfer.task import Job, Part, Result

MIN_DEPTH, MAX_DEPTH = 1e-3, 10.0  # metres
SCORED = (slice(45, 471), slice(41, 601))  # what of NYU's images is scored, rows and columns: Eigen et al.'s crop
RISE = 0.3  # of the steps, after which mmcv's OneCycle turns back
TRAINED_HEAD = 3  # forward passes of a head that is trained: its backward pass takes two
DINOV2 = "DINOv2's depth config in Jiawei-Yang/Denoising-ViT evaluation/configs/vitb_nyu_linear_config.py"


@dataclass(frozen=True, kw_only=True)
class DepthRecipe:
    """image_size: side of the square training crops and of the windows of the test; stride: of those. lr: of a batch
    of `batch`. betas: AdamW's; the first falls to lowest_beta1 and rises back (`beta1_of`). max_norm: of a gradient at
    most. rotate: degrees at most, of half the images; colour: whether half of them change in gamma, brightness and
    colour."""

    image_size: int = bounded(1)
    iterations: int = bounded(1)
    warmup_iterations: int = bounded(0)
    batch: int = bounded(1)
    lr: float = bounded(0)
    betas: tuple[float, float] = bounded(0, 1, below=True, default=(0.95, 0.999))
    lowest_beta1: float = bounded(0, 1, below=True, default=0.85)
    max_norm: float = bounded(1e-6, default=35.0)
    weight_decay: float = bounded(0, default=0.01)
    flip: float = bounded(0, 1, default=0.5)
    rotate: float = bounded(0, 45, default=2.5)
    colour: bool = True
    stride: int = bounded(1)

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.stride > self.image_size:
            raise UserError(f"stride={self.stride} must not be above image_size={self.image_size}")
        if self.warmup_iterations >= self.iterations:
            raise UserError(f"warmup_iterations={self.warmup_iterations} must be below iterations={self.iterations}")


@dataclass(frozen=True, kw_only=True)
class LinearDepthRecipe(DepthRecipe):
    """bins: depths, evenly from 1 mm to 10 m, whose weighted mean is predicted."""

    bins: int = bounded(2, default=256)


def recipe(arch: str, name: str) -> LinearDepthRecipe:
    patch = get_arch(arch).patch
    side = 416 - 416 % patch
    paper = LinearDepthRecipe(
        image_size=side, iterations=38_400, warmup_iterations=12_800, batch=16, lr=5e-3, stride=min(224, side)
    )
    small = 48 - 48 % patch
    mini = replace(
        paper, image_size=small, iterations=300, warmup_iterations=15, batch=8, lr=1e-2, rotate=0.0, colour=False,
        stride=min(32, small),
    )  # fmt: skip
    return choose("recipe", name, {"paper": paper, "mini": mini})


def sources(arch: str, name: str = "paper") -> dict[str, str]:
    found = {field.name: DINOV2 for field in fields(LinearDepthRecipe)}
    square = "its crops are 416 x 544 and its test images whole; ours are square, for encoders of any kind"
    found |= dict.fromkeys(("betas", "lowest_beta1"), f"{DINOV2}, whose momentum_config OneCycle sets the first one")
    return found | {"image_size": f"{DINOV2}; {square}; a multiple of the patch", "stride": f"stand-in: {square}"}


class PatchDepth(nn.Module):
    """`Tokens` [B, blocks, 1 + N, D] -> metres [B, 1, 4h, 4w] of the N = h * w patches of the last block, each beside
    the first token. Weights of the bins are interpolated, which is linear, after the layer in place of before it."""

    def __init__(self, dim: int, bins: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2 * dim, bins, 1)
        self.register_buffer("depths", torch.linspace(MIN_DEPTH, MAX_DEPTH, bins), persistent=False)

    @in_float32
    def forward(self, tokens: Tensor) -> Tensor:
        side = math.isqrt(tokens.shape[2] - 1)
        patches, first = tokens[:, -1, 1:], tokens[:, -1, :1]
        both = torch.cat([patches, first.expand_as(patches)], dim=2).mT.unflatten(2, (side, side))
        weights = F.interpolate(self.layer(both), scale_factor=4, mode="bilinear").relu() + 0.1
        return torch.einsum("bkhw,k->bhw", weights / weights.sum(dim=1, keepdim=True), self.depths)[:, None]


def loss(head: nn.Module, tokens: Tensor, depth: Tensor) -> Tensor:
    """`scale_invariant` of each pair of neighbouring images, which are the two that a GPU of DINOv2 had, averaged: the
    same whatever the micro-batch and the number of GPUs as long as the first is even. Of an odd one the last image
    stands alone and counts half as much as a pair."""
    predicted = F.interpolate(head(tokens), depth.shape[1:], mode="bilinear")[:, 0]
    pairs = zip(predicted.split(2), depth.split(2))
    return torch.stack([len(metres) * scale_invariant(metres, truth) for metres, truth in pairs]).sum() / len(depth)


def scale_invariant(predicted: Tensor, depth: Tensor) -> Tensor:
    """Of metres of any one shape: sqrt(var(g) + 0.15 mean(g)^2) of the log ratios g of all known pixels (AdaBins, arXiv
    2011.14141, after Eigen et al. 2014; facebookresearch/dinov2 dinov2/eval/depth/models/losses/sigloss.py); 0 where
    fewer than two are known."""
    known = depth > 0
    ratio = (torch.log(predicted + MIN_DEPTH) - torch.log(depth + MIN_DEPTH)) * known
    count = known.sum()
    mean = ratio.sum() / count.clamp(min=1)
    variance = ((ratio - mean).square() * known).sum() / (count - 1).clamp(min=1)
    square = variance + 0.15 * mean.square()
    some = (count > 1) & (square > 0)  # the root has no slope at 0
    return torch.where(some, torch.where(some, square, 1.0).sqrt(), 0.0)


def rate_of(r: DepthRecipe, step: int, steps: int) -> float:
    """Half a cosine, times a line from 0.001 to 1 over the warm-up."""
    rate = r.lr * 0.5 * (1 + math.cos(math.pi * step / steps))
    if step < r.warmup_iterations:
        rate *= 1 - (1 - step / r.warmup_iterations) * (1 - 0.001)
    return rate


def alone_in_loss(micro_batch: int) -> tuple[str, ...]:
    """A note on images that had no second one in `loss`."""
    if micro_batch % 2 == 0:
        return ()
    return (
        "each image stood alone in its loss"
        if micro_batch == 1
        else f"of every {micro_batch} images the last one stood alone in its loss",
    )


def beta1_of(r: DepthRecipe, step: int, steps: int) -> float:
    """Half a cosine from betas[0] down to lowest_beta1 over 30 % of the steps and another one back, as mmcv's OneCycle
    of the momentum (mmcv 1.x runner/hooks/momentum_updater.py)."""
    turn = RISE * steps - 1
    start, end, part = (r.betas[0], r.lowest_beta1, step / turn)
    if step > turn:
        start, end, part = end, start, (step - turn) / (steps - 1 - turn)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * part))


def linear_tokens(encoder: ViT) -> Tokens:
    return Tokens(encoder, norm=True)


def linear_head(job: Job) -> PatchDepth:
    return PatchDepth(get_arch(job.checkpoint.arch).dim, job.recipe.bins)


def linear(job: Job) -> Result:
    return depth(job, linear_tokens, linear_head, "patch tokens after the final norm, each with the first token")


def depth(job: Job, tokens_of: Callable[[ViT], Tokens], head_of: Callable[[Job], nn.Module], feature: str) -> Result:
    """Train the head, then score the test images: delta1, RMSE and relative error are means over the images. feature:
    what the head gets of the encoder, in words."""
    r, machine = job.recipe, job.machine
    train, test = (nyu.pairs(Path(job.data.root) / nyu.FOLDER, split)[: job.data.limit or None] for split in nyu.LISTS)
    encoder, load = frozen_encoder(job)
    tokens = tokens_of(encoder)
    head = head_of(job).to(machine.device)
    optimizer = adamw([{"params": list(head.parameters()), "weight_decay": r.weight_decay}], r.betas)
    epochs = epochs_of(r, len(train))
    steps = epochs * (len(train) // r.batch)
    views = DepthViews(train, r, job.seed)

    def before_step(step: int) -> None:
        nn.utils.clip_grad_norm_(head.parameters(), r.max_norm)
        for group in optimizer.param_groups:
            group["betas"] = beta1_of(r, step, steps), r.betas[1]

    state, checksum = train_heads(
        job,
        tokens,
        head,
        views,
        optimizer,
        loss,
        lambda step: rate_of(r, step, steps),
        epochs,
        before_step=before_step,
    )
    # The depths of each window are cut to what there is, as DINOv2 cuts those of each view.
    errors = errors_of(nn.Sequential(tokens, head.eval(), nn.Hardtanh(MIN_DEPTH, MAX_DEPTH)), test, job)
    metrics = metrics_of(errors)
    stderr = {name: float(values.std(ddof=1) / len(test) ** 0.5) for name, values in metrics.items()}
    return Result(
        {name: float(values.mean()) for name, values in metrics.items()},
        stderr if len(test) > 1 else {},
        len(test),
        images_seen=state.step * r.batch,
        seconds=state.seconds,
        artifacts=save_trained(job, HEAD_FILE, head.state_dict(), origin(job) | {"image_size": str(r.image_size)}),
        predictions=write_predictions(
            job.work, {MAIN: {"image": names_of([image for image, _ in test]), **dict(zip(COLUMNS, errors.T))}}
        ),
        notes=(*state.notes, *alone_in_loss(state.micro_batch)),
        resolved={
            "load": load,
            "iterations": state.step,
            "feature": feature,
            "backbone_sha256": checksum,
        },
    )


COLUMNS = ("pixels", "within", "squared_error", "relative_error")


@torch.inference_mode()
def errors_of(model: nn.Module, test: Sequence[Pair], job: Job) -> np.ndarray:
    """[images, 4], the sums of COLUMNS over an image's scored pixels: their number, how many are right within a factor
    of 1.25, squared errors (square metres), and errors relative to the truth. Depths are the mean of the image's and
    its mirror image's. UserError for an image in which nothing was measured."""
    from torchvision.transforms.v2.functional import hflip, pil_to_tensor

    r, machine, found = job.recipe, job.machine, []
    progress = Progress(f"test {job.task.name}", len(test), enabled=distributed.is_main())
    mine = [index for batch in distributed.local_batches(len(test), 1) for index in batch]
    for done, index in enumerate(mine, 1):
        image = pil_to_tensor(readable(test[index][0], read_image))
        truth = torch.from_numpy(readable(test[index][1], nyu.read_depth))
        image, _ = at_least(image, truth[None], r.image_size)
        two = [
            sliding(model, view, r.image_size, r.stride, job.checkpoint.normalization, machine)[None]
            for view in (image, hflip(image))
        ]
        metres = F.interpolate((two[0] + hflip(two[1])) / 2, tuple(truth.shape), mode="bilinear")[0, 0].cpu()
        sums = sums_of(metres.numpy(), truth.numpy())
        if not sums[0]:
            raise UserError(f"{test[index][1]} has no measured depth between 1 mm and 10 m: replace it")
        found.append(sums[None])
        progress.update(min(len(test), done * distributed.world_size()), 1)
    return np.concatenate(distributed.gather_in_turn(found))


def sums_of(metres: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """[4], COLUMNS of predicted and true metres [H, W]; of NYU's own size only Eigen's crop counts."""
    if truth.shape == KINECT:
        metres, truth = metres[SCORED], truth[SCORED]
    known = (truth > MIN_DEPTH) & (truth < MAX_DEPTH)
    metres, truth = metres[known].astype(np.float64), truth[known].astype(np.float64)
    within = np.maximum(metres / truth, truth / metres) < 1.25
    error = metres - truth
    return np.array([known.sum(), within.sum(), np.square(error).sum(), (np.abs(error) / truth).sum()], np.float64)


def metrics_of(errors: np.ndarray) -> dict[str, np.ndarray]:
    """delta1 (%), rmse (m) and abs_rel of each image, from [images, 4]."""
    pixels, within, squared, relative = errors.T
    return {"delta1": 100 * within / pixels, "rmse": np.sqrt(squared / pixels), "abs_rel": relative / pixels}


def space(job: Job, head_of: Callable[[Job], nn.Module] = linear_head) -> Space:
    with torch.device("meta"):
        numbers = sum(p.numel() for p in head_of(job).parameters())
    return training_space(job.work, numbers, numbers, moments=2)


def parts(
    job: Job, head_of: Callable[[Job], nn.Module] = linear_head, blocks: int = 1, name: str = "linear depth"
) -> tuple[Part, ...]:
    """Training, and the windows of an image and of its mirror image in the test; both with the head, which sees the
    tokens of so many blocks. Images are as large as NYU's, or as the miniature's largest."""
    r, a, images = job.recipe, get_arch(job.checkpoint.arch), job.data.counts["train"]
    with torch.device("meta"):
        head, tokens = head_of(job), torch.empty(1, blocks, 1 + (r.image_size // a.patch) ** 2, a.dim)
    own = count_flops(lambda: head(tokens), head) / flops(job)
    sides = (64, 64) if job.data.label == "miniature" else KINECT
    windows = 2 * math.prod(1 + max(0, math.ceil((side - r.image_size) / r.stride)) for side in sides)
    seen, how = epochs_of(r, images) * (images // r.batch) * r.batch, f"{r.image_size} px, {job.recipe_name}"
    return (
        Part(f"{name}, {how}", seen, 1 + TRAINED_HEAD * own),
        Part(f"windows of {name}, {how}", windows * job.data.counts["val"], 1 + own),
    )
