"""Every knob moves something: the weights that a short training ends with."""

import hashlib
from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest

from mae_core.data import Images, Sample
from mae_core.machine import Machine
from tests.fixtures.transfer import ARCH, make_job, small_checkpoint, write_imagenet
from transfer.classification import job as classifier_job
from transfer.classification.tasks import FINETUNE, LINPROBE
from transfer.classification.train import UNUSED, RepeatedRecipe
from transfer.data.scores import Scores
from transfer.run import run_job

BOTH = pytest.mark.parametrize("task", [FINETUNE, LINPROBE], ids=lambda task: task.name)
BASE = {"batch": 8, "epochs": 3, "warmup_epochs": 1, "base_lr": 0.05}
KNOBS = {
    "image_size": 32, "epochs": 2, "warmup_epochs": 0, "batch": 4, "base_lr": 0.06, "min_lr": 0.02, "weight_decay": 0.3,
    "drop_path": 0.5, "pool": None, "head_std": 0.02, "min_scale": 0.9, "mixup": 0.8, "cutmix": 1.0,
    "label_smoothing": 0.3, "ema": 0.5, "train_fraction": 0.7,
}  # fmt: skip  # pool: "avg" where it is "token", and the reverse
OWN = {
    "imagenet_finetune": {
        "betas": (0.5, 0.9), "layer_decay": 0.9, "rand_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.9,
        "optimizer": {"optimizer": "lars", "momentum": 0.9, "trust_coefficient": 0.001} | UNUSED["lars"],
    },
    "imagenet_linprobe": {
        "momentum": 0.5, "trust_coefficient": 0.01,
        "optimizer": {"optimizer": "adamw", "betas": (0.9, 0.999)} | UNUSED["adamw"],
    },
}  # fmt: skip

ONE_SCORE = Scores(["0.png"], np.zeros(1), np.zeros(1), np.zeros((1, 5)), np.zeros((1, 5)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(task, changed knobs) -> SHA-256 of the weights that the task's own run ends with, on twelve images."""
    root = write_imagenet(tmp_path_factory.mktemp("data"), train=3, val=1)
    found = {}

    def keep(job, name, tensors, *others):
        digest = hashlib.sha256()
        for key, tensor in tensors.items():
            digest.update(key.encode() + tensor.numpy().tobytes())
        found["weights"] = digest.hexdigest()
        return {}

    def run(task, seed=0, machine=None, **changes) -> str:
        found.clear()
        job = make_job(task, root, tmp_path_factory.mktemp("work"), machine, seed, **(BASE | changes))
        task.run(replace(job, checkpoint=small_checkpoint()))  # the same whatever the seed
        return found["weights"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier_job, "save_artifacts", keep)
        patch.setattr(classifier_job, "validate", lambda *_: ONE_SCORE)
        yield run


@pytest.fixture(scope="module")
def unchanged(trained):
    return {task.name: trained(task) for task in (FINETUNE, LINPROBE)}


@BOTH
def test_the_same_training_ends_with_the_same_weights(trained, unchanged, task):
    """Else the next test would see changes everywhere."""
    assert trained(task) == unchanged[task.name]


@pytest.mark.parametrize(
    ("task", "knob", "value"),
    [
        pytest.param(task, knob, value, id=f"{task.name}-{knob}")
        for task in (FINETUNE, LINPROBE)
        for knob, value in (KNOBS | OWN[task.name]).items()
    ],
)
def test_every_knob_moves_the_trained_weights(trained, unchanged, task, knob, value):
    recipe = task.recipe(ARCH, "mini")
    if knob == "pool":
        value = {"avg": "token", "token": "avg"}[recipe.pool]
    changes = value if isinstance(value, dict) else {knob: value}
    assert trained(task, **changes) != unchanged[task.name]


@BOTH
def test_a_knob_either_moves_something_or_is_refused(task):
    """Every field is in the table above or among those that this optimizer refuses."""
    recipe = task.recipe(ARCH, "mini")
    moved, refused = KNOBS.keys() | OWN[task.name].keys(), UNUSED[recipe.optimizer].keys()
    assert moved | refused == {f.name for f in fields(recipe)}
    assert not moved & refused


def test_repeated_augmentation_shows_the_images_of_a_batch_again(tmp_path, monkeypatch):
    """16 images in batches of 8, twice each: a batch shows four images, and two epochs show every image."""
    root, shown = write_imagenet(tmp_path, train=4, val=1), Images.__getitems__
    job = make_job(FINETUNE, root, tmp_path / "once")
    repeated = replace(job, recipe=RepeatedRecipe(**vars(job.recipe), repeated_augmentation=2), work=tmp_path / "twice")
    batches = []

    def spy(dataset, samples):
        if isinstance(samples[0], Sample):  # in training
            batches.append([sample.index for sample in samples])
        return shown(dataset, samples)

    monkeypatch.setattr(Images, "__getitems__", spy)
    for which, different in ((repeated, 4), (job, 8)):
        batches.clear()
        assert run_job(which).status == "ok"
        assert [len(set(batch)) for batch in batches] == [different] * 4
        assert Counter(image for batch in batches for image in batch) == dict.fromkeys(range(16), 2)


@BOTH
def test_decoding_in_other_processes_changes_nothing(trained, unchanged, task):
    assert trained(task, machine=Machine(workers=2)) == unchanged[task.name]


@BOTH
def test_the_seed_moves_the_trained_weights(trained, unchanged, task):
    assert trained(task, seed=1) != unchanged[task.name]
