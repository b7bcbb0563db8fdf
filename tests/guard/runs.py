"""The short runs, and the numbers that each leaves.

A loss is the mean over an epoch of the training; a metric is that of the task. What a run leaves depends on the machine
only by rounding.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mae_core.checkpoint import read_checkpoint
from mae_core.machine import Machine
from mae_core.training import LOG_FILE
from tests.fixtures import ROOT
from tests.fixtures.miniature import write_few
from transfer.classification.tasks import TASKS as CLASSIFICATION
from transfer.detection.tasks import TASKS as DETECTION
from transfer.miniature import dense, imagenet
from transfer.pyramid import ViTPyramid, load_pyramid
from transfer.run import run_job
from transfer.segmentation.tasks import TASKS as SEGMENTATION
from transfer.task import Job, Task

CHECKPOINT = ROOT / "results" / "miniature" / "mae_mini.safetensors"
Numbers = dict[str, float]


def run(task: Task, engine: str, root: Path, work: Path, **changes: Any) -> Numbers:
    """The losses and the metric of a task by its mini recipe with `changes`, seed 0."""
    checkpoint = read_checkpoint(str(CHECKPOINT))
    recipe = replace(task.recipe(checkpoint.arch, "mini"), **changes)
    work.mkdir(parents=True)
    data = task.inspect(root)
    record = run_job(Job(task, checkpoint, recipe, "mini", changes, data, work, 0, engine, Machine()))
    assert record.status == "ok", record.reason
    epochs = [json.loads(line) for line in (work / LOG_FILE).read_text().splitlines()]
    losses = {f"loss of epoch {number}": epoch["loss"] for number, epoch in enumerate(epochs, 1)}
    return losses | {name: record.metrics[name] for name in ("top1", "aacc") if name in record.metrics}


def finetune(folder: Path) -> Numbers:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(imagenet, "TRAIN", 20)
        patch.setattr(imagenet, "VAL", 10)
        imagenet.imagenet(folder / "data")
    task = next(task for task in CLASSIFICATION if task.name == "imagenet_finetune")
    return run(task, "torch", folder / "data", folder / "work", epochs=15, warmup_epochs=1)


def ade20k(folder: Path) -> Numbers:
    write_few(dense.ade20k, folder / "data", train=64, val=16)
    short = {"iterations": 48, "warmup_iterations": 4}
    return run(SEGMENTATION[0], "mmsegmentation", folder / "data", folder / "work", **short)


def coco(folder: Path) -> Numbers:
    write_few(dense.coco, folder / "data", train=32, val=4)
    return run(DETECTION[0], "torchvision", folder / "data", folder / "work", epochs=3)


def maps(folder: Path) -> Numbers:
    """Some values of the four maps, with bias tables of normal numbers: a training starts them at zero."""
    found: Numbers = {}
    for name, options in (("detection", {"window": 6}), ("segmentation", {"upernet": True})):
        pyramid = ViTPyramid("vit_mini_patch8", 64, **options).eval()
        load_pyramid(pyramid, read_checkpoint(str(CHECKPOINT)))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for key, tensor in sorted(pyramid.named_parameters()):
                if "bias_" in key or (key.startswith("blocks.") and key.endswith(".bias") and key.count(".") == 2):
                    tensor.copy_(torch.randn(tensor.shape, generator=generator))
            third = pyramid(torch.randn(1, 3, 64, 64, generator=generator))[2]
        for index, value in enumerate((third / third.std()).flatten()[::997].tolist()):
            found[f"{name}, value {index}"] = value
    return found


RUNS: dict[str, Callable[[Path], Numbers]] = {"finetune": finetune, "ade20k": ade20k, "coco": coco, "maps": maps}
