"""A fine-tuned ImageNet classifier, only evaluated: on ImageNet's validation images and on ImageNet-A, -R, -C, -Sketch.

python -m transfer.classification --task imagenet_a imagenet_r --ckpt FINE_TUNED --data DIR --out DIR
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mae_core.checkpoint import Checkpoint
from mae_core.data import PILLOW_PIXELS, Normalization
from mae_core.decode import UNREADABLE, read_image
from mae_core.errors import UserError
from mae_core.vit import ViT
from transfer.classification import cost
from transfer.classification.evaluate import EvalRecipe, trained_classifier
from transfer.classification.recipes import eval_recipe, eval_sources
from transfer.data.findings import of_limited
from transfer.data.imagenet import columns, inspect_imagenet_val, read_split, wnids
from transfer.data.imagenet_shifts import (
    SEVERITIES,
    clean_split,
    fingerprint_c,
    folder_of,
    inspect_c,
    inspect_shift,
    read_c,
)
from transfer.data.inputs import input_objections
from transfer.data.predictions import MAIN, Columns, names_of, prediction_space, write_predictions
from transfer.data.scores import Scores, evaluate
from transfer.data.split import Split, joined
from transfer.data.transforms import eval_transform
from transfer.miniature import imagenet as miniature
from transfer.task import Job, Needs, Result, Task

# AlexNet's top-1 error, the mean over the five severities: google-research/augmix imagenet.py. Keyed by name, because
# other scripts list the corruptions in another order.
ALEXNET_ERROR = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}


def recipe_c(arch: str, name: str) -> EvalRecipe:
    """ImageNet-C: its files are 224 px already, and a classifier of that size gets them as they are, as in its authors'
    script; for any other size they are resized. The paper does not say what it did; --set
    imagenet_c.transform=resize_crop is the other way in use."""
    return replace(eval_recipe(arch, name), transform="resize")


def sources(arch: str) -> dict[str, str]:
    return {"image_size": "the classifier's own", "transform": "facebookresearch/mae util/datasets.py"}


def sources_c(arch: str) -> dict[str, str]:
    said = "stand-in: hendrycks/robustness ImageNet-C/test.py; the paper does not state its transform"
    return sources(arch) | {"transform": said}


@cache
def load_once(checkpoint: Checkpoint, image_size: int, device: str) -> tuple[ViT, int]:
    """The classifier and its input size, loaded once for all the sets that a process evaluates."""
    model, size = trained_classifier(checkpoint, image_size, device)
    if model.num_classes != len(wnids()):
        raise UserError(f"{checkpoint.name} has {model.num_classes} classes, ImageNet-1k has {len(wnids())}")
    return model, size


def classifier(job: Job) -> tuple[ViT, int]:
    return load_once(job.parent or job.checkpoint, job.recipe.image_size, job.machine.device)


def normalization_of(job: Job) -> Normalization:
    return (job.parent or job.checkpoint).normalization


def scores_of(
    job: Job,
    split: Split,
    label: str = "",
    kept: Sequence[int] | None = None,
    accepted: Sequence[Collection[int]] | None = None,
    border: int = 0,
) -> Scores:
    """A split scored by the job's classifier. kept: only these classes compete. accepted: all classes that are right,
    for each image. border: px that are cut off each side of the images first."""
    model, size = classifier(job)
    transform, label = eval_transform(size, job.recipe.transform, border), f"{job.task.name} {label}".strip()
    return evaluate(model, split, transform, normalization_of(job), job.machine, label, kept, accepted)


def resolved(job: Job) -> dict[str, Any]:
    return {"image_size": classifier(job)[1], "val_pixels": PILLOW_PIXELS}


def evaluated(job: Job, scores: Scores, **others: Scores) -> Result:
    """The scores of the job's own set; all are kept in the work folder, others by the names of their sets."""
    images, sets = len(scores.loss), {MAIN: scores, **others}
    return Result(
        *scores.metrics(),
        n_eval=images,
        images_seen=sum(len(each.loss) for each in sets.values()),
        resolved=resolved(job),
        predictions=write_predictions(job.work, {name: each.columns() for name, each in sets.items()}),
    )


def shifted_split(job: Job) -> Split:
    folder = folder_of(Path(job.data.root), job.task.name)
    assert folder is not None  # or its data would not have been found
    return read_split(folder)[0].few(job.data.limit)


