"""VOC 2012's reader against the official layout, and what it refuses."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import VOCSegmentation

from tests.fixtures.miniature import write_few
from transfer.data.voc import FOLDER, inspect_voc, pairs
from transfer.miniature import dense


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_few(dense.voc, tmp_path_factory.mktemp("voc"), 6, 3)


@pytest.fixture
def root(made, tmp_path):
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def test_the_miniature_is_read_as_torchvision_reads_the_official_layout(root):
    assert inspect_voc(root).counts == {"train": 6, "val": 3}
    for split in ("train", "val"):
        theirs = VOCSegmentation(root, year="2012", image_set=split)
        ours = pairs(root / FOLDER, split)
        assert [(str(image), str(label)) for image, label in ours] == list(zip(theirs.images, theirs.masks))
        image, label = theirs[0]
        assert (label.mode, label.size) == ("P", image.size)
        assert set(np.unique(np.asarray(label))) <= {*range(7), 255}


def test_absent_data_are_told(tmp_path):
    assert inspect_voc(tmp_path).status == "missing"
    assert "VOCdevkit/VOC2012" in inspect_voc(tmp_path).detail


def lose(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def colour(path: Path) -> None:
    Image.open(path).convert("RGB").save(path)


def label_21(path: Path) -> None:
    Image.fromarray(np.full_like(np.asarray(Image.open(path)), 21)).save(path)


def smaller(path: Path) -> None:
    Image.open(path).crop((0, 0, 20, 20)).save(path)


@pytest.mark.parametrize(
    ("harm", "file", "said"),
    [
        (lose, "ImageSets/Segmentation/val.txt", "lacks ImageSets/Segmentation/val.txt"),
        (lose, "JPEGImages/2012_train000002.jpg", "lists 1 files that are not there: JPEGImages/2012_train000002.jpg"),
        (cut, "JPEGImages/2012_val000001.jpg", "cannot be read as an image"),
        (colour, "SegmentationClass/2012_val000001.png", "is of mode RGB, not one channel"),
        (label_21, "SegmentationClass/2012_val000001.png", "has the label 21"),
        (smaller, "SegmentationClass/2012_val000001.png", "is 20x20 px, its image"),
        (
            lambda path: path.write_text("../../x\n"),
            "ImageSets/Segmentation/val.txt",
            "'../../x', which leaves its folder",
        ),
        (
            lambda path: path.write_text("/etc/x\n"),
            "ImageSets/Segmentation/val.txt",
            "'/etc/x', which leaves its folder",
        ),
        (lambda path: path.write_text(""), "ImageSets/Segmentation/train.txt", "train.txt lists no image"),
    ],
)
def test_what_is_wrong_is_told_before_anything_starts(root, harm, file, said):
    harm(root / FOLDER / file)
    data = inspect_voc(root)
    assert data.status == "incomplete"
    assert said in data.detail


def test_other_images_have_another_fingerprint(root):
    before = inspect_voc(root)
    assert inspect_voc(root).fingerprint == before.fingerprint
    list_file = root / FOLDER / "ImageSets/Segmentation/val.txt"
    list_file.write_text("".join(f"{name}\n" for name in list_file.read_text().split()[:2]))
    assert inspect_voc(root).fingerprint != before.fingerprint
    assert before.label == "miniature"
