"""Fine-tuning and linear probing, and what all trainings of a classifier share: the images, the initial model, the
scores, the files that are saved."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from mae_core.checkpoint import load_encoder, metadata_of, model_of, parameters_sha256
from mae_core.data import PILLOW_PIXELS, TORCHVISION_PIXELS, seed_for
from mae_core.files import printable
from mae_core.training import State, unreadable_metadata
from mae_core.vit import ViT, init_as_timm
from transfer.classification.train import WholeImageRecipe, backbone_tensors, train_classifier
from transfer.data.imagenet import read_split, wnids
from transfer.data.labelled import INAT2021, SETS, Reading, read_folder
from transfer.data.lowshot import read_subset, subset_of
from transfer.data.predictions import MAIN, write_predictions
from transfer.data.scores import Scores, evaluate
from transfer.data.split import Split, few_of_both
from transfer.data.transforms import eval_transform, probe_transform, train_transform, whole_transform
from transfer.data.vtab import VTAB, read_vtab
from transfer.run import origin, save_trained
from transfer.task import CLASSIFIER_FILE, Job, Result

WITHOUT_EMA = "without_ema"  # the set that the weights themselves were scored on, beside their moving average


def images_of(job: Job) -> Reading:
    """The task's training images (the recipe's share of them), its validation images and its number of classes."""
    root, known = Path(job.data.root), {known.name: known for known in (*SETS, INAT2021, *VTAB)}
    if job.task.path:
        reading = read_folder(Path(job.task.path))
    elif subset := subset_of(job.task):
        val = read_split(root / "imagenet" / "val")[0]
        reading = Reading(read_subset(root, subset, job.seed)[0], val, len(wnids()))
    elif isinstance(job.recipe, WholeImageRecipe):
        one = known[job.task.name]
        reading = read_vtab(one.below(root), one.counts[0], job.recipe.scored_on)
    elif job.task.name in known:
        reading = known[job.task.name].read(known[job.task.name].below(root))
    else:
        train, val = (read_split(root / "imagenet" / name)[0] for name in ("train", "val"))
        reading = Reading(train, val, len(wnids()))
    train, val = few_of_both(reading.train, reading.val, job.data.limit)
    return replace(reading, train=train.share(job.recipe.train_fraction, job.seed), val=val)


def start_model(job: Job, classes: int | None = None) -> ViT:
    """The checkpoint's encoder, strictly loaded, with a new head (for ImageNet's classes by default). From scratch:
    random weights as the official fine-tuning code draws them."""
    r = job.recipe
    torch.manual_seed(seed_for(job.seed) % 2**63)
    model = model_of(job.checkpoint, r.image_size, classes or len(wnids()), r.pool, r.drop_path)
    if job.task.from_scratch:
        from timm.models.vision_transformer import VisionTransformer

        assert isinstance(model, VisionTransformer)  # a plain one: `scratch_of`
        init_as_timm(model)
    else:
        load_encoder(model, job.checkpoint)
    assert isinstance(model.head, nn.Linear)  # not Identity: the number of classes is not 0
    nn.init.trunc_normal_(model.head.weight, std=r.head_std)
    nn.init.zeros_(model.head.bias)
    return model


def validate(job: Job, model: nn.Module, val: Split) -> Scores:
    """The scores of the validation images."""
    how = "stretch" if isinstance(job.recipe, WholeImageRecipe) else "resize_crop"
    transform = eval_transform(job.recipe.image_size, how)
    return evaluate(model, val, transform, job.checkpoint.normalization, job.machine, job.task.name)


def save_artifacts(
    job: Job, name: str, tensors: dict[str, torch.Tensor], state: State, images: Reading
) -> dict[str, str]:
    """Write trained weights to the work folder. Returns {file name: SHA-256}."""
    metadata = origin(job) | {"image_size": str(job.recipe.image_size)} | unreadable_metadata(state)
    if images.names:
        metadata["classes"] = json.dumps(list(map(printable, images.names)))
    return save_trained(job, name, tensors, metadata | metadata_of(job.checkpoint, job.recipe.pool, tensors))


def trained_result(
    job: Job, state: State, images: Reading, scores: Mapping[str, Scores], artifacts: dict[str, str]
) -> Result:
    """scores: by the name of the set, under which they are kept in the work folder; the metrics are MAIN's."""
    r = job.recipe
    load = "none: initialised as timm 0.3.2, which the official fine-tuning code uses, not as MAE"
    if not job.task.from_scratch:
        with torch.device("meta"):  # to say what loading the encoder did, without taking memory for it again
            model = model_of(job.checkpoint, r.image_size, images.classes, r.pool)
        load = load_encoder(model, job.checkpoint).summary()
    return Result(
        *scores[MAIN].metrics(),
        len(images.val.files),
        images_seen=state.step * r.batch,
        seconds=state.seconds,
        artifacts=artifacts,
        predictions=write_predictions(job.work, {name: each.columns() for name, each in scores.items()}),
        notes=state.notes,
        resolved={
            "load": load,
            "train_images": len(images.train.files),
            "train_pixels": TORCHVISION_PIXELS,
            "val_pixels": PILLOW_PIXELS,
            **({"classes": list(map(printable, images.names))} if images.names else {}),
        },
    )


def finetune(job: Job) -> Result:
    """Train all weights; save the classifier as classifier.safetensors in the work folder."""
    r, images = job.recipe, images_of(job)
    model = start_model(job, images.classes).to(job.machine.device)
    transform: nn.Module = whole_transform(r.image_size)
    if not isinstance(r, WholeImageRecipe):
        transform = train_transform(r.image_size, r.min_scale, r.rand_augment, job.checkpoint.normalization)
    state, trained = train_classifier(job, model, images.train, transform)
    scores = {MAIN: validate(job, trained, images.val)}
    if r.ema:
        scores[WITHOUT_EMA] = validate(job, model, images.val)
    artifacts = save_artifacts(job, CLASSIFIER_FILE, trained.state_dict(), state, images)
    result = trained_result(job, state, images, scores, artifacts)
    if r.ema:
        for values, without in zip((result.metrics, result.stderr), scores[WITHOUT_EMA].metrics()):
            values["top1_without_ema"] = without["top1"]
    return result


def linprobe(job: Job) -> Result:
    """Train a linear layer on the frozen encoder; a checksum proves that the encoder did not change."""
    r, images = job.recipe, images_of(job)
    model = start_model(job, images.classes)
    model.add_module("head", nn.Sequential(nn.BatchNorm1d(model.embed_dim, affine=False, eps=1e-6), model.head))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head."))
    model = model.to(job.machine.device)
    before = parameters_sha256(backbone_tensors(model))
    transform = probe_transform(r.image_size, r.min_scale)
    state, trained = train_classifier(job, model, images.train, transform)
    if parameters_sha256(backbone_tensors(model)) != before:
        raise RuntimeError("the frozen encoder changed while its probe was trained")
    scores = validate(job, trained, images.val)
    head = {name: tensor for name, tensor in trained.state_dict().items() if name.startswith("head.")}
    artifacts = save_artifacts(job, "probe.safetensors", head, state, images)
    result = trained_result(job, state, images, {MAIN: scores}, artifacts)
    resolved = result.resolved | {"batchnorm_batch": state.micro_batch, "backbone_sha256": before}
    official = min(512, r.batch)  # one GPU's share of the official probe's batch
    notes = result.notes
    if state.micro_batch != official:
        notes += (f"BatchNorm saw batches of {state.micro_batch}, not of {official}",)
    return replace(result, notes=notes, resolved=resolved)
