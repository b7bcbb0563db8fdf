"""ImageNet-1k: end-to-end fine-tuning, linear probing, and the evaluation of a released classifier.

python -m transfer.classification --task imagenet_finetune --ckpt FILE --data DIR --out DIR
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mae_core import distributed
from mae_core.checkpoint import load_encoder, save_weights
from mae_core.data import seed_for
from mae_core.errors import UserError
from mae_core.settings import did_you_mean
from mae_core.training import State
from mae_core.vit import build_vit, get_arch
from mae_core.weights_file import sha256_of
from transfer import cli, miniature
from transfer.images import eval_transform, look_imagenet, probe_transform, read_split, train_transform, wnids
from transfer.task import CLASSIFIER_FILE, Job, Result, Task
from transfer.train import (
    ClassifierRecipe,
    EvalRecipe,
    backbone_tensors,
    evaluate,
    parameters_sha256,
    train_classifier,
    trained_classifier,
)

PAPER_9 = "MAE paper, Table 9"
OFFICIAL = "facebookresearch/mae FINETUNE.md and main_finetune.py"
PAPER_10 = "MAE paper, Table 10"
PROBE = "facebookresearch/mae main_linprobe.py"

# Fine-tuning values that depend on the size: epochs, base_lr, layer_decay, drop_path. From FINETUNE.md; the paper's
# Table 9 has base_lr 1e-3 and layer_decay 0.75 for all, drop_path 0.1 for B and L and 0.2 for H. Sizes that MAE never
# fine-tuned (Ti, S, the miniature) take B's.
BY_SIZE = {
    "vit_large_patch16": (50, 1e-3, 0.75, 0.2),
    "vit_huge_patch14": (50, 1e-3, 0.75, 0.3),
}
BASE = (100, 5e-4, 0.65, 0.1)


def finetune_recipe(arch: str, name: str) -> ClassifierRecipe:
    """Fine-tuning end to end. "paper": the official repository's values, which the released classifiers were trained
    with. "mini": for the generated 48 px images, MINI_FINETUNE replaced."""
    epochs, base_lr, layer_decay, drop_path = BY_SIZE.get(arch, BASE)
    paper = ClassifierRecipe(
        image_size=get_arch(arch).image_size,
        epochs=epochs,
        warmup_epochs=5,
        batch=1024,
        base_lr=base_lr,
        min_lr=1e-6,
        optimizer="adamw",
        betas=(0.9, 0.999),
        momentum=0.0,
        trust_coefficient=0.0,
        weight_decay=0.05,
        layer_decay=layer_decay,
        drop_path=drop_path,
        pool="avg",
        head_std=2e-5,
        min_scale=0.08,
        rand_augment="rand-m9-mstd0.5-inc1",
        random_erasing=0.25,
        mixup=0.8,
        cutmix=1.0,
        label_smoothing=0.1,
        ema=0.0,
    )
    return choose(name, paper, MINI_FINETUNE | miniature_size(arch))


def finetune_sources(arch: str) -> dict[str, str]:
    """Where each value of the paper recipe comes from."""
    sized = (
        OFFICIAL if arch in BY_SIZE or arch == "vit_base_patch16" else "stand-in: ViT-B's value, MAE has no such size"
    )
    both = f"{PAPER_9}; {OFFICIAL}"
    sources = dict.fromkeys(ClassifierRecipe.__dataclass_fields__, both)
    sources |= dict.fromkeys(("base_lr", "layer_decay", "drop_path", "epochs"), sized)
    sources |= dict.fromkeys(("pool", "random_erasing", "min_lr", "head_std", "min_scale"), OFFICIAL)
    return sources | dict.fromkeys(("momentum", "trust_coefficient", "ema"), "not used")


def linprobe_recipe(arch: str, name: str) -> ClassifierRecipe:
    """Linear probing of the frozen encoder: class token, BatchNorm without affine, linear layer."""
    paper = ClassifierRecipe(
        image_size=get_arch(arch).image_size,
        epochs=90,
        warmup_epochs=10,
        batch=16384,
        base_lr=0.1,
        min_lr=0.0,
        optimizer="lars",
        betas=(0.0, 0.0),
        momentum=0.9,
        trust_coefficient=0.001,
        weight_decay=0.0,
        layer_decay=1.0,
        drop_path=0.0,
        pool="token",
        head_std=0.01,
        min_scale=0.08,
        rand_augment="",
        random_erasing=0.0,
        mixup=0.0,
        cutmix=0.0,
        label_smoothing=0.0,
        ema=0.0,
    )
    return choose(name, paper, MINI_LINPROBE | miniature_size(arch))


def linprobe_sources(arch: str) -> dict[str, str]:
    sources = dict.fromkeys(ClassifierRecipe.__dataclass_fields__, f"{PAPER_10}; {PROBE}")
    sources |= dict.fromkeys(("trust_coefficient", "pool", "head_std", "min_scale"), PROBE)
    return sources | dict.fromkeys(("betas", "layer_decay", "ema"), "not used")


# All that "mini" changes. Sizes, lengths and rates: images of 48 px, 800 of them, minutes on two cores. Augmentation:
# one shape fills a miniature's image, and RandAugment, erasing and crops of 8 % leave too little of it to see.
MINI_FINETUNE = {
    "epochs": 30,
    "warmup_epochs": 3,
    "batch": 64,
    "base_lr": 8e-3,
    "mixup": 0.0,
    "cutmix": 0.0,
    "drop_path": 0.0,
    "min_scale": 0.3,
    "rand_augment": "",
    "random_erasing": 0.0,
}
MINI_LINPROBE = {"epochs": 40, "warmup_epochs": 4, "batch": 256, "base_lr": 6.4}  # the paper's absolute rate


def miniature_size(arch: str) -> dict[str, int]:
    """The miniature's 48 px, down to a multiple of the patch: a ViT-L runs through it on two cores too."""
    return {"image_size": 48 - 48 % get_arch(arch).patch}


