"""Features of a frozen encoder, kept on disk; and k-nearest-neighbour classification by them."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mae_core import distributed
from mae_core.checkpoint import load_encoder, model_of
from mae_core.data import PILLOW_PIXELS, Images, loader
from mae_core.errors import UserError
from mae_core.knn import knn_predict
from mae_core.progress import Progress
from mae_core.settings import bounded, check_ranges, choose
from mae_core.vit import ViT
from transfer.classification.evaluate import forward
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
    """k and temperature of the vote; size (px) and transform (transforms.py, eval_transform) of the images;
    train_fraction: the share of the training images that vote (Split.share)."""

    image_size: int = bounded(1)
    k: int = bounded(1, default=20)
    temperature: float = 0.07
    transform: str = "resize_crop"
    train_fraction: float = bounded(1e-6, 1, default=1.0)

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.temperature <= 0:
            raise UserError(f"temperature={self.temperature:g}: it must be above 0")
        eval_transform(self.image_size or 224, self.transform)


def knn_recipe(arch: str, name: str) -> KnnRecipe:
    """k-NN as DINO evaluates it: no augmentation, no training; "mini" differs only in the size of the images."""
    paper = KnnRecipe(image_size=224)
    return choose("recipe", name, {"paper": paper, "mini": replace(paper, **miniature_size(arch))})


def knn_sources(arch: str) -> dict[str, str]:
    return {field.name: DINO for field in fields(KnnRecipe)}


class Representation(nn.Module):
    """Images -> [B, D] of a `model_of` encoder, after its final norm: the class token or the mean of the patches."""

    def __init__(self, encoder: ViT, pool: str) -> None:
        super().__init__()
        self.encoder, self.pool, self.dim = encoder, pool, encoder.embed_dim

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.encoder.forward_features(images)
        return tokens[:, 0] if self.pool == "token" else tokens[:, self.encoder.num_prefix_tokens :].mean(dim=1)


def knn(job: Job) -> Result:
    """Top-1 of the validation images by their nearest training images, at the recipe's k and at DINO's others.

    The feature is what the checkpoint was trained to represent an image by: the class token after the final norm, or
    BEiT's mean of the patch tokens.
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
    model = Representation(encoder, pool).to(job.machine.device).eval()
    store = feature_folder(job)
    read = (store / "train.safetensors").exists() and (store / "val.safetensors").exists()
    train_features, val_features = (
        features_of(job, model, split, store / f"{name}.safetensors")
        for name, split in (("train", train), ("val", val))
    )
    # The features of all are kept, whatever their share: other shares and other values of k read them too.
    if voters is not train:  # of all images it would be a copy of gigabytes
        place = {file: i for i, file in enumerate(train.files)}
        train_features = train_features[[place[file] for file in voters.files]]
    device = job.machine.device
    labels, truth = torch.tensor(voters.labels), np.array(val.labels)
    metrics, stderr = {}, {}
    usable = [k for k in OTHER_KS if k <= len(voters.files)]
    for k in dict.fromkeys((job.recipe.k, *usable)):
        name = "top1" if k == job.recipe.k else f"top1@{k}"
        found = knn_predict(
            train_features.to(device),
            labels.to(device),
            val_features.to(device),
            len(wnids()),
            k,
            job.recipe.temperature,
        )
        right = (found.cpu().numpy() == truth).mean()
        metrics[name] = 100 * float(right)
        stderr[name] = 100 * float(np.sqrt(right * (1 - right) / len(truth)))
    feature = "class token after the final norm" if pool == "token" else "mean of the patch tokens after the final norm"
    return Result(
        metrics,
        stderr,
        n_eval=len(val.files),
        images_seen=0 if read else len(train.files) + len(val.files),
        resolved={
            "feature": feature,
            "features": store.name,
            "pixels": PILLOW_PIXELS,
            "load": summary,
            "train_images": len(voters.files),
        },
    )


def feature_folder(job: Job) -> Path:
    """Beside the task's runs, so that all of one checkpoint's share them; by what the features depend on."""
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

    Every process computes some batches and leaves them as a file; the first one joins them. UserError for an image that
    cannot be read.
    """
    if path.exists():
        return load_file(path)["features"]
    distributed.barrier()
    path.parent.mkdir(parents=True, exist_ok=True)
    batches = distributed.local_batches(len(split.files), job.machine.micro_batch or 128)
    transform = eval_transform(job.recipe.image_size, job.recipe.transform)
    progress = Progress(f"{job.task.name} features {path.stem}", len(split.files), enabled=distributed.is_main())
    own, bad = own_features(job, model, Images(split.files, transform, pillow=True), batches, progress)
    if broken := [name for names in distributed.gather_to_all(bad) for name in names]:
        raise UserError(f"{broken[0]} cannot be read as an image: replace it; no number is given over part of the data")
    mine = part_file(path, distributed.rank())
    save_file({"features": own, "index": torch.tensor([i for batch in batches for i in batch])}, mine)
    distributed.barrier()
    if distributed.is_main():
        parts = [part_file(path, rank) for rank in range(distributed.world_size())]
        join(parts, len(split.files), path)
    distributed.barrier()
    return load_file(path)["features"]


@torch.inference_mode()
def own_features(
    job: Job, model: Representation, dataset: Images, batches: Sequence[list[int]], progress: Progress
) -> tuple[Tensor, list[str]]:
    found, seen = [], 0
    for images, _, bad in loader(dataset, batches, job.machine.workers, job.machine.device):
        if bad:
            return torch.empty(0), bad
        found.append(forward(model, images, job.checkpoint.normalization, job.machine).cpu())
        seen += len(images)
        progress.update(min(len(dataset), seen * distributed.world_size()), len(images))
        if not found[-1].isfinite().all():
            raise UserError(f"{job.checkpoint.name} gives features that are not finite")
    return torch.cat(found) if found else torch.empty(0, model.dim), []


def part_file(path: Path, rank: int) -> Path:
    return path.with_name(f".{path.stem}.{rank}.part")


def join(parts: Sequence[Path], count: int, path: Path) -> None:
    """Write the parts' rows at their places as one file, and remove the parts."""
    loaded = [load_file(part) for part in parts]
    whole = torch.empty(count, loaded[0]["features"].shape[1])
    for tensors in loaded:
        whole[tensors["index"].long()] = tensors["features"]
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({"features": whole}, temporary)
    temporary.replace(path)
    for part in parts:
        part.unlink()
