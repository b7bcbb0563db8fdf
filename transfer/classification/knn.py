"""Features of a frozen encoder, kept on disk, and k-nearest-neighbour classification with them."""

import hashlib
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mae_core import distributed
from mae_core.checkpoint import load_encoder, model_of
from mae_core.data import PILLOW_PIXELS, Images
from mae_core.errors import UserError
from mae_core.knn import knn_predict
from mae_core.settings import bounded, check_ranges, choose, replacing
from mae_core.vit import ViT
from transfer.classification.evaluate import outputs_of
from transfer.classification.recipes import miniature_size
from transfer.classification.transforms import eval_transform
from transfer.data.imagenet import read_split, wnids
from transfer.data.split import Split
from transfer.task import Job, Result

OTHER_KS = (10, 20, 100, 200)  # what DINO evaluates
DINO = "facebookresearch/dino eval_knn.py"
VERSION = 1  # raised whenever the same inputs give other features


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
        eval_transform(self.image_size, self.transform)


def knn_recipe(arch: str, name: str) -> KnnRecipe:
    """k-NN as DINO evaluates it: no augmentation, no training; "mini" changes only the size of the images."""
    paper = KnnRecipe(image_size=224)
    return choose("recipe", name, {"paper": paper, "mini": replace(paper, **miniature_size(arch))})


def knn_sources(arch: str) -> dict[str, str]:
    return {field.name: DINO for field in fields(KnnRecipe)}


class Representation(nn.Module):
    """Images -> [B, D] from an encoder, after its final norm: the class token or the mean of the patch tokens."""

    def __init__(self, encoder: ViT, pool: str) -> None:
        super().__init__()
        self.encoder, self.pool, self.dim = encoder, pool, encoder.embed_dim

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.encoder.forward_features(images)
        return tokens[:, 0] if self.pool == "token" else tokens[:, self.encoder.num_prefix_tokens :].mean(dim=1)


def knn(job: Job) -> Result:
    """Top-1 of the validation images by their nearest training images, at the recipe's k and at the others of DINO.

    The feature is the one the checkpoint was trained with: the class token after the final norm, or BEiT's mean of the
    patch tokens.
    """
    folder = Path(job.data.root) / "imagenet"
    (train, _), (val, _) = read_split(folder / "train"), read_split(folder / "val")
    voters = train.share(job.recipe.train_fraction, job.seed)
    if len(voters.files) < job.recipe.k:
        of_it = f" in its share of {job.recipe.train_fraction:g}" if job.recipe.train_fraction < 1 else ""
        raise UserError(
            f"{folder}/train has {len(voters.files)} images{of_it}, fewer than k={job.recipe.k}: set a smaller k"
        )
    pool = job.checkpoint.pool
    encoder = model_of(job.checkpoint, job.recipe.image_size)
    summary = load_encoder(encoder, job.checkpoint).summary()
    device = job.machine.device
    model = Representation(encoder, pool).to(device)
    store = feature_folder(job)
    paths = [store / f"{name}.safetensors" for name in ("train", "val")]
    cached = all(path.exists() for path in paths)
    train_features, val_features = (features_of(job, model, s, path) for s, path in zip((train, val), paths))
    # The store holds the features of all images, so that other shares and other values of k can read them too.
    if voters is not train:  # else indexing would copy gigabytes for nothing
        row = {file: i for i, file in enumerate(train.files)}
        train_features = train_features[[row[file] for file in voters.files]]
    train_features, val_features = train_features.to(device), val_features.to(device)
    labels, truth = torch.tensor(voters.labels, device=device), np.array(val.labels)
    metrics, stderr = {}, {}
    usable = [k for k in OTHER_KS if k <= len(voters.files)]
    for k in dict.fromkeys((job.recipe.k, *usable)):
        name = "top1" if k == job.recipe.k else f"top1@{k}"
        predicted = knn_predict(train_features, labels, val_features, len(wnids()), k, job.recipe.temperature)
        accuracy = (predicted.cpu().numpy() == truth).mean()
        metrics[name] = 100 * float(accuracy)
        stderr[name] = 100 * float(np.sqrt(accuracy * (1 - accuracy) / len(truth)))
    feature = "class token after the final norm" if pool == "token" else "mean of the patch tokens after the final norm"
    return Result(
        metrics,
        stderr,
        n_eval=len(val.files),
        images_seen=0 if cached else len(train.files) + len(val.files),
        resolved={
            "feature": feature,
            "features": store.name,
            "pixels": PILLOW_PIXELS,
            "load": summary,
            "train_images": len(voters.files),
        },
    )


def feature_folder(job: Job) -> Path:
    """The folder of the features, beside the task's runs so that those of one checkpoint share it, and named by a hash
    of everything that the features depend on."""
    c = job.checkpoint
    depends = {
        "version": VERSION,
        "checkpoint": c.identity,
        "seed": job.seed if c.format == "random" else None,
        "input": [c.mean, c.std, c.eps, c.pool],
        "image_size": job.recipe.image_size,
        "transform": job.recipe.transform,
        "precision": job.machine.precision,
        "data": job.data.fingerprint,
    }
    digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
    return job.work.parent / f"features-{digest[:12]}"


def features_of(job: Job, model: Representation, split: Split, path: Path) -> Tensor:
    """[images, D] in float32, in the order of the split: read from the file, or computed and written to it.

    Every process computes some batches and writes them to a part file; the first one joins the parts. UserError for an
    image that cannot be read.
    """
    if path.exists():
        return load_file(path)["features"]
    distributed.barrier()
    path.parent.mkdir(parents=True, exist_ok=True)
    transform = eval_transform(job.recipe.image_size, job.recipe.transform)
    dataset, label = Images(split.files, transform, pillow=True), f"{job.task.name} features {path.stem}"
    rows = [torch.empty(0, model.dim)]
    for features, _ in outputs_of(model, dataset, job.checkpoint.normalization, job.machine, label):
        if not features.isfinite().all():
            raise UserError(f"{job.checkpoint.name} gives features that are not finite")
        rows.append(features.cpu())
    parts = [path.with_name(f".{path.stem}.{rank}.part") for rank in range(distributed.world_size())]
    indices = [i for batch in distributed.local_batches(len(dataset), job.machine.micro_batch or 128) for i in batch]
    save_file({"features": torch.cat(rows), "index": torch.tensor(indices)}, parts[distributed.rank()])
    distributed.barrier()
    if distributed.is_main():
        join(parts, len(dataset), path)
    distributed.barrier()
    return load_file(path)["features"]


def join(parts: list[Path], count: int, path: Path) -> None:
    """Write the rows of all parts to one file, in the order of their indices, and remove the parts."""
    loaded = [load_file(part) for part in parts]
    whole = torch.empty(count, loaded[0]["features"].shape[1])
    for tensors in loaded:
        whole[tensors["index"].long()] = tensors["features"]
    with replacing(path) as temporary:
        save_file({"features": whole}, temporary)
    for part in parts:
        part.unlink()
