"""NYU Depth V2's reader against the layout of BTS's lists, and what it refuses."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_core.errors import UserError
from tests.fixtures.miniature import write_few
from transfer.data.nyu import FOLDER, inspect_nyu, pairs, read_depth
from transfer.miniature import depth


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_few(depth.nyu, tmp_path_factory.mktemp("nyu"), 6, 3)


@pytest.fixture
def root(made, tmp_path):
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def test_lists_are_read_as_bts_writes_them(tmp_path):
    """Paths of the training list begin with a slash, those of the test list do not; lines have a focal length."""
    (tmp_path / "nyu_train.txt").write_text(
        "/kitchen_0028b/rgb_00045.jpg /kitchen_0028b/sync_depth_00045.png 518.8579\n"
    )
    (tmp_path / "nyu_test.txt").write_text(
        "bathroom/rgb_00045.jpg bathroom/sync_depth_00045.png 518.8579\n\nb.jpg None 1\n"
    )
    kitchen, bathroom = tmp_path / "kitchen_0028b", tmp_path / "bathroom"
    assert pairs(tmp_path, "train") == [(kitchen / "rgb_00045.jpg", kitchen / "sync_depth_00045.png")]
    assert pairs(tmp_path, "val") == [(bathroom / "rgb_00045.jpg", bathroom / "sync_depth_00045.png")]


@pytest.mark.parametrize("line", ["only.jpg", "a.jpg b.png 1 2", "../../a.jpg b.png 518.8579"])
def test_a_line_that_names_no_pair_is_refused(tmp_path, line):
    (tmp_path / "nyu_train.txt").write_text(f"{line}\n")
    with pytest.raises(UserError, match="line 1 is not an image, its depth"):
        pairs(tmp_path, "train")


def test_depths_are_millimetres(tmp_path):
    Image.fromarray(np.array([[0, 1500], [9999, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert read_depth(tmp_path / "a.png") == pytest.approx(np.array([[0, 1.5], [9.999, 65.535]]))


def test_the_miniature_is_found(root):
    data = inspect_nyu(root)
    assert data.status == "found", data.detail
    assert (data.counts, data.label) == ({"train": 6, "val": 3}, "miniature")
    for image, file in pairs(root / FOLDER, "val"):
        metres = read_depth(file)
        assert Image.open(image).size == metres.shape[::-1]
        assert metres.max() <= 9
        assert (metres > 0).mean() > 0.8


def test_absent_data_are_told(tmp_path):
    assert inspect_nyu(tmp_path).status == "missing"
    assert "nyu_train.txt" in inspect_nyu(tmp_path).detail


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def bytes_only(path: Path) -> None:
    Image.open(path).convert("L").save(path)


def smaller(path: Path) -> None:
    Image.open(path).crop((0, 0, 20, 20)).save(path)


def unmeasured(path: Path) -> None:
    Image.fromarray(np.zeros_like(np.asarray(Image.open(path)))).save(path)


@pytest.mark.parametrize(
    ("harm", "file", "said"),
    [
        (Path.unlink, "nyu_test.txt", "lacks nyu_test.txt"),
        (Path.unlink, "train/rgb_00002.jpg", "lists 1 files that are not there: train/rgb_00002.jpg"),
        (cut, "test/rgb_00001.jpg", "cannot be read as an image"),
        (cut, "test/sync_depth_00001.png", "cannot be read as an image"),
        (bytes_only, "test/sync_depth_00001.png", "is of mode L, not 16 bits of millimetres"),
        (smaller, "test/sync_depth_00001.png", "is 20x20 px, its image"),
        (unmeasured, "test/sync_depth_00001.png", "has no measured depth"),
        (lambda path: path.write_text(""), "nyu_train.txt", "nyu_train.txt lists no image"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "nyu_train.txt", "is no text"),
        (lambda path: path.write_text("x\n"), "nyu_train.txt", "line 1 is not an image"),
    ],
)
def test_what_is_wrong_is_told_before_anything_starts(root, harm, file, said):
    harm(root / FOLDER / file)
    data = inspect_nyu(root)
    assert data.status == "incomplete"
    assert said in data.detail
