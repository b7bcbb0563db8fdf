"""Writing a set whole or not at all."""

import json
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_core.errors import UserError
from mae_core.files import is_image
from tests.fixtures.miniature import digests
from tests.fixtures.transfer import raising
from transfer.data.findings import MINIATURE_MARKER, spread
from transfer.miniature import dense, depth, imagenet, labelled, scenes
from transfer.miniature.writer import VERSION


def test_marker_tells_version_seed_and_counts(root):
    marker = json.loads((root / "imagenet" / MINIATURE_MARKER).read_text())
    assert marker == {"version": VERSION, "seed": 0, "counts": {"train": 800, "val": 1600}}
    for folder in root.iterdir():
        if folder.is_dir():
            counts = json.loads((folder / MINIATURE_MARKER).read_text())["counts"]
            assert len(digests(folder)) == sum(counts.values()), folder.name


# The mean of the pixels of a hundred images of each set, or of some scenes, as VERSION 3 draws them.
DRAWN = {
    "depths": 6.232,
    "imagenet": 127.22,
    "imagenet-a": 128.688,
    "imagenet-c": 140.016,
    "imagenet-r": 138.931,
    "imagenet-sketch": 223.225,
    "labels": 18.591,
    "places": 131.206,
    "scenes": 119.007,
    "unlabelled": 133.778,
}


def test_images_of_this_version_are_drawn_as_they_were(root):
    """A set that is there already is left alone for as long as VERSION stays: if this fails, raise it and take what is
    drawn now."""
    found = {}
    for folder in filter(Path.is_dir, root.iterdir()):
        images = sorted(file for file in folder.rglob("*") if is_image(file.name))
        some = [np.asarray(Image.open(images[i])).mean() for i in spread(len(images), 100)]
        found[folder.name] = np.mean(some)
    scenes = [dense.picture(0, "train", index) for index in range(20)]
    found["scenes"] = np.mean([scene.image.mean() for scene in scenes])
    found["labels"] = np.mean([dense.label_image(scene).mean() for scene in scenes])
    found["depths"] = np.mean([depth.depth_of(scene).mean() for scene in scenes])
    rng = np.random.default_rng(0)
    found["places"] = np.mean([labelled.draw_place(kind, rng).mean() for kind in range(10)])
    assert found == pytest.approx(DRAWN, abs=0.02)  # of 255 levels: rounding differs between processors


def test_a_complete_set_is_left_alone_and_a_damaged_or_other_one_is_made_again(tmp_path):
    folder = imagenet.imagenet_sketch(tmp_path)
    whole = digests(folder)
    file = folder / next(iter(whole))
    written = file.stat().st_mtime_ns
    imagenet.imagenet_sketch(tmp_path)
    assert file.stat().st_mtime_ns == written

    file.unlink()
    imagenet.imagenet_sketch(tmp_path)
    assert digests(folder) == whole

    imagenet.imagenet_sketch(tmp_path, seed=1)
    assert json.loads((folder / MINIATURE_MARKER).read_text())["seed"] == 1
    assert not set(digests(folder).values()) & set(whole.values())


def test_interrupted_writing_leaves_no_set_and_is_made_good(tmp_path, monkeypatch):
    drawings = chain([scenes.line_drawing] * 99, repeat(raising(KeyboardInterrupt())))
    monkeypatch.setattr(scenes, "line_drawing", lambda *args: next(drawings)(*args))
    with pytest.raises(KeyboardInterrupt):
        imagenet.imagenet_sketch(tmp_path)
    assert not (tmp_path / "imagenet-sketch").exists()
    monkeypatch.undo()
    assert len(digests(imagenet.imagenet_sketch(tmp_path))) == 640
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["imagenet-sketch"]


def test_real_data_are_never_overwritten(tmp_path):
    makers = {"imagenet-r": imagenet.imagenet_r, "coco": dense.coco, "ADEChallengeData2016": dense.ade20k}
    for name, make in makers.items():
        own = tmp_path / name / "n01498041" / "photo.jpg"
        own.parent.mkdir(parents=True)
        own.write_bytes(b"mine")
        with pytest.raises(UserError, match="not a miniature"):
            make(tmp_path)
        assert own.read_bytes() == b"mine"
        assert len(list((tmp_path / name).rglob("*"))) == 2


def test_no_link_is_written_through(tmp_path):
    (tmp_path / "victim").mkdir()
    (tmp_path / "sets").mkdir()
    for name in (".imagenet-sketch.partial", ".imagenet-sketch.discarded"):
        (tmp_path / "sets" / name).symlink_to(tmp_path / "victim")
    imagenet.imagenet_sketch(tmp_path / "sets")
    assert list((tmp_path / "victim").iterdir()) == []
    assert len(digests(tmp_path / "sets" / "imagenet-sketch")) == 640


def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    full = raising(OSError(28, "No space left on device"))
    drawings = chain([scenes.line_drawing] * 99, repeat(full))
    monkeypatch.setattr(scenes, "line_drawing", lambda *args: next(drawings)(*args))
    with pytest.raises(UserError, match=r"cannot write .*imagenet-sketch: the disk is full: free some space"):
        imagenet.imagenet_sketch(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
