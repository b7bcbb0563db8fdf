"""What is known of a classifier's job before it starts: the objections to it, and the space its files need."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from mae_core.errors import UserError
from mae_core.loop import batch_objections, batch_within, batchnorm_objections
from mae_core.settings import as_typed
from mae_core.space import FLOAT, Space, training_space
from mae_core.vit import get_arch, vit_arguments
from transfer.classification.knn import feature_folder
from transfer.classification.recipes import linprobe_recipe
from transfer.data.findings import Data
from transfer.space import encoder_numbers
from transfer.task import Job, Objection

MOMENTS = {"adamw": 2, "lars": 1}


def training_images(job: Job) -> int:
    """How many images the recipe's share leaves, as `Split.share` counts them."""
    images, fraction = job.data.counts.get("train", 0), job.recipe.train_fraction
    return images if fraction == 1 else max(int(images * fraction + 1e-9), job.data.counts.get("classes", 0))


def fit_batch(recipe: Any, data: Data) -> Any:
    """A training's recipe, with a batch that the few images of --limit fill."""
    return replace(recipe, batch=batch_within(recipe.batch, int(data.counts["train"] * recipe.train_fraction)))


def fit_k(recipe: Any, data: Data) -> Any:
    """k-NN's recipe, with no more neighbours than images."""
    return replace(recipe, k=max(1, min(recipe.k, int(data.counts["train"] * recipe.train_fraction))))


def detail(job: Job) -> str:
    """What the plan says about the data."""
    share = f", of which {training_images(job)} are trained on" if job.recipe.train_fraction < 1 else ""
    return job.data.detail + share


def of_all(job: Job) -> str:
    return f" (train_fraction={job.recipe.train_fraction:g})" if job.recipe.train_fraction < 1 else ""


def input_objections(job: Job) -> Iterator[Objection]:
    try:
        vit_arguments(job.checkpoint.arch, job.recipe.image_size or None)
    except UserError as e:
        yield "image_size", str(e)


def training_objections(job: Job) -> Iterator[Objection]:
    r, machine = job.recipe, job.machine
    yield from input_objections(job)
    if job.data.status == "found":
        yield from batch_objections(training_images(job), r.batch, machine.processes, of_all(job))
    if r.batch % machine.processes:
        return
    local_batch = r.batch // machine.processes
    if (r.mixup or r.cutmix) and local_batch % 2:
        flag = "--gpus" if machine.processes > 1 else "batch"
        yield flag, f"mixup pairs images, but each process gets {local_batch} of batch={r.batch}: make that even"
    if r.optimizer == "lars":  # the linear probe has a BatchNorm
        yield from batchnorm_objections(local_batch, machine)


def knn_objections(job: Job) -> Iterator[Objection]:
    yield from input_objections(job)
    images, k = training_images(job), job.recipe.k
    if job.data.status == "found" and images < k:
        yield "k", f"k={k}, but there are {images} training images{of_all(job)}: set a smaller k"


def partial_objections(job: Job) -> Iterator[Objection]:
    """Those of any training, and those of linear probing, the curve's first point, which has its own recipe."""
    arch, blocks, images = job.checkpoint.arch, job.recipe.blocks, training_images(job)
    depth = get_arch(arch).depth
    if blocks[-1] > depth:
        yield "blocks", f"blocks={as_typed(blocks)}, but {arch} has {depth} blocks: set numbers up to {depth}"
    batch = linprobe_recipe(arch, job.recipe_name).batch
    if 0 in blocks and job.data.status == "found" and not job.data.limit and images < batch:
        why = f"0 blocks means linear probing by its own recipe, whose batch={batch} is larger than the {images}"
        yield "blocks", f"{why} training images: leave 0 out of blocks"
    yield from training_objections(job)


def classifier_space(job: Job, classes: int = 1000) -> Space:
    """The space for training the encoder and a linear layer on it, or only that layer (LARS)."""
    r, encoder = job.recipe, encoder_numbers(job.checkpoint)
    head = classes * (get_arch(job.checkpoint.arch).dim + 1)
    model, trained = encoder + head, head if r.optimizer == "lars" else encoder + head
    return training_space(job.work, model, trained, MOMENTS[r.optimizer], averaged=model if r.ema else 0)


def knn_space(job: Job) -> Space:
    """The space for the features of k-NN, which are written in parts and then joined."""
    if feature_folder(job).exists():
        return Space(0, 0)
    dim = get_arch(job.checkpoint.arch).dim
    stays = sum(FLOAT * dim * job.data.counts[split] for split in ("train", "val"))
    return Space(2 * stays, stays)