def choose(name: str, paper: ClassifierRecipe, mini: dict) -> ClassifierRecipe:
    recipes = {"paper": paper, "mini": replace(paper, **mini)}
    if name not in recipes:
        raise UserError(f"unknown recipe '{name}'; {did_you_mean(name, list(recipes))}")
    return recipes[name]


def eval_recipe(arch: str, name: str) -> EvalRecipe:
    """The official evaluation: one view, resized and cropped (main_finetune.py --eval)."""
    return choose(name, EvalRecipe(), {})


def eval_sources(arch: str) -> dict[str, str]:
    return {"image_size": "the checkpoint's own", "transform": "facebookresearch/mae util/datasets.py"}


def start_model(job: Job) -> VisionTransformer:
    """The encoder of the checkpoint, strictly loaded, under a new head of 1000 classes."""
    r = job.recipe
    torch.manual_seed(seed_for(job.seed) % 2**63)
    model = build_vit(job.checkpoint.arch, r.image_size, len(wnids()), r.pool, r.drop_path)
    load_encoder(model, job.checkpoint)
    nn.init.trunc_normal_(model.head.weight, std=r.head_std)
    nn.init.zeros_(model.head.bias)
    return model


def finetune(job: Job) -> Result:
    """Train everything; leave the classifier as classifier.safetensors in the work folder."""
    r = job.recipe
    folder = Path(job.data.root) / "imagenet"
    model = start_model(job).to(job.machine.device)
    transform = train_transform(r.image_size, r.min_scale, r.rand_augment, r.random_erasing)
    state, trained = train_classifier(job, model, read_split(folder / "train")[0], transform)
    metrics, stderr, n_eval = validate(job, trained)
    if r.ema:
        metrics["top1_without_ema"] = validate(job, model)[0]["top1"]
    artifacts = leave(job, CLASSIFIER_FILE, trained.state_dict(), r.image_size)
    return trained_result(job, state, metrics, stderr, n_eval, artifacts)