def run_released(job: Job) -> Result:
    """ImageNet's own validation images. Where it is fp32, all of it is: cuDNN would round a convolution's inputs."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        split = read_split(Path(job.data.root) / "imagenet" / "val")[0].few(job.data.limit)
        return evaluated(job, scores_of(job, split))


def run_200(job: Job) -> Result:
    """ImageNet-A or -R: the 200 classes of the set compete among themselves; beside it the same on clean images."""
    kept = columns(job.task.name)
    scores = scores_of(job, shifted_split(job), kept=kept)
    images = clean_split(Path(job.data.root)).of_classes(kept).few(job.data.limit)
    if not images.files:
        result = evaluated(job, scores)
        return replace(result, notes=("no clean accuracy: ImageNet's validation images are not there",))
    clean = scores_of(job, images, "clean", kept)
    result, (metrics, stderr) = evaluated(job, scores, clean=clean), clean.metrics()
    return replace(
        result,
        metrics=result.metrics | {"clean_200_top1": metrics["top1"]},
        stderr=result.stderr | {"clean_200_top1": stderr["top1"]},
    )


def run_sketch(job: Job) -> Result:
    return evaluated(job, scores_of(job, shifted_split(job)))


def run_c(job: Job) -> Result:
    """ImageNet-C: mCE over the 15 corruptions, normalised by AlexNet; the error of each corruption and severity. What
    it reads is compared with what was found before, which may have been long ago."""
    root, limit = Path(job.data.root), job.data.limit
    there, _ = read_c(root)
    if of_limited(fingerprint_c(root, there), limit) != job.data.fingerprint:
        raise UserError(f"{root / 'imagenet-c'} has changed since it was looked through: start the same command again")
    wrong: dict[str, list[np.ndarray]] = {}
    sets: dict[str, Columns] = {}
    images: list[str] = []
    for number, corruption in enumerate(ALEXNET_ERROR):
        splits = [there[f"{corruption}/{s}"].few(limit) for s in SEVERITIES]
        if job.recipe.transform == "center_crop":
            check_crop(splits[0].files[0], classifier(job)[1])
        scores = scores_of(job, joined(splits), f"{number + 1}/15 {corruption}")
        images = images or names_of(splits[0].files)  # those of all 75 folders, or there would be no number
        starts = [len(images) * i for i in range(len(splits) + 1)]
        parts = [scores.part(start, end, images) for start, end in pairwise(starts)]
        wrong[corruption] = [~part.top1 for part in parts]
        sets |= {f"{corruption}/{s}": part.columns() for s, part in zip(SEVERITIES, parts)}
    errors = {c: [float(part.mean()) for part in parts] for c, parts in wrong.items()}
    metrics = {"mce": mce(errors), "mean_err": 100 * float(np.mean([np.mean(e) for e in errors.values()]))}
    count = sum(len(part) for parts in wrong.values() for part in parts)
    return Result(
        metrics,
        mce_stderr(wrong),
        n_eval=count,
        images_seen=count,
        tables={"error_percent_by_corruption_and_severity": {c: [100 * e for e in v] for c, v in errors.items()}},
        resolved=resolved(job),
        predictions=write_predictions(job.work, sets),
    )


def check_crop(file: Path, size: int) -> None:
    try:
        side = min(read_image(file).size)
    except UNREADABLE as e:
        raise UserError(f"{file} cannot be read as an image ({e}): replace it") from None
    if size > side:
        raise UserError(
            f"ImageNet-C's images are {side} px, a centre crop of {size} px would add a black border: "
            "set transform=resize"
        )


def mce(errors: dict[str, list[float]]) -> float:
    """Mean corruption error in percent: the mean over the 15 corruptions of the model's error, summed over the five
    severities, over AlexNet's. errors: corruption -> five top-1 errors in 0..1. UserError if any is missing."""
    missing = [c for c in ALEXNET_ERROR if len(errors.get(c, ())) != len(SEVERITIES)]
    if missing:
        raise UserError(f"no mCE without five severities of {', '.join(missing)}")
    return 100 * float(np.mean([sum(errors[c]) / (len(SEVERITIES) * ALEXNET_ERROR[c]) for c in ALEXNET_ERROR]))


def mce_stderr(wrong: dict[str, list[np.ndarray]]) -> dict[str, float]:
    """Standard errors of mce and mean_err over the images. The 75 versions of an image are not independent, so the
    unit is each image's mean over them; all versions list the same images in the same order."""
    per_image = {c: np.mean(np.stack([part.astype(float) for part in parts]), axis=0) for c, parts in wrong.items()}
    n = len(next(iter(per_image.values())))
    if n < 2:
        return {}
    ce = np.mean([per_image[c] / ALEXNET_ERROR[c] for c in per_image], axis=0)
    err = np.mean(list(per_image.values()), axis=0)
    return {name: 100 * float(v.std(ddof=1) / np.sqrt(n)) for name, v in (("mce", ce), ("mean_err", err))}


EVAL = Task(
    name="imagenet_eval",
    title="ImageNet-1k, evaluation of a fine-tuned checkpoint",
    module="transfer.classification",
    metric="top1",
    version=1,
    cost=10,
    recipe=eval_recipe,
    sources=eval_sources,
    inspect=inspect_imagenet_val,
    run=run_released,
    exact=True,
    miniature=miniature.imagenet,
    objections=input_objections,
    parts=cost.evaluation_parts,
    flops=cost.flops,
    space=lambda job: prediction_space(job.data.counts.get("images", job.data.counts.get("val", 0))),
    needs=Needs.FINE_TUNED_FILE,
    trains=False,
)
IMAGENET_A = replace(
    EVAL,
    name="imagenet_a",
    title="ImageNet-A",
    cost=41,
    sources=sources,
    inspect=partial(inspect_shift, "imagenet_a"),
    run=run_200,
    exact=False,
    miniature=miniature.imagenet_a,
    needs=Needs.CLASSIFIER,
)
TASKS = (
    IMAGENET_A,
    replace(
        IMAGENET_A,
        name="imagenet_r",
        title="ImageNet-R",
        cost=42,
        inspect=partial(inspect_shift, "imagenet_r"),
        miniature=miniature.imagenet_r,
    ),
    replace(
        IMAGENET_A,
        name="imagenet_sketch",
        title="ImageNet-Sketch",
        cost=43,
        inspect=partial(inspect_shift, "imagenet_sketch"),
        run=run_sketch,
        miniature=miniature.imagenet_sketch,
    ),
    replace(
        IMAGENET_A,
        name="imagenet_c",
        title="ImageNet-C",
        metric="mce",
        higher_is_better=False,
        cost=44,
        recipe=recipe_c,
        sources=sources_c,
        inspect=inspect_c,
        run=run_c,
        looks_itself=True,
        miniature=miniature.imagenet_c,
    ),
)
