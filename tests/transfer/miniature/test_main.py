"""The command line."""

import pytest

from tests.fixtures.miniature import digests
from transfer.miniature import dense, imagenet
from transfer.miniature.__main__ import main


def test_command_line(tmp_path, capsys, monkeypatch):
    for name, per_class in {"TRAIN": 2, "VAL": 3, "HARD": 1, "RENDITION": 1, "SKETCH": 1, "CORRUPTED": 1}.items():
        monkeypatch.setattr(imagenet, name, per_class)
    monkeypatch.setattr(dense, "TRAIN", 3)
    monkeypatch.setattr(dense, "VAL", 2)
    assert main(["--out", str(tmp_path / "data"), "--unlabelled", "20"]) == 0
    printed = capsys.readouterr().out.splitlines()
    names = ["ADEChallengeData2016", "coco"]
    names += ["imagenet", "imagenet-a", "imagenet-c", "imagenet-r", "imagenet-sketch", "unlabelled"]
    assert sorted(p.name for p in (tmp_path / "data").iterdir() if p.is_dir()) == names
    assert len(printed) == 8
    assert "train 32, val 48 images" in printed[0]
    assert len(digests(tmp_path / "data" / "imagenet-c")) == 16 * 15 * 5

    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    for wrong in (["--out", str(tmp_path / "data"), "--seed", "-1"], ["--out", ""]):
        with pytest.raises(SystemExit, match="2"):
            main(wrong)
        assert "error: argument" in capsys.readouterr().err
