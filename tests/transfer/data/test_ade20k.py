"""ADE20K on disk: what is found, and that what is wrong is said before anything is trained."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.fixtures import SHARED
from tests.fixtures.segmentation import write_ade20k
from transfer.data import ade20k
from transfer.data.ade20k import FOLDER, inspect_ade20k
from transfer.data.findings import MINIATURE_MARKER
from transfer.segmentation.mmseg_config import dataset_of
from transfer.segmentation.mmseg_plugin import register


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return write_ade20k(tmp_path_factory.mktemp("ade20k"), train=6, val=3)


@pytest.fixture
def root(whole, tmp_path) -> Path:
    """A copy to damage, not marked as the miniature."""
    shutil.copytree(whole, tmp_path / "data")
    (tmp_path / "data" / FOLDER / MINIATURE_MARKER).unlink()
    return tmp_path / "data"


def test_found_with_its_counts_and_label(whole, root):
    data = inspect_ade20k(whole)
    assert (data.status, data.label, data.counts) == ("found", "miniature", {"train": 6, "val": 3})
    assert data.detail == "6 train, 3 val"
    assert inspect_ade20k(root).label == "subset"
    assert inspect_ade20k(root).fingerprint == data.fingerprint


def test_the_official_counts_make_it_official(root, monkeypatch):
    assert ade20k.OFFICIAL_COUNTS == {"train": 20210, "val": 2000}  # SceneParse150
    monkeypatch.setattr(ade20k, "OFFICIAL_COUNTS", {"train": 6, "val": 3})
    assert inspect_ade20k(root).label == "official"


def test_fingerprint_tells_listings_and_labels_apart(root):
    label = root / FOLDER / "annotations/training/ADE_train_00000006.png"
    before = inspect_ade20k(root).fingerprint
    Image.fromarray(np.full(np.asarray(Image.open(label)).shape, 7, np.uint8)).save(label)
    assert inspect_ade20k(root).fingerprint != before
    before = inspect_ade20k(root).fingerprint
    for kind, suffix in (("images", "jpg"), ("annotations", "png")):
        (root / FOLDER / kind / f"training/ADE_train_00000006.{suffix}").unlink()
    after = inspect_ade20k(root)
    assert after.status == "found"
    assert after.fingerprint != before


def test_a_split_without_a_labelled_pixel_or_with_a_lone_label_is_refused(root):
    lone = root / FOLDER / "images/training/ADE_train_00000003.jpg"
    kept = lone.read_bytes()
    lone.unlink()
    assert "labels without an image: ADE_train_00000003.png" in inspect_ade20k(root).detail
    lone.write_bytes(kept)
    for label in (root / FOLDER / "annotations/validation").iterdir():
        Image.fromarray(np.zeros_like(np.asarray(Image.open(label)))).save(label)
    assert "no pixel of the label files has a label above 0" in inspect_ade20k(root).detail


def test_wrong_labels_are_counted_among_those_inspected(root, monkeypatch):
    """Colours in two of the six training labels."""
    for number in (2, 5):
        label = root / FOLDER / f"annotations/training/ADE_train_0000000{number}.png"
        Image.open(label).convert("RGB").save(label)
    assert "2 of 6 pairs looked at (of 6) cannot be used: " in inspect_ade20k(root).detail
    monkeypatch.setattr(ade20k, "spread", lambda count: [0, count - 1])
    assert inspect_ade20k(root).status == "found"  # the wrong ones are not among these; their turn comes while training


def test_a_part_has_findings(whole, root, monkeypatch):
    (said,) = inspect_ade20k(root).findings
    assert said.startswith("ADEChallengeData2016: 6 train images, 20204 fewer than the official 20210; 3 val images")
    assert inspect_ade20k(whole).findings == ()
    monkeypatch.setattr(ade20k, "OFFICIAL_COUNTS", {"train": 6, "val": 3})
    assert inspect_ade20k(root).findings == ()


def test_missing_data_say_where_they_must_lie(tmp_path):
    data = inspect_ade20k(tmp_path)
    assert data.status == "missing"
    assert "ADEChallengeData2016/{images,annotations}/{training,validation}" in data.detail


LABEL = "annotations/training/ADE_train_00000002.png"
IMAGE = "images/training/ADE_train_00000002.jpg"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda ids: np.pad(ids[1:], ((1, 0), (0, 0)), constant_values=151),
            "has the label 151: labels must be 0 (none) to 150",
        ),
        (lambda ids: ids.astype(np.uint16) + 300, "is of mode I;16, not one channel of 8 bits"),
        (lambda ids: np.stack([ids] * 3, axis=2), "is of mode RGB, not one channel of 8 bits"),
        (lambda ids: ids[:-1], "is 56x41 px, its image ADE_train_00000002.jpg 56x42"),
    ],
)
def test_a_wrong_label_file_is_described(root, change, says):
    file = root / FOLDER / LABEL
    Image.fromarray(change(np.array(Image.open(file)))).save(file)
    data = inspect_ade20k(root)
    assert data.status == "incomplete"
    assert f"{file.name} {says}" in data.detail


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / LABEL).write_bytes((f / LABEL).read_bytes()[:60]), "00000002.png cannot be read as an image"),
        (lambda f: (f / IMAGE).write_bytes(b"no picture"), "ADE_train_00000002.jpg cannot be read as an image"),
        (lambda f: [p.unlink() for p in (f / "images/training").iterdir()], "images/training has no image *.jpg"),
        (lambda f: (f / LABEL).unlink(), "without a label file in annotations/training: ADE_train_00000002.jpg"),
        (lambda f: (f / IMAGE).rename(f / IMAGE.replace("jpg", "png")), "do not end in .jpg: ADE_train_00000002"),
        (lambda f: shutil.rmtree(f / "annotations/validation"), "lacks annotations/validation"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(root, damage, says):
    damage(root / FOLDER)
    data = inspect_ade20k(root)
    assert data.status == "incomplete"
    assert says in data.detail


def test_what_browsers_of_files_leave_behind_is_passed_over(root):
    before = inspect_ade20k(root)
    for name in ("images/training/._1.jpg", "annotations/training/.DS_Store", "annotations/validation/Thumbs.db"):
        (root / FOLDER / name).write_bytes(b"x")
    (root / FOLDER / "images/training/@eaDir").mkdir()
    shutil.copy(root / FOLDER / IMAGE, root / FOLDER / "images/training/@eaDir/thumbnail.jpg")
    assert inspect_ade20k(root) == before
    register()
    from mmseg.registry import DATASETS

    dataset = DATASETS.build(dataset_of(root / FOLDER, "train", []))  # what is trained on
    listed = [image for image, _ in ade20k.pairs(root / FOLDER, "train")]
    assert images_of(dataset) == listed
    few = DATASETS.build(dataset_of(root / FOLDER, "train", [], limit=2))
    assert images_of(few) == listed[:2] != listed


def images_of(dataset) -> list[Path]:
    return [Path(entry["img_path"]) for entry in map(dataset.get_data_info, range(len(dataset)))]


@pytest.mark.parametrize("name", [IMAGE, LABEL])
def test_a_pipe_and_a_broken_link_are_named(root, name):
    """mmengine silently leaves both out."""
    file = root / FOLDER / name
    file.unlink()
    os.mkfifo(file)
    assert f"{file}: broken links or no regular files" in inspect_ade20k(root).detail
    file.unlink()
    file.symlink_to("gone")
    assert f"{file}: broken links or no regular files" in inspect_ade20k(root).detail


def test_images_in_folders_are_named(root):
    folder = root / FOLDER / "images" / "training" / "more"
    folder.mkdir()
    assert inspect_ade20k(root).status == "found"
    shutil.copy(root / FOLDER / IMAGE, folder)
    assert f"{folder}: ADE20K's files lie flat" in inspect_ade20k(root).detail


@pytest.mark.skipif(not (SHARED / FOLDER).is_dir(), reason="the real images are not here")
def test_real_images_are_accepted():
    data = inspect_ade20k(SHARED)
    assert (data.status, data.label, data.counts) == ("found", "subset", {"train": 4, "val": 5})
