"""A fine-tuned ImageNet classifier on ImageNet-V2, ReaL and ObjectNet, without training."""

from dataclasses import replace
from pathlib import Path

from transfer.classification import robustness
from transfer.classification.robustness import evaluated, scores_of
from transfer.data.imagenet_retests import (
    accepted_by,
    inspect_real,
    inspect_v2,
    read_v2,
    real_labels,
    real_split,
    v2_folder,
)
from transfer.data.objectnet import BORDER, accepted_classes, folder_of, inspect_objectnet, read_objectnet
from transfer.miniature import imagenet as miniature
from transfer.task import Job, Result


def run_v2(job: Job) -> Result:
    folder = v2_folder(Path(job.data.root))
    assert folder is not None  # or its data would not have been found
    return evaluated(job, scores_of(job, read_v2(folder)[0].few(job.data.limit)))


def run_real(job: Job) -> Result:
    """Right is any of an image's labels; images without one are left out."""
    root = Path(job.data.root)
    split = real_split(root)[0].few(job.data.limit)
    return evaluated(job, scores_of(job, split, accepted=accepted_by(real_labels(root), split)))


def run_objectnet(job: Job) -> Result:
    """All 1000 classes compete; right are those of the image's object. The images' red border is cut off."""
    folder = folder_of(Path(job.data.root))
    assert folder is not None  # or its data would not have been found
    split = read_objectnet(folder)[0].few(job.data.limit)
    return evaluated(job, scores_of(job, split, accepted=accepted_classes(split), border=BORDER))


V2 = replace(
    robustness.IMAGENET_A,
    name="imagenet_v2",
    title="ImageNet-V2, matched frequency",
    cost=40,
    inspect=inspect_v2,
    run=run_v2,
    miniature=miniature.imagenet_v2,
    opt_in=True,
)
TASKS = (
    V2,
    replace(
        V2,
        name="imagenet_real",
        title="ImageNet-1k with ReaL labels",
        cost=43,
        inspect=inspect_real,
        run=run_real,
        miniature=miniature.imagenet_real,
    ),
    replace(
        V2,
        name="objectnet",
        title="ObjectNet",
        cost=42,
        inspect=inspect_objectnet,
        run=run_objectnet,
        miniature=miniature.objectnet,
    ),
)
