"""Small generated data trees, models with known answers and jobs for the tests of transfer/."""

import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mae_core.checkpoint import Checkpoint, read_checkpoint
from mae_core.data import MEAN, STD
from mae_core.machine import Machine
from transfer.images import wnids
from transfer.shifted_sets import CORRUPTIONS
from transfer.task import Job, Task

ARCH = "vit_mini_patch8"
CLASSES = (6, 11, 13, 22)  # labels that ImageNet-1k, -A and -R share
# One strong colour per class, so that a few steps of training learn something.
COLOURS = ((220, 40, 40), (40, 200, 60), (50, 70, 230), (230, 210, 40))


def write_noise_image(path: Path, colour: Sequence[int], seed: int, size: tuple[int, int] = (48, 48)) -> None:
    """An image (width, height) of one colour under strong noise."""
    rng = np.random.default_rng(seed)
    pixels = rng.normal(0, 60, (size[1], size[0], 3)) + np.array(colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=95)


def write_split(folder: Path, per_class: int, classes: Sequence[int] = CLASSES, seed: int = 0) -> None:
    """folder/WNID/WNID_i.JPEG: 48 px images of the class's colour."""
    for rank, label in enumerate(classes):
        wnid = wnids()[label]
        for i in range(per_class):
            key = (seed * 100 + label) * 1000 + i
            write_noise_image(folder / wnid / f"{wnid}_{i}.JPEG", COLOURS[rank % len(COLOURS)], key)


def write_imagenet(root: Path, train: int = 8, val: int = 3, classes: Sequence[int] = CLASSES) -> Path:
    """root/imagenet/{train,val} with that many images a class; returns root."""
    write_split(root / "imagenet" / "train", train, classes, seed=1)
    write_split(root / "imagenet" / "val", val, classes, seed=2)
    return root


def write_code(path: Path, code: int) -> None:
    """A 16 px image that says `code` (0..25) by its colour, for TableModel to read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (10 * code, 0, 0)).save(path)


def write_c(root: Path, groups: dict[str, str] | None = None, codes=None) -> Path:
    """root/imagenet-c: 15 corruptions x 5 severities, two classes with two images each. codes: what the images of a
    corruption and severity say (write_code)."""
    for number, corruption in enumerate(sorted(CORRUPTIONS)):
        for severity in (1, 2, 3, 4, 5):
            folder = root / "imagenet-c" / (groups or {}).get(corruption, "") / corruption / str(severity)
            said = codes(number, severity) if codes else [0, 0, 1, 1]
            for i, code in enumerate(said):
                write_code(folder / wnids()[CLASSES[i // 2]] / f"ILSVRC2012_val_{i:08d}.png", code)
    return root


class TableModel(nn.Module):
    """Answers an image of write_code with row `code` of a table of logits: what it says about each image is known."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table, self.num_classes = table, table.shape[1]
        self.batches: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        codes = (images[:, 0].mean(dim=(1, 2)) * STD[0] + MEAN[0]) * 25.5
        return self.table[codes.round().long()]


def one_hot_logits(labels: Sequence[int]) -> Tensor:
    """[len(labels), 1000]: row i is sure of labels[i]."""
    return 8.0 * nn.functional.one_hot(torch.tensor(labels), 1000).float()


def small_checkpoint(seed: int = 0) -> Checkpoint:
    return read_checkpoint(f"random:{ARCH}", seed)


def make_job(task: Task, root: Path, work: Path, machine: Machine | None = None, seed: int = 0, **changes) -> Job:
    """A job of the mini recipe in little (batch 8, 2 epochs), with `changes` of its knobs."""
    recipe = task.recipe(ARCH, "mini")
    if hasattr(recipe, "batch"):
        recipe = replace(recipe, batch=8, epochs=2, warmup_epochs=1)
    recipe = replace(recipe, **changes)
    machine = machine or Machine()
    data = task.look(root)
    return Job(task, small_checkpoint(seed), recipe, "mini", dict(changes), data, work, seed, machine=machine)


def kill_when(there: Callable[[], object], arguments: Sequence[str], cwd: Path, env: Mapping[str, str]) -> None:
    """Start a process, and SIGKILL it as soon as `there` is true; fail if it ends before."""
    process = subprocess.Popen(arguments, cwd=cwd, env=env, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not there() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
