"""Features of a frozen encoder, one vector for each image, kept on disk."""

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from mae_core import distributed
from mae_core.checkpoint import save_tensors
from mae_core.data import Images
from mae_core.errors import UserError
from mae_core.files import open_regular
from mae_core.flops import count_flops
from mae_core.outputs import outputs_of
from mae_core.remembered import remembered
from mae_core.vit import ViT, build_vit
from transfer.data.findings import spread
from transfer.data.split import Split
from transfer.data.transforms import eval_transform
from transfer.task import Job

VERSION = 1  # raised whenever the same inputs give other features


class Representation(nn.Module):
    """Images -> [B, D] from an encoder: the class token or the mean of the patch tokens, after the final norm or, with
    norm=False, as the last block leaves them."""

    def __init__(self, encoder: ViT, pool: str, norm: bool = True) -> None:
        super().__init__()
        self.encoder, self.pool, self.norm, self.dim = encoder, pool, norm, encoder.embed_dim
        self.name = "class token" if pool == "token" else "mean of the patch tokens"
        self.name += f" {'after' if norm else 'before'} the final norm"

    def forward(self, images: Tensor) -> Tensor:
        if self.norm:
            tokens = self.encoder.forward_features(images)
            return tokens[:, 0] if self.pool == "token" else tokens[:, self.encoder.num_prefix_tokens :].mean(dim=1)
        last: Any = self.encoder.forward_intermediates(
            images, indices=1, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
        )
        patches, prefix = last[0]
        return prefix[:, 0] if self.pool == "token" else patches.mean(dim=1)


def feature_folder(job: Job, norm: bool = True) -> Path:
    """The folder of the features, beside the task's runs so that those of one checkpoint share it, and named by a hash
    of everything that the features depend on. norm: as `Representation` takes it."""
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
    if not norm:
        depends["norm"] = False
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


def flops(job: Job) -> int:
    """FLOPs of one image's forward pass through the encoder."""
    return encoder_flops(job.checkpoint.arch, job.recipe.image_size)


@remembered
def encoder_flops(arch: str, image_size: int) -> int:
    with torch.device("meta"):
        model = build_vit(arch, image_size)
        image = torch.empty(1, 3, image_size, image_size)
    return count_flops(lambda: model(image), model)
