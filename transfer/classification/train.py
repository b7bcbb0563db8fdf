"""Training a classifier: one recipe, one loop."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mae_core import distributed
from mae_core.data import Images, normalize, seed_all
from mae_core.errors import UserError
from mae_core.loop import check_batch, fit, micro_batch_for
from mae_core.optim import adamw, half_cosine, lars, layer_decay_groups, learning_rate
from mae_core.remembered import remembered
from mae_core.settings import bounded, check_ranges, choose, unknown
from mae_core.training import State, Training
from mae_core.vit import ViT
from transfer.data.split import Split
from transfer.data.transforms import train_transform
from transfer.data.vtab import TEST, TRAINED_ON
from transfer.task import Job

# The knobs that a training with this optimizer does not use, and the values they must keep. LARS trains only the probe,
# on images that are only cropped and flipped.
UNUSED: dict[str, dict[str, Any]] = {
    "adamw": {"momentum": 0.0, "trust_coefficient": 0.0},
    "lars": {"betas": (0.0, 0.0), "layer_decay": 1.0, "rand_augment": "", "random_erasing": 0.0},
}
POOLS = ("avg", "token")
# Images among which mixup pairs, by one draw of its kind and share: a GPU's batch in the official fine-tuning of ViT-B
# and ViT-L (FINETUNE.md; 16 of ViT-H).
MIXED = 32


@dataclass(frozen=True, kw_only=True)
class ClassifierRecipe:
    """Every number of one classifier's training; the defaults switch things off. Values and their sources:
    transfer/classification/recipes.py.

    optimizer: "adamw" (layer-wise decay of the learning rate) or "lars" (head only). pool: "avg" or "token".
    rand_augment: timm's string, "" for none. ema: decay of the weights' moving average, 0 for none. train_fraction:
    the share of the training images that is used (`Split.share`).
    UserError for an unknown name, and for a knob that would have no effect.
    """

    image_size: int = bounded(1)
    epochs: int = bounded(1)
    warmup_epochs: int = bounded(0)
    batch: int = bounded(1)
    base_lr: float = bounded(0)
    min_lr: float = bounded(0)
    optimizer: str
    betas: tuple[float, float] = bounded(0, 1, below=True, default=(0.0, 0.0))
    momentum: float = bounded(0, 1, below=True, default=0.0)
    trust_coefficient: float = bounded(0, default=0.0)
    weight_decay: float = bounded(0, default=0.0)
    layer_decay: float = bounded(0, 1, default=1.0)
    drop_path: float = bounded(0, 1, below=True, default=0.0)
    pool: str
    head_std: float = bounded(0)
    min_scale: float = bounded(0, 1)
    rand_augment: str = ""
    random_erasing: float = bounded(0, 1, default=0.0)
    mixup: float = bounded(0, default=0.0)
    cutmix: float = bounded(0, default=0.0)
    label_smoothing: float = bounded(0, 1, below=True, default=0.0)
    ema: float = bounded(0, 1, below=True, default=0.0)
    train_fraction: float = bounded(1e-6, 1, default=1.0)

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.pool not in POOLS:
            raise unknown("pool", self.pool, POOLS)
        for knob, value in choose("optimizer", self.optimizer, UNUSED).items():
            if getattr(self, knob) != value:
                raise UserError(f"{knob} does nothing with optimizer {self.optimizer}: leave it at {value!r}")
        if self.rand_augment and (why := misunderstood(self.rand_augment)):
            raise UserError(f"rand_augment={self.rand_augment}: timm does not understand it ({why})")


@remembered
def misunderstood(rand_augment: str) -> str:
    """What timm says of a string that it does not understand; "" if it does."""
    try:
        train_transform(224, 1.0, rand_augment)
    except Exception as e:  # timm parses the string, and may raise anything
        return str(e) or type(e).__name__
    return ""


@dataclass(frozen=True, kw_only=True)
class RepeatedRecipe(ClassifierRecipe):
    """repeated_augmentation: how many augmented samples of each image a batch holds."""

    repeated_augmentation: int = bounded(1)


@dataclass(frozen=True, kw_only=True)
class WholeImageRecipe(ClassifierRecipe):
    """Every image whole, stretched to the input's side, neither cropped nor flipped: where an object is, and how it is
    turned, may be what its class says. scored_on: "test", or "val200", the images to choose values by."""

    min_scale: float = bounded(0, 1, default=1.0)
    scored_on: str = TEST

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("scored_on", self.scored_on, TRAINED_ON)
        for knob, value in {"min_scale": 1.0, "rand_augment": ""}.items():
            if getattr(self, knob) != value:
                raise UserError(f"{knob} does nothing, the images are not cropped or changed: leave it at {value!r}")


def train_classifier(job: Job, model: ViT, split: Split, transform: nn.Module) -> tuple[State, nn.Module]:
    """Train by job.recipe on the split, resuming from the checkpoint in job.work if there is one. Returns the final
    state and the model to evaluate: the moving average of the weights if the recipe has one."""
    from timm.data import Mixup
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
    from timm.utils import ModelEmaV3

    r, machine, normalization = job.recipe, job.machine, job.checkpoint.normalization
    check_batch(len(split.files), r.batch, f"the training split of {job.data.root}")
    local_batch = r.batch // machine.processes
    mixes = r.mixup > 0 or r.cutmix > 0
    if mixes and local_batch % 2:
        raise UserError(f"mixup pairs images: {local_batch} per process must be an even number")
    # 512: the batch of one GPU in the official probe, so that BatchNorm sees the same.
    wanted = machine.micro_batch or (512 if r.optimizer == "lars" else 128)
    # Groups stay whole, and so the same, whatever the micro-batch.
    group = 2 * micro_batch_for(local_batch // 2, MIXED // 2) if mixes else 1
    prepared = group * micro_batch_for(local_batch // group, max(1, wanted // group))
    mixup = Mixup(r.mixup, r.cutmix, label_smoothing=r.label_smoothing, num_classes=model.num_classes)
    loss_function = SoftTargetCrossEntropy() if mixes else LabelSmoothingCrossEntropy(r.label_smoothing)
    if r.optimizer == "lars":
        optimizer: Optimizer = lars(model.head, r.momentum, r.trust_coefficient, r.weight_decay)
    else:
        optimizer = adamw(layer_decay_groups(model, r.weight_decay, r.layer_decay), r.betas)
    model.set_grad_checkpointing(machine.activation_checkpointing)
    ema = ModelEmaV3(model, decay=r.ema) if r.ema else None
    steps_per_epoch, lr = len(split.files) // r.batch, learning_rate(r.base_lr, r.batch)

    def prepare(images: Tensor, labels: Tensor, step: int, first: int) -> tuple[Tensor, Tensor]:
        images = normalize(images, normalization)
        if not mixes:
            return erased(images, r.random_erasing), labels
        targets = []
        for start in range(0, len(images), group):
            seed_all(job.seed, step, first + start, device=machine.device)
            part = slice(start, start + group)
            _, mixed = mixup(erased(images[part], r.random_erasing), labels[part])  # in place
            targets.append(mixed)
        return images, torch.cat(targets)

    state = fit(
        model,
        optimizer,
        Training(
            label=f"{job.task.name} {job.checkpoint.name}",
            work=job.work,
            dataset=Images(split.files, transform, split.labels, seed=job.seed),
            epochs=r.epochs,
            batch=r.batch,
            micro_batch=micro_batch_for(prepared, wanted),
            prepared=prepared,
            seed=job.seed,
            machine=machine,
            fixed=job.identity(),
            tracker=job.tracker,
            lr_at=lambda step: half_cosine(step, steps_per_epoch, lr, r.epochs, r.warmup_epochs, r.min_lr),
            prepare=prepare,
            loss_of=lambda m, images, labels: loss_function(m(images).float(), labels),
            repeats=r.repeated_augmentation if isinstance(r, RepeatedRecipe) else 1,
        ),
        ema,
    )
    trained = ema.module if ema is not None else model
    distributed.broadcast_buffers(trained)
    return state, trained


def erased(images: Tensor, probability: float) -> Tensor:
    """Random erasing by timm, in place: with that probability an image gets a rectangle of normal noise, so it follows
    normalisation."""
    from timm.data.random_erasing import RandomErasing

    return RandomErasing(probability, mode="pixel", device=images.device)(images) if probability else images


def backbone_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in model.state_dict().items() if not name.startswith("head."))
