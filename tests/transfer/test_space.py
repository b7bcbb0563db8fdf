"""What jobs need together against what is free, and the space of dense tasks against the files they write."""

import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest

from mae_core import space
from mae_core.errors import UserError
from mae_core.space import GIB, Space, free_below, space_line
from tests.fixtures import detection, segmentation
from tests.fixtures.coco import write_coco
from tests.fixtures.transfer import assert_space_is_right
from transfer.jobs import check_space, needed


@pytest.mark.slow
def test_space_of_a_detector(tmp_path):
    little = {"epochs": 1, "warmup_epochs": 0, "fpn_dim": 64, "head_dim": 48, "fc_dim": 128}
    job = detection.job_of(write_coco(tmp_path), tmp_path / "work", **little)
    assert_space_is_right(job, "detector.safetensors")


@pytest.mark.slow
def test_space_of_a_segmenter(tmp_path):
    root = segmentation.write_ade20k(tmp_path, train=4, val=2)
    knobs = {"iterations": 2, "head_channels": 40, "auxiliary_channels": 24}
    assert_space_is_right(segmentation.make_job(root, tmp_path / "work", **knobs), "segmenter.safetensors")


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
    assert space_line(needed([job, job]), tmp_path) == said
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
