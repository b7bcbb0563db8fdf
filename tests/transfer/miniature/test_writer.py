"""Writing a set whole or not at all."""

import json
from itertools import chain, repeat

import pytest

from mae_core.errors import UserError
from tests.fixtures.miniature import digests
from tests.fixtures.transfer import raising
from transfer.data.findings import MINIATURE_MARKER
from transfer.miniature import dense, imagenet, scenes
from transfer.miniature.writer import VERSION


def test_marker_tells_version_seed_and_counts(root):
    marker = json.loads((root / "imagenet" / MINIATURE_MARKER).read_text())
    assert marker == {"version": VERSION, "seed": 0, "counts": {"train": 800, "val": 1600}}
    for folder in root.iterdir():
        if folder.is_dir():
            counts = json.loads((folder / MINIATURE_MARKER).read_text())["counts"]
            assert len(digests(folder)) == sum(counts.values()), folder.name


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
