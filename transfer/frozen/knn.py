"""k-nearest-neighbour classification with the features of a frozen encoder."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mae_core import distributed
from mae_core.checkpoint import load_encoder, model_of
from mae_core.data import PILLOW_PIXELS
from mae_core.errors import UserError
from mae_core.knn import CHUNK, nearest_features, vote
from mae_core.settings import bounded, check_ranges, choose
from mae_core.space import FLOAT, Space
from mae_core.vit import get_arch
from transfer.data.findings import Data
from transfer.data.imagenet import read_split, wnids
from transfer.data.inputs import evaluation, input_objections, of_all, training_images
from transfer.data.predictions import MAIN, names_of, write_predictions
from transfer.data.split import few_of_both
from transfer.data.transforms import sides_of
from transfer.frozen.features import Representation, feature_folder, read_or_computed
from transfer.miniature.imagenet import miniature_size
from transfer.task import Job, Objection, Part, Result

OTHER_KS = (10, 20, 100, 200)  # what DINO evaluates
DINO = "facebookresearch/dino eval_knn.py"


@dataclass(frozen=True)
class KnnRecipe:
    """k and temperature of the vote; size (px) and transform (`eval_transform`) of the images; train_fraction: the
    share of the training images that vote (`Split.share`)."""

    image_size: int = bounded(1)
    k: int = bounded(1, default=20)
    temperature: float = 0.07
    transform: str = "resize_crop"
    train_fraction: float = bounded(1e-6, 1, default=1.0)

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.temperature <= 0:
            raise UserError(f"temperature={self.temperature:g}: it must be above 0")
        sides_of(self.image_size, self.transform)


def recipe(arch: str, name: str) -> KnnRecipe:
    """k-NN as DINO evaluates it: no augmentation, no training; "mini" changes only the size of the images."""
    paper = KnnRecipe(image_size=224)
    return choose("recipe", name, {"paper": paper, "mini": replace(paper, **miniature_size(arch))})


def sources(arch: str) -> dict[str, str]:
    return {field.name: DINO for field in fields(KnnRecipe)}


def knn(job: Job) -> Result:
    """Top-1 of the validation images by their nearest training images, at the recipe's k and at the others of DINO.

    The feature is the one the checkpoint was trained with: the class token after the final norm, or BEiT's mean of the
    patch tokens.
    """
    folder = Path(job.data.root) / "imagenet"
    train, val = few_of_both(read_split(folder / "train")[0], read_split(folder / "val")[0], job.data.limit)
    voters = train.share(job.recipe.train_fraction, job.seed)
    if len(voters.files) < job.recipe.k:
        of_it = f" in its share of {job.recipe.train_fraction:g}" if job.recipe.train_fraction < 1 else ""
        raise UserError(
            f"{folder}/train has {len(voters.files)} images{of_it}, fewer than k={job.recipe.k}: set a smaller k"
        )
    encoder = model_of(job.checkpoint, job.recipe.image_size)
    summary = load_encoder(encoder, job.checkpoint).summary()
    device = job.machine.device
    model = Representation(encoder, job.checkpoint.pool).to(device)
    store = feature_folder(job)
    paths = [store / f"{name}.safetensors" for name in ("train", "val")]
    found = [read_or_computed(job, model, split, path) for split, path in zip((train, val), paths)]
    (train_features, _), (val_features, _) = found
    started = time.monotonic()
    # The store holds the features of all images, so that other shares and other values of k can read them too.
    if voters is not train:  # else indexing would copy gigabytes for nothing
        row = {file: i for i, file in enumerate(train.files)}
        train_features = train_features[[row[file] for file in voters.files]]
    ks = list(dict.fromkeys((job.recipe.k, *(k for k in OTHER_KS if k <= len(voters.files)))))
    rows = [torch.tensor(batch) for batch in distributed.local_batches(len(val.files), CHUNK)]
    mine = val_features[torch.cat([torch.empty(0, dtype=torch.int64), *rows])]
    similarity, nearest = nearest_features(train_features, mine, max(ks), device)
    labels, truth = torch.tensor(voters.labels, device=device)[nearest], np.array(val.labels)
    metrics, stderr = {}, {}
    kept: dict[str, list[str] | np.ndarray] = {"image": names_of(val.files), "label": truth.astype(np.int32)}
    for k in ks:
        name = "top1" if k == job.recipe.k else f"top1@{k}"
        predicted = vote(similarity[:, :k], labels[:, :k], len(wnids()), job.recipe.temperature).cpu().numpy()
        predicted = gathered(predicted).astype(np.int32)
        kept[name] = predicted
        accuracy = (predicted == truth).mean()
        metrics[name] = 100 * float(accuracy)
        stderr[name] = 100 * float(np.sqrt(accuracy * (1 - accuracy) / len(truth)))
    for name, tensor in {"neighbours": nearest, "neighbour_labels": labels, "similarities": similarity}.items():
        values = gathered(tensor[:, : job.recipe.k].cpu().numpy())
        kept[name] = values if name == "similarities" else values.astype(np.int32)
    return Result(
        metrics,
        stderr,
        n_eval=len(val.files),
        images_seen=len(train.files) + len(val.files),
        seconds=sum(seconds for _, seconds in found) + time.monotonic() - started,
        predictions=write_predictions(job.work, {MAIN: kept}),
        resolved={
            "feature": model.name,
            "features": store.name,
            "pixels": PILLOW_PIXELS,
            "load": summary,
            "train_images": len(voters.files),
        },
    )


def gathered(mine: np.ndarray) -> np.ndarray:
    """The rows of every process, in the order of the images; each has those of its `local_batches` of CHUNK."""
    parts = [mine[start : start + CHUNK] for start in range(0, len(mine), CHUNK)]
    return np.concatenate(distributed.gather_in_turn(parts))


def few(recipe: Any, data: Data) -> Any:
    """k-NN's recipe, with no more neighbours than images."""
    return replace(recipe, k=max(1, min(recipe.k, int(data.counts["train"] * recipe.train_fraction))))


def objections(job: Job) -> Iterator[Objection]:
    yield from input_objections(job)
    images, k = training_images(job), job.recipe.k
    if job.data.status == "found" and images < k:
        yield "k", f"k={k}, but there are {images} training images{of_all(job)}: set a smaller k"


def space(job: Job) -> Space:
    """The space for the features of k-NN, which are written in parts and then joined."""
    if feature_folder(job).exists():
        return Space(0, 0)
    dim = get_arch(job.checkpoint.arch).dim
    stays = sum(FLOAT * dim * job.data.counts[split] for split in ("train", "val"))
    return Space(2 * stays, stays)


def parts(job: Job) -> tuple[Part, ...]:
    """The features of all images, unless they are kept already."""
    counts, kept = job.data.counts, feature_folder(job).exists()
    return (evaluation(job.recipe.image_size, 0 if kept else counts["train"] + counts["val"]),)
