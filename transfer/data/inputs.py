"""What is known of a job's labelled images before it starts: how many it trains on, and whether its input fits."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from mae_core.errors import UserError
from mae_core.loop import batch_within
from mae_core.vit import vit_arguments
from transfer.data.findings import Data
from transfer.task import Job, Objection, Part


def training_images(job: Job) -> int:
    """How many images the recipe's share leaves, as `Split.share` counts them."""
    images, fraction = job.data.counts.get("train", 0), job.recipe.train_fraction
    return images if fraction == 1 else max(int(images * fraction + 1e-9), job.data.counts.get("classes", 0))


def fit_batch(recipe: Any, data: Data) -> Any:
    """A training's recipe, with a batch that the few images of --limit fill."""
    return replace(recipe, batch=batch_within(recipe.batch, int(data.counts["train"] * recipe.train_fraction)))


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


def evaluation(size: int, images: int) -> Part:
    return Part(f"evaluation, {size} px", images)
