"""How a set differs from the official one, in sentences; and what the system does not let the reader read."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.suite import TASKS
from tests.fixtures.transfer import raising
from transfer.data import coco
from transfer.data.findings import Data, against_official, guarded, limited, missing, spread, unusable
from transfer.data.imagenet import inspect_imagenet
from transfer.data.lowshot import SUBSETS
from transfer.data.vtab import VTAB

OFFICIAL = {"classes": 1000, "train": 1281167, "val": 50000}


def test_the_official_set_has_no_findings():
    assert against_official("imagenet", OFFICIAL, OFFICIAL) == ()


def test_a_part_is_reported_with_its_missing_classes_and_its_counts():
    names = [f"n{i:08}" for i in range(990)]
    classes, images = against_official("imagenet", {"classes": 10, "train": 1000, "val": 50000}, OFFICIAL, names)
    assert classes.startswith("imagenet: 990 of the 1000 classes are missing (n00000000, n00000001, n00000002 and 987 ")
    # Nothing of val, whose count is right.
    assert images == "imagenet: 1000 train images, 1280167 fewer than the official 1281167: not the official set"


def test_a_damaged_copy_is_told_from_another_set():
    lost = {**OFFICIAL, "train": 1281160, "val": 50001}
    (one,) = against_official("imagenet", lost, OFFICIAL)
    assert "1281160 train images, 7 fewer than the official 1281167; 50001 val images, 1 more than" in one
    assert one.endswith("unpack the archive again")
    (far,) = against_official("imagenet", {**OFFICIAL, "val": 49499}, OFFICIAL)  # 1.002 % fewer
    assert far.endswith("not the official set")


def test_a_limit_is_part_of_what_the_data_are():
    counts = {"classes": 1000, "train": 1281167, "val": 50000}
    data = Data("/data", "found", "1000 classes", "official", "f" * 64, counts, chance=0.1)
    few = limited(data, 250)
    assert few.counts == {"classes": 250, "train": 250, "val": 250}
    assert (few.limit, few.unlimited, few.chance) == (250, counts, 0.4)
    assert few.detail == "at most 250 images a split of 1000 classes"
    assert few.findings == ("a quick look: at most 250 images of each split",)
    assert len({data.fingerprint, few.fingerprint, limited(data, 251).fingerprint}) == 3
    assert limited(data, 250) == few
    assert limited(data, 0) is data
    # Each image of ImageNet-C has 75 versions.
    versions = replace(data, counts={"classes": 1000, "images": 3750000, "versions": 75}, chance=None)
    assert limited(versions, 250).counts == {"classes": 250, "images": 18750, "versions": 75}
    assert limited(versions, 250).chance is None
    absent = missing(Path("/data"), "x")
    assert limited(absent, 250) == replace(absent, limit=250)


def test_the_files_inspected_are_spread_over_the_whole_list():
    assert spread(0) == []
    assert spread(3) == [0, 1, 2]
    assert spread(1281167, 5) == [0, 320292, 640583, 960874, 1281166]
    assert len(spread(1281167)) == 100


def test_files_that_cannot_be_used_are_counted(tmp_path):
    files = [tmp_path / f"{i}.jpg" for i in range(5)]
    for file in files:
        file.write_bytes(b"x")
    assert unusable(files) == []
    files[1].write_bytes(b"")
    files[3].unlink()
    files[3].symlink_to(tmp_path / "gone.jpg")
    files[4].unlink()
    (said,) = unusable(files, "training images")
    assert said.startswith("3 of 5 training images looked at (of 5) cannot be used: ")
    assert f"{files[1]} is empty" in said
    assert f"{files[3]} is a broken link" in said
    assert f"{files[4]} is not there" in said


def test_a_file_that_may_not_be_read_cannot_be_used(tmp_path, monkeypatch):
    file = tmp_path / "a.jpg"
    file.write_bytes(b"x")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may read everything
    assert f"{file} may not be read by this user" in unusable([file])[0]


# Of the tasks with few labels; of three lists that may have two names, the first.
LISTS = [names[0] for subset in SUBSETS for names in subset.lists]


def everything(root: Path) -> None:
    """A folder for every task that asks for one."""
    folders = ["imagenet/train", "imagenet/val", "inat2017", "inat2018", "inat2019", "places205", "places365"]
    folders += ["imagenet-a", "imagenet-r", "imagenet-sketch", "imagenet-c/fog/1", "coco/annotations"]
    folders += ["inat2021", "imagenetv2-matched-frequency-format-val", "objectnet-1.0/images"]
    folders += [known.folder for known in VTAB] + [name.rpartition("/")[0] for name in LISTS]
    kinds = ("images/training", "images/validation", "annotations/training", "annotations/validation")
    for name in (*folders, *(f"ADEChallengeData2016/{kind}" for kind in kinds)):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name in (*LISTS, "places365/places365_train_standard.txt", "places205/train_places205.csv"):
        (root / name).touch()
    for kind in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / "VOCdevkit" / "VOC2012" / kind).mkdir(parents=True)
    (root / "nyu").mkdir()
    for split in ("train", "test"):
        (root / "nyu" / f"nyu_{split}.txt").touch()
    for split in ("train", "val"):
        (root / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation" / f"{split}.txt").touch()
        (root / "coco" / "annotations" / f"instances_{split}2017.json").touch()


@pytest.mark.parametrize("task", [t for t in TASKS if not t.of], ids=lambda task: task.name)
def test_a_folder_that_may_not_be_read_is_a_sentence_for_every_task(task, tmp_path, monkeypatch):
    everything(tmp_path)

    refuse = raising(PermissionError(13, "Permission denied", str(tmp_path / "locked")))
    for owner, name in ((os, "scandir"), (os, "listdir"), (Path, "iterdir"), (Path, "read_text"), (Path, "read_bytes")):
        monkeypatch.setattr(owner, name, refuse)
    monkeypatch.setattr(coco, "open_regular", refuse)
    data = guarded(task.inspect, tmp_path)
    assert data.status == "missing"
    assert f"{tmp_path}/locked may not be read by this user: change its permissions" in data.detail


def test_another_error_of_the_disk_is_a_sentence_too(tmp_path):
    stale = raising(OSError(116, "Stale file handle", "/data/imagenet"))
    said = "no data: /data/imagenet cannot be read (Stale file handle): mend or replace it"
    assert guarded(stale, tmp_path).detail == said
    (tmp_path / "imagenet").write_text("a file where the folder must be")
    assert guarded(inspect_imagenet, tmp_path).status == "missing"
    shutil.rmtree(tmp_path)
    assert guarded(inspect_imagenet, tmp_path).status == "missing"