def linprobe(job: Job) -> Result:
    """Train a linear layer on the frozen encoder; prove by checksum that the encoder did not move."""
    r = job.recipe
    folder = Path(job.data.root) / "imagenet"
    model = start_model(job)
    model.head = nn.Sequential(nn.BatchNorm1d(model.embed_dim, affine=False, eps=1e-6), model.head)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head."))
    model = model.to(job.machine.device)
    before = parameters_sha256(backbone_tensors(model))
    state, trained = train_classifier(
        job, model, read_split(folder / "train")[0], probe_transform(r.image_size, r.min_scale)
    )
    if parameters_sha256(backbone_tensors(model)) != before:
        raise RuntimeError("the frozen encoder changed while its probe was trained")
    metrics, stderr, n_eval = validate(job, trained)
    head = {name: tensor for name, tensor in trained.state_dict().items() if name.startswith("head.")}
    artifacts = leave(job, "probe.safetensors", head, r.image_size)
    result = trained_result(job, state, metrics, stderr, n_eval, artifacts)
    official = min(512, r.batch)  # one GPU's share of the official probe's batch
    notes = result.notes
    if state.micro_batch != official:
        notes += (f"BatchNorm saw batches of {state.micro_batch}, not of {official}",)
    return replace(result, notes=notes, resolved={"batchnorm_batch": state.micro_batch, "backbone_sha256": before})


def evaluate_released(job: Job) -> Result:
    """A fine-tuned classifier given as the checkpoint, evaluated on the validation images without training."""
    model, size = trained_classifier(job.checkpoint, job.recipe.image_size, job.machine.device)
    if model.num_classes != len(wnids()):
        raise UserError(f"{job.checkpoint.name} has {model.num_classes} classes, ImageNet-1k has {len(wnids())}")
    val, _ = read_split(Path(job.data.root) / "imagenet" / "val")
    metrics, stderr = evaluate(
        model, val, eval_transform(size, job.recipe.transform), job.machine, job.task.name
    ).metrics()
    return Result(metrics, stderr, len(val.files), len(val.files), resolved={"image_size": size})


def validate(job: Job, model: nn.Module) -> tuple[dict[str, float], dict[str, float], int]:
    val, _ = read_split(Path(job.data.root) / "imagenet" / "val")
    scores = evaluate(model, val, eval_transform(job.recipe.image_size), job.machine, job.task.name)
    return *scores.metrics(), len(val.files)


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
    save_weights(job.work / name, state, metadata)
    return {name: sha256_of(job.work / name)}


def trained_result(
    job: Job,
    state: State,
    metrics: dict[str, float],
    stderr: dict[str, float],
    n_eval: int,
    artifacts: dict[str, str],
) -> Result:
    return Result(
        metrics,
        stderr,
        n_eval,
        images_seen=state.step * job.recipe.batch,
        seconds=state.seconds,
        artifacts=artifacts,
        notes=state.notes,
    )


def write_miniature(root: Path) -> None:
    miniature.imagenet(root)


COMMON = {
    "module": "transfer.classification",
    "metric": "top1",
    "higher_is_better": True,
    "version": 1,
    "look": look_imagenet,
    "miniature": write_miniature,
}
TASKS = (
    Task(
        name="imagenet_finetune",
        title="ImageNet-1k, fine-tuning",
        needs="encoder",
        cost=30,
        recipe=finetune_recipe,
        sources=finetune_sources,
        run=finetune,
        **COMMON,
    ),
    Task(
        name="imagenet_linprobe",
        title="ImageNet-1k, linear probing",
        needs="encoder",
        cost=20,
        recipe=linprobe_recipe,
        sources=linprobe_sources,
        run=linprobe,
        **COMMON,
    ),
    Task(
        name="imagenet_eval",
        title="ImageNet-1k, evaluation of a fine-tuned checkpoint",
        needs="fine-tuned file",
        cost=10,
        recipe=eval_recipe,
        sources=eval_sources,
        run=evaluate_released,
        **COMMON,
    ),
)

if __name__ == "__main__":
    sys.exit(cli.main(TASKS))
