"""Depth on NYU Depth V2 by the tokens of a frozen encoder, as DINOv2 evaluates it: recipe, views, training and score,
and its linear head. `dpt` has the other one.

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
from mae_core.data import Sample, seed_all
from mae_core.decode import UNREADABLE, read_image
from mae_core.errors import UserError
from mae_core.flops import count_flops
from mae_core.optim import adamw
from mae_core.progress import Progress
from mae_core.settings import bounded, check_ranges, choose
from mae_core.space import Space, training_space
from mae_core.vit import ViT, get_arch
from transfer.data import nyu
from transfer.data.predictions import MAIN, names_of, write_predictions
from transfer.frozen.encoder import Tokens, frozen_encoder, train_heads
from transfer.frozen.features import flops
from transfer.frozen.scenes import Pair, readable, scaled
from transfer.frozen.segment import HEAD_FILE, epochs_of, sliding
from transfer.run import origin, save_trained
from transfer.task import Job, Part, Result

MIN_DEPTH, MAX_DEPTH = 1e-3, 10.0  # metres
KINECT = (480, 640)  # px, of NYU's images
# What of those is trained on and scored, rows and columns: Eigen et al.'s crop, and BTS's for the training.
TRAINED, SCORED = (slice(45, 472), slice(43, 608)), (slice(45, 471), slice(41, 601))
TRAINED_HEAD = 3  # forward passes of a head that is trained: its backward pass takes two
DINOV2 = "DINOv2's depth config in Jiawei-Yang/Denoising-ViT evaluation/configs/vitb_nyu_linear_config.py"


@dataclass(frozen=True, kw_only=True)
class DepthRecipe:
    """image_size: side of the square training crops and of the windows of the test; stride: of those. lr: of a batch
    of `batch`. rotate: degrees at most, of half the images; colour: whether half of them change in gamma, brightness
    and colour."""

    image_size: int = bounded(1)
    iterations: int = bounded(1)
    warmup_iterations: int = bounded(0)
    batch: int = bounded(1)
    lr: float = bounded(0)
    betas: tuple[float, float] = bounded(0, 1, below=True, default=(0.9, 0.999))
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
    return found | {"image_size": f"{DINOV2}; {square}; a multiple of the patch", "stride": f"stand-in: {square}"}


class DepthViews:
    """Sample -> (uint8 [3, S, S], {"label": metres [S, S], 0 where unknown}, unreadable file name or ""): BTS's views
    for NYU: without the white border, turned a little, cropped, flipped, with other colours. All of it depends on seed
    and position alone. An image with a side below image_size is scaled up to it."""

    def __init__(self, pairs: Sequence[Pair], r: DepthRecipe, seed: int) -> None:
        self.pairs, self.r, self.seed = pairs, r, seed

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, sample: Sample) -> tuple[Tensor, dict[str, Tensor], str]:
        from torchvision.transforms import v2
        from torchvision.transforms.v2.functional import hflip, pil_to_tensor, rotate

        seed_all(self.seed, sample.position)
        (image_file, depth_file), r = self.pairs[sample.index], self.r
        try:
            image = pil_to_tensor(read_image(image_file))
            depth = torch.from_numpy(nyu.read_depth(depth_file))[None]
        except UNREADABLE:
            shape = r.image_size, r.image_size
            return torch.zeros(3, *shape, dtype=torch.uint8), {"label": torch.zeros(shape)}, str(image_file)
        if tuple(depth.shape[1:]) == KINECT:
            image, depth = image[:, *TRAINED], depth[:, *TRAINED]
        image, depth = at_least(image, depth, r.image_size)
        if r.rotate and torch.rand(()).item() < 0.5:
            degrees = r.rotate * (2 * torch.rand(()).item() - 1)
            image, depth = rotate(image, degrees, v2.InterpolationMode.BILINEAR), rotate(depth, degrees)
        top, left = (int(torch.randint(0, length - r.image_size + 1, ())) for length in depth.shape[1:])
        place = slice(top, top + r.image_size), slice(left, left + r.image_size)
        image, depth = image[:, *place], depth[:, *place]
        if torch.rand(()).item() < r.flip:
            image, depth = hflip(image), hflip(depth)
        return recoloured(image) if r.colour else image, {"label": depth[0]}, ""


def at_least(image: Tensor, depth: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Both scaled up where the short side is below `side`; depths are those of the nearest pixel."""
    from torchvision.transforms import v2
    from torchvision.transforms.v2.functional import resize

    height, width = depth.shape[1:]
    if min(height, width) >= side:
        return image, depth
    size = scaled((height, width), side)
    return resize(image, size, v2.InterpolationMode.BILINEAR), resize(depth, size, v2.InterpolationMode.NEAREST)


