"""Logistic regression on frozen features, from the few training images of a list.

The minimum of the sum of the losses + l2 / 2 * |W|^2 by SciPy's L-BFGS, as scikit-learn finds it (C = 1 / l2), but with
loss and gradient by torch on the job's device: the 10 % list has 128,116 images and 1000 classes.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mae_core.checkpoint import load_encoder, model_of
from mae_core.data import PILLOW_PIXELS
from mae_core.progress import Progress
from mae_core.settings import bounded, check_ranges, choose
from mae_core.space import FLOAT, Space
from mae_core.vit import get_arch
from transfer.data.imagenet import read_split, wnids
from transfer.data.inputs import input_objections
from transfer.data.lowshot import Subset, read_subset, seed_objection
from transfer.data.predictions import MAIN, write_predictions
from transfer.data.scores import collected, score
from transfer.data.split import Split, few_of_both, fingerprint
from transfer.data.transforms import sides_of
from transfer.frozen.features import Representation, feature_folder, flops, read_or_computed
from transfer.miniature.imagenet import miniature_size
from transfer.run import origin, save_trained
from transfer.task import Job, Objection, Part, Result

MSN = "facebookresearch/msn logistic_eval.py, as ml-jku/MIM-Refiner runs it"
CHUNK = 8192  # images whose logits are in memory at a time


@dataclass(frozen=True)
class LogregRecipe:
    """l2: weight of |W|^2 / 2 beside the sum of the losses. iterations: at most so many of L-BFGS."""

    image_size: int = bounded(1)
    l2: float = bounded(0, default=0.00025)
    iterations: int = bounded(1, default=1000)
    transform: str = "resize_crop"

    def __post_init__(self) -> None:
        check_ranges(self)
        sides_of(self.image_size, self.transform)


def recipe(arch: str, name: str) -> LogregRecipe:
    paper = LogregRecipe(image_size=224)
    return choose("recipe", name, {"paper": paper, "mini": replace(paper, **miniature_size(arch))})


def sources(arch: str) -> dict[str, str]:
    found = {field.name: MSN for field in fields(LogregRecipe)}
    return found | {"iterations": "stand-in: theirs stops at a duality gap, after at most 300 passes"}


def normalised(features: Tensor) -> Tensor:
    """Each row less its mean and of length 1 [n, D], in float64: as cyanure's preprocess does it for MSN."""
    features = features.double()
    return torch.nn.functional.normalize(features - features.mean(dim=1, keepdim=True), dim=1)


def fit(
    features: Tensor, labels: Tensor, classes: int, l2: float, iterations: int, label: str = "L-BFGS"
) -> tuple[Tensor, int, bool]:
    """W [classes, D], without an intercept; the number of iterations, and whether they ended at the minimum."""
    n, shape = len(features), (classes, features.shape[1])
    progress, done = Progress(label, iterations, unit="it"), 0

    def told(_: np.ndarray) -> None:
        nonlocal done
        done += 1
        progress.update(done, n)

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        """Divided by n, as scikit-learn does."""
        w = torch.from_numpy(flat.reshape(shape)).to(features.device)
        value, gradient = l2 / 2 * w.square().sum(), l2 * w
        for x, y in zip(features.split(CHUNK), labels.split(CHUNK)):
            log_p = (x @ w.T).log_softmax(dim=1)
            value = value - log_p.gather(1, y[:, None]).sum()
            residual = log_p.exp()
            residual[torch.arange(len(y), device=y.device), y] -= 1
            gradient = gradient + residual.T @ x
        return value.item() / n, (gradient / n).cpu().numpy().ravel()

    from scipy.optimize import minimize  # late: the import takes a while, and only this task needs it

    options = {"maxiter": iterations, "gtol": 1e-7, "ftol": 64 * np.finfo(float).eps, "maxfun": 10 * iterations}
    start = np.zeros(classes * shape[1])
    found = minimize(objective, start, jac=True, method="L-BFGS-B", callback=told, options=options)
    return torch.from_numpy(found.x.reshape(shape)), int(found.nit), bool(found.success)


