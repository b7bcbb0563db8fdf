"""What every training of a classifier shares: its images, the model it starts from, its scores, what it leaves."""

from dataclasses import replace
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mae_core import distributed
from mae_core.checkpoint import load_encoder, metadata_of, model_of, save_weights, sha256_of
from mae_core.data import PILLOW_PIXELS, TORCHVISION_PIXELS, seed_for
from mae_core.training import State
from transfer.classification.evaluate import evaluate
from transfer.classification.transforms import eval_transform
from transfer.data.imagenet import read_split, wnids
from transfer.data.labelled import SETS, Reading, read_folder
from transfer.data.split import Split
from transfer.task import Job, Result

Metrics = tuple[dict[str, float], dict[str, float]]  # by name: values, standard errors


def images_of(job: Job) -> Reading:
    """The training images (the recipe's share of them) and validation images of the job's task, and its number of
    classes."""
    root, known = Path(job.data.root), {known.name: known for known in SETS}
    if job.task.path:
        reading = read_folder(Path(job.task.path))
    elif job.task.name in known:
        reading = known[job.task.name].read(root / job.task.name)
    else:
        train, val = (read_split(root / "imagenet" / name)[0] for name in ("train", "val"))
        reading = Reading(train, val, len(wnids()))
    return replace(reading, train=reading.train.share(job.recipe.train_fraction, job.seed))


def start_model(job: Job, classes: int | None = None) -> VisionTransformer:
    """The encoder of the checkpoint, strictly loaded, under a new head (of ImageNet's classes by default)."""
    r = job.recipe
    torch.manual_seed(seed_for(job.seed) % 2**63)
    model = model_of(job.checkpoint, r.image_size, classes or len(wnids()), r.pool, r.drop_path)
    load_encoder(model, job.checkpoint)
    nn.init.trunc_normal_(model.head.weight, std=r.head_std)
    nn.init.zeros_(model.head.bias)
    return model


def validate(job: Job, model: nn.Module, val: Split) -> Metrics:
    """Metrics and their standard errors."""
    transform = eval_transform(job.recipe.image_size)
    return evaluate(model, val, transform, job.checkpoint.normalization, job.machine, job.task.name).metrics()


def leave(job: Job, name: str, state: dict[str, torch.Tensor], image_size: int) -> dict[str, str]:
    """Write trained weights into the work folder; {file name: SHA-256}."""
    if not distributed.is_main():
        return {}
    metadata = {
        "format": "mae-transfer",
        "arch": job.checkpoint.arch,
        "image_size": str(image_size),
        "task": job.task.name,
    }
    metadata |= {"encoder_sha256": job.checkpoint.sha256, "recipe": job.recipe_name, "seed": str(job.seed)}
    save_weights(job.work / name, state, metadata | metadata_of(job.checkpoint, job.recipe.pool, state))
    return {name: sha256_of(job.work / name)}


def trained_result(job: Job, state: State, images: Reading, scores: Metrics, artifacts: dict[str, str]) -> Result:
    return Result(
        *scores,
        len(images.val.files),
        images_seen=state.step * job.recipe.batch,
        seconds=state.seconds,
        artifacts=artifacts,
        notes=state.notes,
        resolved={
            "load": load_summary(job, images.classes),
            "train_images": len(images.train.files),
            "train_pixels": TORCHVISION_PIXELS,
            "val_pixels": PILLOW_PIXELS,
        },
    )


def load_summary(job: Job, classes: int) -> str:
    """What loading the encoder did, found again without taking memory for it."""
    r = job.recipe
    with torch.device("meta"):
        model = model_of(job.checkpoint, r.image_size, classes, r.pool)
    return load_encoder(model, job.checkpoint).summary()