def recoloured(image: Tensor) -> Tensor:
    """In half the cases: a gamma of 0.9 to 1.1, brightness times 0.75 to 1.25, each channel times 0.9 to 1.1."""
    if torch.rand(()).item() < 0.5:
        return image
    gamma, brightness = 0.9 + 0.2 * torch.rand(()), 0.75 + 0.5 * torch.rand(())
    channels = 0.9 + 0.2 * torch.rand(3, 1, 1)
    return (255 * ((image / 255) ** gamma * brightness * channels).clamp(0, 1)).round().to(torch.uint8)


class PatchDepth(nn.Module):
    """`Tokens` [B, blocks, 1 + N, D] -> metres [B, 1, 4h, 4w] of the N = h * w patches of the last block, each beside
    the first token. Weights of the bins are interpolated, which is linear, after the layer in place of before it."""

    def __init__(self, dim: int, bins: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2 * dim, bins, 1)
        self.register_buffer("depths", torch.linspace(MIN_DEPTH, MAX_DEPTH, bins), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        side = math.isqrt(tokens.shape[2] - 1)
        patches, first = tokens[:, -1, 1:], tokens[:, -1, :1]
        both = torch.cat([patches, first.expand_as(patches)], dim=2).mT.unflatten(2, (side, side))
        weights = F.interpolate(self.layer(both).float(), scale_factor=4, mode="bilinear").relu() + 0.1
        return torch.einsum("bkhw,k->bhw", weights / weights.sum(dim=1, keepdim=True), self.depths)[:, None]


def loss(head: nn.Module, tokens: Tensor, depth: Tensor) -> Tensor:
    """The mean of `scale_invariant` over the images: one that no micro-batch changes, where DINOv2 takes the pixels of
    its two images a GPU together."""
    predicted = F.interpolate(head(tokens).float(), depth.shape[1:], mode="bilinear")[:, 0]
    return scale_invariant(predicted, depth).mean()


def scale_invariant(predicted: Tensor, depth: Tensor) -> Tensor:
    """Of metres [B, H, W]: [B], sqrt(var(g) + 0.15 mean(g)^2) of the log ratios g of the known pixels (AdaBins, arXiv
    2011.14141, after Eigen et al. 2014); 0 where fewer than two are known."""
    known = (depth > 0).flatten(1)
    ratio = (torch.log(predicted + MIN_DEPTH) - torch.log(depth + MIN_DEPTH)).flatten(1) * known
    count = known.sum(dim=1)
    mean = ratio.sum(dim=1) / count.clamp(min=1)
    variance = ((ratio - mean[:, None]).square() * known).sum(dim=1) / (count - 1).clamp(min=1)
    square = variance + 0.15 * mean.square()
    some = (count > 1) & (square > 0)  # the root has no slope at 0
    return torch.where(some, torch.where(some, square, 1.0).sqrt(), 0.0)


def rate_of(r: DepthRecipe, step: int, steps: int) -> float:
    """Half a cosine, times a line from 0.001 to 1 over the warm-up."""
    rate = r.lr * 0.5 * (1 + math.cos(math.pi * step / steps))
    if step < r.warmup_iterations:
        rate *= 1 - (1 - step / r.warmup_iterations) * (1 - 0.001)
    return rate


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
    state, checksum = train_heads(
        job, tokens, head, views, optimizer, loss, lambda step: rate_of(r, step, steps), epochs
    )
    errors = errors_of(nn.Sequential(tokens, head.eval()), test, job)
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
        notes=state.notes,
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