def images_of(job: Job, subset: Subset) -> tuple[Split, Split]:
    root = Path(job.data.root)
    train, val = read_subset(root, subset, job.seed)[0], read_split(root / "imagenet" / "val")[0]
    return few_of_both(train, val, job.data.limit)


def store_of(job: Job, val: Split) -> Path:
    """Where the features lie: all lists share those of the validation images."""
    shared = replace(job.data, fingerprint=fingerprint(Path(job.data.root), val))
    return feature_folder(replace(job, data=shared, work=job.work.parents[1] / "imagenet_logreg" / "run"), norm=False)


def logreg(job: Job, subset: Subset) -> Result:
    """Top-1 of the validation images. The feature is the class token before the final norm (MSN's `forward_blocks` in
    src/deit.py, MIM-Refiner's `use_next_norm: false`), or the mean of the patch tokens of a checkpoint that was trained
    with it."""
    r, device = job.recipe, job.machine.device
    train, val = images_of(job, subset)
    encoder = model_of(job.checkpoint, r.image_size)
    load = load_encoder(encoder, job.checkpoint).summary()
    model, store = Representation(encoder, job.checkpoint.pool, norm=False).to(device), store_of(job, val)
    listed = f"{subset.name}-{job.seed}" if len(subset.lists) > 1 else subset.name
    paths = [store / f"{listed}.safetensors", store / "val.safetensors"]
    (x, first), (tests, second) = (
        read_or_computed(job, model, split, path) for split, path in zip((train, val), paths)
    )
    started = time.monotonic()
    labels = torch.tensor(train.labels, device=device)
    w, steps, ended = fit(normalised(x).to(device), labels, len(wnids()), r.l2, r.iterations, f"{job.task.name} L-BFGS")
    truth = torch.tensor(val.labels).split(CHUNK)
    rows = [score(part @ w.T, labels) for part, labels in zip(normalised(tests).split(CHUNK), truth)]
    scores = collected(np.concatenate(rows), val, job.task.name)
    return Result(
        *scores.metrics(),
        n_eval=len(val.files),
        images_seen=len(train.files) + len(val.files),
        seconds=first + second + time.monotonic() - started,
        artifacts=save_trained(job, "logreg.safetensors", {"weight": w.float()}, origin(job)),
        predictions=write_predictions(job.work, {MAIN: scores.columns()}),
        notes=() if ended else (f"L-BFGS was stopped after {steps} iterations, before the minimum",),
        resolved={
            "load": load,
            "feature": model.name,
            "list": subset.list_of(Path(job.data.root), job.seed).relative_to(job.data.root).as_posix(),
            "train_images": len(train.files),
            "pixels": PILLOW_PIXELS,
            "iterations": steps,
        },
    )


def objections(job: Job, subset: Subset) -> Iterator[Objection]:
    yield from input_objections(job)
    yield from seed_objection(subset, job.seed)


def space(job: Job) -> Space:
    """The features, which are written in parts and then joined, and the weights."""
    dim, counts = get_arch(job.checkpoint.arch).dim, job.data.counts
    stays = FLOAT * dim * (counts["train"] + counts["val"] + len(wnids()))
    return Space(2 * stays, stays)


def parts(job: Job) -> tuple[Part, ...]:
    """The features and the fit, which a record times together: two products of the features with the weights in each
    iteration, as if all were needed, in float64, which takes a CPU twice float32's time."""
    r, train = job.recipe, job.data.counts["train"]
    images, products = train + job.data.counts["val"], 2 * 2 * 2 * get_arch(job.checkpoint.arch).dim * len(wnids())
    kind = f"logistic regression of {train} images, {r.image_size} px, {r.iterations} iterations"
    return (Part(kind, images, 1 + train * r.iterations * products / flops(job) / images),)
