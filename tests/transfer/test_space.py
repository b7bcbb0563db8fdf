"""The space that is asked for, against the files that real trainings write."""

import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest

from mae_core.errors import UserError
from mae_core.training import CHECKPOINT_FILE
from tests.fixtures import coco as coco_fixtures
from tests.fixtures import segmentation as segmentation_fixtures
from tests.fixtures import transfer as transfer_fixtures
from tests.fixtures.transfer import ARCH, small_checkpoint, write_imagenet
from transfer import space
from transfer.classification.tasks import TASKS
from transfer.detection import tasks as detection
from transfer.space import GIB, check_space, free_below, needed, space_line
from transfer.task import CLASSIFIER_FILE, Job, Space

EVAL = next(task for task in TASKS if task.name == "imagenet_eval")
BY_NAME = {task.name: task for task in TASKS}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = write_imagenet(tmp_path_factory.mktemp("disk"), train=2, val=1)
    segmentation_fixtures.write_ade20k(coco_fixtures.write_coco(root), train=4, val=2)
    return root


def check(job: Job, left: str) -> None:
    """Train, and compare: two states at a time, and what is left. The estimate leaves out names and headers."""
    peak, stay = job.task.space(job)
    job.work.mkdir(parents=True, exist_ok=True)
    job.task.run(job)  # run_job would delete the state
    state, artifact = ((job.work / name).stat().st_size for name in (CHECKPOINT_FILE, left))
    assert 2 * state == pytest.approx(peak, rel=0.03)
    assert artifact == pytest.approx(stay, rel=0.03)
    assert job.task.space(job)[0] == peak - state  # a resumed training has written one of the two


@pytest.mark.parametrize(
    ("task", "left", "knobs"),
    [
        ("imagenet_finetune", CLASSIFIER_FILE, {}),
        ("imagenet_finetune", CLASSIFIER_FILE, {"ema": 0.9}),
        ("imagenet_linprobe", "probe.safetensors", {}),
    ],
)
def test_a_classifier(root, tmp_path, task, left, knobs):
    check(transfer_fixtures.make_job(BY_NAME[task], root, tmp_path, epochs=1, **knobs), left)


@pytest.mark.slow
def test_a_detector(root, tmp_path):
    task = detection.TASKS[0]
    little = {"image_size": 64, "epochs": 1, "warmup_epochs": 0, "fpn_dim": 64, "head_dim": 48, "fc_dim": 128}
    recipe = disk_recipe(task.recipe(ARCH, "mini"), little)
    job = Job(task, small_checkpoint(), recipe, "mini", {}, task.inspect(root), tmp_path, 0, "torchvision")
    check(job, "detector.safetensors")


def disk_recipe(recipe, changes: dict):
    return type(recipe)(**{**vars(recipe), **changes})


@pytest.mark.slow
def test_a_segmenter(root, tmp_path):
    knobs = {"iterations": 2, "head_channels": 40, "auxiliary_channels": 24}
    check(segmentation_fixtures.make_job(root, tmp_path, **knobs), "segmenter.safetensors")


def test_features_of_k_nn(root, tmp_path):
    job = transfer_fixtures.make_job(BY_NAME["imagenet_knn"], root, tmp_path / "work", k=2)
    peak, stay = job.task.space(job)
    # 8 training and 4 validation images, 128 numbers each.
    assert stay == 12 * 128 * 4
    assert peak == 2 * stay
    job.task.run(job)
    written = sum(file.stat().st_size for file in tmp_path.glob("features-*/*.safetensors"))
    assert stay < written < stay + 1000  # two headers and the places
    assert job.task.space(job) == (0, 0)


def test_evaluation_leaves_nothing(root, tmp_path):
    assert EVAL.space(transfer_fixtures.make_job(EVAL, root, tmp_path)) == (0, 0)


def test_a_head_of_the_sets_own_size(tmp_path):
    """vit_mini's encoder and 8142 rows of 129 numbers; AdamW's state is three times that, twice on disk."""
    job = transfer_fixtures.make_job(BY_NAME["inat2018"], tmp_path, tmp_path)
    encoder = sum(tensor.numel() for tensor in job.checkpoint.encoder.values())
    assert job.task.space(job) == (2 * 3 * 4 * (encoder + 8142 * 129), 4 * (encoder + 8142 * 129))


def job_of(peak: int, stays: int) -> SimpleNamespace:
    return SimpleNamespace(task=SimpleNamespace(space=lambda job: Space(peak, stays)))


def test_jobs_run_one_after_the_other():
    """What the first leaves lies there while the second is at its most."""
    a, b, c = job_of(100, 10), job_of(95, 20), job_of(50, 5)
    assert needed([a, b, c]) == (105, 35)
    assert needed([b, a]) == (120, 30)
    assert needed([]) == (0, 0)


def test_too_little_space_is_refused_in_a_sentence(tmp_path, monkeypatch):
    job = job_of(3 * GIB, GIB)
    monkeypatch.setattr(space, "free_below", lambda out: 3.5 * GIB)
    check_space([job], tmp_path)
    said = f"up to 4.00 GiB needed below {tmp_path} (2.00 GiB of it to stay), 3.50 GiB free"
    assert space_line([job, job], tmp_path) == said
    with pytest.raises(UserError, match=r"the disk is too small: up to 4\.00 GiB"):
        check_space([job, job], tmp_path)


def test_the_free_space_is_that_of_the_nearest_folder_there_is(tmp_path, monkeypatch):
    asked = []
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or usage(3, 1, 2))
    monkeypatch.chdir(tmp_path)
    assert free_below(Path("not/yet/there")) == 2
    assert free_below(tmp_path) == 2
    assert asked == [tmp_path, tmp_path]
