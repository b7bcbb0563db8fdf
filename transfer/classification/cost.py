"""What a classifier's job computes: how many images it takes through the ViT, and the FLOPs of one."""

from pathlib import Path

import torch

from mae_core.flops import count_flops
from mae_core.remembered import remembered
from mae_core.settings import as_typed
from mae_core.vit import build_vit, get_arch
from transfer.classification.recipes import finetune_recipe, linprobe_recipe
from transfer.classification.train import ClassifierRecipe
from transfer.data.imagenet import columns
from transfer.data.imagenet_shifts import clean_split
from transfer.data.inputs import evaluation, training_images
from transfer.task import FORWARD, TRAINED, Job, Needs, Part

CLASSES = 1000
WITH_CLEAN = ("imagenet_a", "imagenet_r")  # also evaluated on ImageNet's own images of their classes


def training_parts(job: Job) -> tuple[Part, ...]:
    """Training, and the evaluation at its end: of the moving average of the weights too, where there is one."""
    r = job.recipe
    return trained(job, r, r.image_size), evaluation(r.image_size, job.data.counts["val"] * (2 if r.ema else 1))


def trained(job: Job, r: ClassifierRecipe, size: int) -> Part:
    frozen = r.optimizer == "lars"
    what, passes = ("probe", FORWARD) if frozen else ("training", TRAINED)
    return Part(f"{what}, {size} px, {job.recipe_name}", training_images(job) // r.batch * r.batch * r.epochs, passes)


def partial_parts(job: Job) -> tuple[Part, ...]:
    """The trainings of all numbers of blocks together: the backward pass goes through those that are tuned only. Then
    linear probing, which stands for 0 blocks, though another job may have run it."""
    r, arch = job.recipe, job.checkpoint.arch
    tuned = [min(blocks / get_arch(arch).depth, 1) for blocks in r.blocks if blocks]
    whole = trained(job, r, r.image_size)
    passes = FORWARD + (TRAINED - FORWARD) * sum(tuned) / len(tuned)
    parts = [Part(f"{whole.kind}, last {as_typed(r.blocks)} blocks", whole.images * len(tuned), passes)]
    if 0 in r.blocks:
        parts.append(trained(job, linprobe_recipe(arch, job.recipe_name), r.image_size))
    return (*parts, evaluation(r.image_size, job.data.counts["val"] * len(r.blocks)))


def evaluation_parts(job: Job) -> tuple[Part, ...]:
    counts = job.data.counts
    images = counts.get("images", counts.get("val", 0))
    if job.task.name in WITH_CLEAN:
        clean = clean_split(Path(job.data.root)).of_classes(columns(job.task.name))
        images += len(clean.few(job.data.limit).files)
    return (evaluation(evaluated_size(job), images),)


def evaluated_size(job: Job) -> int:
    """The classifier's own size, if the recipe has no other: of an encoder's, that of its fine-tuning."""
    c = job.checkpoint
    ready = c.kind == "classifier" or job.task.needs is Needs.FINE_TUNED_FILE
    own = c.meta.get("image_size") if ready else finetune_recipe(c.arch, job.recipe_name).image_size
    return job.recipe.image_size or own or get_arch(c.arch).image_size


def flops(job: Job) -> int:
    """FLOPs of one image's forward pass."""
    size = getattr(job.recipe, "image_size", 0) or evaluated_size(job)
    return classifier_flops(job.checkpoint.arch, size, train=False)


@remembered
def classifier_flops(arch: str, image_size: int, train: bool) -> int:
    """FLOPs of one image through the classifier: the forward pass and, in training, the backward pass."""
    with torch.device("meta"):
        model = build_vit(arch, image_size, CLASSES, "avg")
        image = torch.empty(1, 3, image_size, image_size)
    return count_flops(lambda: model(image).sum().backward() if train else model(image), model)
