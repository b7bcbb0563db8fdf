"""Twin of imagenet_eval: a classifier that our fine-tuning made, scored by our task and by timm's validate.py."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.originals import Call, Difference, check_checkout
from benchmarks.originals.pictures import some_images
from benchmarks.originals.watch import relative
from mae_core.checkpoint import read_checkpoint
from mae_core.checkpoint.export import export
from mae_core.data import MEAN, STD
from mae_core.errors import UserError
from mae_core.vit import get_arch
from transfer.classification.job import finetune
from transfer.classification.recipes import eval_recipe, finetune_recipe
from transfer.classification.robustness import EVAL, run_released, scores_of
from transfer.classification.tasks import FINETUNE
from transfer.data.imagenet import read_split, wnids
from transfer.task import CLASSIFIER_FILE, Job

CHECKPOINT = Path(__file__).parents[2] / "results" / "miniature" / "mae_mini.safetensors"
ARCH, SIZE = "vit_mini_patch8", 48
TRAIN, VAL = 640, 200
RECIPE = replace(finetune_recipe(ARCH, "mini"), epochs=8, warmup_epochs=1)


def evaluation(call: Call) -> list[Difference]:
    """Whether each image's first class is right, and the scores of all."""
    check_checkout(call.checkout, ("validate.py",), "huggingface/pytorch-image-models")
    some_images(call.data, call.work / "imagenet", TRAIN, VAL)
    data = FINETUNE.inspect(call.work)
    if data.status != "found":
        raise UserError(f"{call.data} holds no ImageNet classes ({data.detail})")
    trained = Job(FINETUNE, read_checkpoint(CHECKPOINT), RECIPE, "mini", {}, data, call.work, out=call.work)
    finetune(trained)
    classifier = read_checkpoint(call.work / CLASSIFIER_FILE)
    job = Job(EVAL, classifier, eval_recipe(ARCH, "paper"), "paper", {}, EVAL.inspect(call.work), call.work)
    split, _ = read_split(call.work / "imagenet" / "val")
    scores, metrics = scores_of(job, split), run_released(job).metrics
    ours = dict(zip(map(str, split.files), zip(scores.top1.tolist(), scores.loss.tolist())))
    export(classifier, "timm", call.work / "timm.safetensors")
    (call.work / "classes.txt").write_text("\n".join(wnids()))
    images, theirs = validate(call)
    if ours.keys() != images.keys():
        raise UserError(f"{call.reference}: validate.py saw {len(images)} other images than our {len(ours)}")
    apart = sum(ours[file][0] != images[file][0] for file in ours)
    found = [Difference(f"images of {VAL} whose first class is right", hits(ours), hits(images), apart, 0)]
    worst = max(ours, key=lambda file: relative(ours[file][1], images[file][1]))
    a, b = ours[worst][1], images[worst][1]
    found.append(Difference("loss of the image that differs most, relative", a, b, relative(a, b), 1e-5))
    # validate.py rounds what it returns to four places.
    for metric in ("top1", "top5"):
        a, b = metrics[metric], theirs[metric]
        found.append(Difference(f"{metric}, percent", a, b, abs(a - b), 1e-4))
    return found


Scored = dict[str, tuple[bool, float]]  # by file: whether the first class is right, and the loss


def hits(scored: Scored) -> int:
    return sum(right for right, _ in scored.values())


def validate(call: Call) -> tuple[Scored, dict[str, Any]]:
    """Run timm's script on our exported classifier: each image's scores, and what it returns."""
    a = get_arch(ARCH)
    model = {"img_size": SIZE, "patch_size": a.patch, "embed_dim": a.dim, "depth": a.depth, "num_heads": a.heads}
    flags: dict[str, Any] = {"--data-dir": call.work / "imagenet" / "val", "--class-map": call.work / "classes.txt"}
    flags |= {"--model": "vit_tiny_patch16_224", "--checkpoint": call.work / "timm.safetensors", "--gp": "avg"}
    flags |= {"--num-classes": len(wnids()), "--img-size": SIZE, "--crop-pct": 224 / 256, "--interpolation": "bicubic"}
    flags |= {"--device": "cpu", "--workers": 0, "--batch-size": 50}
    arguments = [str(text) for flag in flags.items() for text in flag]
    for flag, values in (("--mean", MEAN), ("--std", STD)):
        arguments += [flag, *map(str, values)]
    arguments += ["--model-kwargs", *(f"{name}={value}" for name, value in model.items())]
    script, datasets = load(call.checkout), []
    scored: list[tuple[bool, float]] = []

    def create_dataset(**options: Any) -> Any:
        datasets.append(original(**options))
        return datasets[0]

    def accuracy(output: Tensor, target: Tensor, **options: Any) -> Any:
        right = output.argmax(dim=1) == target
        scored.extend(zip(right.tolist(), cross_entropy(output, target, reduction="none").tolist()))
        return measured(output, target, **options)

    original, measured = script.create_dataset, script.accuracy
    with patch.object(script, "create_dataset", create_dataset), patch.object(script, "accuracy", accuracy):
        results = script.validate(script.parser.parse_args(arguments))
    return dict(zip(datasets[0].filenames(absolute=True), scored, strict=True)), results


def load(folder: Path) -> ModuleType:
    """validate.py, with the installed timm: the checkout has one of its own, of another version."""
    with patch.object(sys, "path", [*sys.path, str(folder.resolve())]):
        return importlib.import_module("validate")
