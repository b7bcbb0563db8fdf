"""What is refused before anything starts fails indeed, and the rest runs; the space that is asked for is what real
trainings take."""

import numpy as np
import pytest

from mae_core.machine import Machine
from tests.fixtures.transfer import assert_objection_is_right, assert_space_is_right, make_job
from transfer.classification.tasks import TASKS
from transfer.data.predictions import BYTES, PREDICTIONS_FILE, write_predictions
from transfer.data.scores import Scores
from transfer.frozen.tasks import TASKS as FROZEN
from transfer.task import CLASSIFIER_FILE

BY_NAME = {task.name: task for task in (*TASKS, *FROZEN)}
FOR_ONE = "BatchNorm cannot learn from one image at a time"
MANY, ONE = Machine(), Machine(micro_batch=1)


# Knobs, the machine, what is objected to (None: it runs), and in which words.
@pytest.mark.parametrize(
    ("task", "knobs", "machine", "knob", "said"),
    [
        ("imagenet_knn", {"k": 32}, MANY, None, ""),
        ("imagenet_knn", {"k": 33}, MANY, "k", "k=33, but there are 32 training images"),
        ("imagenet_knn", {"k": 9, "train_fraction": 0.25}, MANY, "k", "k=9, but there are 8 training images"),
        ("imagenet_finetune", {"batch": 32}, MANY, None, ""),
        ("imagenet_finetune", {"batch": 34}, MANY, "batch", "32 training images are less than one batch=34"),
        ("imagenet_finetune", {"batch": 16, "train_fraction": 0.25}, MANY, "batch", "(train_fraction=0.25) are less"),
        ("imagenet_finetune", {"batch": 7, "mixup": 0.8}, MANY, "batch", "each process gets 7 of batch=7"),
        ("imagenet_finetune", {"batch": 7, "mixup": 0.0, "cutmix": 0.0}, MANY, None, ""),
        ("imagenet_finetune", {"cutmix": 1.0}, ONE, None, ""),
        ("imagenet_finetune", {}, ONE, None, ""),
        ("imagenet_partial", {"blocks": (1.0, 7.0)}, MANY, "blocks", "blocks=1,7, but vit_mini_patch8 has 6"),
        ("imagenet_partial", {"blocks": (1.0, 2.0)}, MANY, None, ""),
        ("imagenet_partial", {"blocks": (0.0, 1.0)}, MANY, "blocks", "0 blocks means linear probing by its own recipe"),
        ("imagenet_partial", {"blocks": (1.0, 6.0)}, MANY, None, ""),
        ("imagenet_linprobe", {}, ONE, "--micro-batch", FOR_ONE),
        ("imagenet_linprobe", {"batch": 1}, MANY, "batch", FOR_ONE),
        ("imagenet_linprobe", {"batch": 2}, MANY, None, ""),
    ],
)
def test_a_job_that_is_objected_to_would_fail_and_any_other_runs(root, tmp_path, task, knobs, machine, knob, said):
    knobs = {"k": 2} | knobs if task == "imagenet_knn" else {"epochs": 1} | knobs
    assert_objection_is_right(make_job(BY_NAME[task], root, tmp_path, machine, **knobs), knob, said)


@pytest.mark.parametrize(
    ("batch", "processes", "mixup", "said"),
    [
        (8, 3, 0.0, "batch=8 cannot be shared by 3 processes: --gpus must divide it"),
        (6, 2, 0.8, "mixup pairs images, but each process gets 3 of batch=6"),
        (6, 2, 0.0, ""),
        (8, 2, 0.8, ""),
    ],
)
def test_several_processes_share_a_batch(root, tmp_path, batch, processes, mixup, said):
    machine = Machine(processes=processes)
    job = make_job(BY_NAME["imagenet_finetune"], root, tmp_path, machine, batch=batch, mixup=mixup)
    found = list(job.task.objections(job))
    assert [knob for knob, _ in found] == ["--gpus"] * bool(said)
    assert all(said in why for _, why in found)


@pytest.mark.parametrize(
    ("task", "left", "knobs"),
    [
        ("imagenet_finetune", CLASSIFIER_FILE, {}),
        ("imagenet_finetune", CLASSIFIER_FILE, {"ema": 0.9}),
        ("imagenet_linprobe", "probe.safetensors", {}),
    ],
)
def test_space_of_a_classifier(root, tmp_path, task, left, knobs):
    assert_space_is_right(make_job(BY_NAME[task], root, tmp_path, epochs=1, **knobs), left)


def test_space_of_the_features_of_k_nn(root, tmp_path):
    job = make_job(BY_NAME["imagenet_knn"], root, tmp_path / "work", k=2)
    peak, stay = job.task.space(job)
    # 32 training and 12 validation images, 128 numbers each.
    assert stay == 44 * 128 * 4
    assert peak == 2 * stay
    job.task.run(job)
    written = sum(file.stat().st_size for file in tmp_path.glob("features-*/*.safetensors"))
    assert stay < written < stay + 1000  # two headers and the places
    assert job.task.space(job) == (0, 0)


def test_evaluation_takes_the_space_of_its_predictions(root, tmp_path):
    """Twelve images; in so small a file the names of the columns count for more than the rows."""
    job = make_job(BY_NAME["imagenet_eval"], root, tmp_path)
    assert job.task.space(job) == (12 * BYTES, 12 * BYTES)


def test_space_of_predictions_is_that_of_many_rows(tmp_path):
    rng, n = np.random.default_rng(0), 20000
    arrays = (np.arange(n) // 20, rng.random(n), rng.integers(0, 1000, (n, 5)), rng.random((n, 5)))
    label, loss, classes, log_probs = (a.astype(np.int32 if a.dtype.kind == "i" else np.float32) for a in arrays)
    names = [f"n{i // 20:08}/ILSVRC2012_val_{rng.integers(50000):08}.JPEG" for i in range(n)]
    write_predictions(tmp_path, {"": Scores(names, label, loss, classes, log_probs).columns()})
    assert 0.7 * n * BYTES < (tmp_path / PREDICTIONS_FILE).stat().st_size <= n * BYTES


def test_space_of_a_head_of_the_sets_own_size(tmp_path):
    """vit_mini's encoder and 8142 rows of 129 numbers; AdamW's state is three times that, twice on disk."""
    job = make_job(BY_NAME["inat2018"], tmp_path, tmp_path)
    encoder = sum(tensor.numel() for tensor in job.checkpoint.encoder.values())
    assert job.task.space(job) == (2 * 3 * 4 * (encoder + 8142 * 129), 4 * (encoder + 8142 * 129))
