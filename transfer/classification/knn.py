"""Features of a frozen encoder, kept on disk, and k-nearest-neighbour classification with them."""

import contextlib
import hashlib
import json
import os
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from mae_core import distributed
from mae_core.checkpoint import load_encoder, model_of, save_tensors
from mae_core.data import PILLOW_PIXELS, Images
from mae_core.errors import UserError
from mae_core.files import open_regular
from mae_core.knn import CHUNK, nearest_features, vote
from mae_core.settings import bounded, check_ranges, choose
from mae_core.vit import ViT
from transfer.classification.evaluate import outputs_of
from transfer.classification.recipes import miniature_size
from transfer.classification.transforms import eval_transform
from transfer.data.findings import spread
from transfer.data.imagenet import read_split, wnids
from transfer.data.predictions import MAIN, names_of, write_predictions
from transfer.data.split import Split, few_of_both
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
    train, val = few_of_both(read_split(folder / "train")[0], read_split(folder / "val")[0], job.data.limit)
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
    feature = "class token after the final norm" if pool == "token" else "mean of the patch tokens after the final norm"
    return Result(
        metrics,
        stderr,
        n_eval=len(val.files),
        images_seen=len(train.files) + len(val.files),
        seconds=sum(seconds for _, seconds in found) + time.monotonic() - started,
        predictions=write_predictions(job.work, {MAIN: kept}),
        resolved={
            "feature": feature,
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

    Every process computes some batches and writes them to a part file; the first one joins the parts. A file that is
    damaged or of other images is replaced. UserError for an image that cannot be read.
    """
    return read_or_computed(job, model, split, path)[0]


def read_or_computed(job: Job, model: Representation, split: Split, path: Path) -> tuple[Tensor, float]:
    """What `features_of` returns, and the seconds that computing it took, now or when the file was written (which only
    the first process knows)."""
    images = digest_of_images(split) if distributed.is_main() else ""
    kept = kept_features(path, images) if distributed.is_main() else None
    if not distributed.gather_to_all(kept is not None)[0]:
        # run_job holds the claim on the job's own folder already.
        with contextlib.nullcontext() if path.parent == job.work else distributed.alone_in(path.parent, wait=True):
            kept = kept_features(path, images) if distributed.is_main() else None
            if not distributed.gather_to_all(kept is not None)[0]:  # else another run has computed them meanwhile
                compute(job, model, split, path, images)
                kept = kept_features(path, images) if distributed.is_main() else None
    return kept or (load_file(path)["features"], 0.0)


def compute(job: Job, model: Representation, split: Split, path: Path, images: str) -> None:
    started = time.monotonic()
    transform = eval_transform(job.recipe.image_size, job.recipe.transform)
    dataset, label = Images(split.files, transform, pillow=True), f"{job.task.name} features {path.stem}"
    rows = [torch.empty(0, model.dim)]
    for features, _ in outputs_of(model, dataset, job.checkpoint.normalization, job.machine, label):
        if not features.isfinite().all():
            raise UserError(f"{job.checkpoint.name} gives features that are not finite")
        rows.append(features.cpu())
    parts = [path.with_name(f".{path.stem}.{rank}.part") for rank in range(distributed.world_size())]
    indices = [i for batch in distributed.local_batches(len(dataset), job.machine.micro_batch or 128) for i in batch]
    save_tensors(parts[distributed.rank()], {"features": torch.cat(rows), "index": torch.tensor(indices)}, {})
    distributed.barrier()
    if distributed.is_main():
        join(parts, len(dataset), path, {"images": images, "seconds": f"{time.monotonic() - started:.1f}"})
    distributed.barrier()


def digest_of_images(split: Split) -> str:
    """SHA-256 over every file's size and time of change, and over the contents of some files spread over the list."""
    digest = hashlib.sha256()
    for file in split.files:
        with contextlib.suppress(OSError):  # the image will be named as it is read
            found = os.stat(file)
            digest.update(f"{found.st_size} {found.st_mtime_ns}\n".encode())
    for index in spread(len(split.files)):
        with contextlib.suppress(OSError), open_regular(split.files[index]) as image:
            digest.update(hashlib.sha256(image.read()).digest())
    return digest.hexdigest()


def kept_features(path: Path, images: str) -> tuple[Tensor, float] | None:
    """The features in a file and the seconds they took; None, with a word, if they are not those that were written, or
    not of these images."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata, features = file.metadata() or {}, file.get_tensor("features")
        damaged, seconds = metadata.get("sha256") != checksum(features), float(metadata["seconds"])
    except (OSError, SafetensorError, KeyError, ValueError):
        metadata, damaged = {}, True
    if not damaged and metadata.get("images") == images:
        return features, seconds
    print(f"{path} is {'damaged' if damaged else 'of other images'}: its features are computed again", flush=True)
    return None


def checksum(features: Tensor) -> str:
    return hashlib.sha256(features.numpy().data).hexdigest()


def join(parts: list[Path], count: int, path: Path, metadata: dict[str, str]) -> None:
    """Write the rows of all parts to one file, in the order of their indices, and remove the parts."""
    loaded = [load_file(part) for part in parts]
    whole = torch.empty(count, loaded[0]["features"].shape[1])
    for tensors in loaded:
        whole[tensors["index"].long()] = tensors["features"]
    save_tensors(path, {"features": whole}, metadata | {"sha256": checksum(whole)})
    for part in parts:
        part.unlink()
