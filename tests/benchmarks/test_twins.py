"""The command of the twins, without an original: what it says, and that a difference is a failure."""

import json
import math

import pytest

from benchmarks import twins
from benchmarks.originals import Call, Difference, pretraining

SAME = Difference("loss", 0.25, 0.25, 0.0, 1e-5)


@pytest.mark.parametrize(("difference", "held"), [(0.0, True), (1e-5, True), (1.1e-5, False), (math.nan, False)])
def test_a_quantity_is_held_within_what_is_allowed(difference, held):
    assert Difference("loss", 1.0, 1.0, difference, 1e-5).held is held


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Run the command with a twin that finds these differences; its exit code."""

    def run(*found: Difference) -> int:
        def twin(given: Call) -> list[Difference]:
            assert given.work.is_dir()
            return list(found)

        monkeypatch.setattr(pretraining, "pretraining", twin)
        where = ["--reference", str(tmp_path), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
        return twins.main(["pretrain", *where])

    return run


def test_equal_work_is_written_down_and_ends_well(call, tmp_path, capsys):
    assert call(SAME) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["pretrain.json", "pretrain.md"]
    found = json.loads((tmp_path / "out" / "pretrain.json").read_text())
    assert found["original"] == "facebookresearch/mae main_pretrain.py"
    assert {"torch", "timm"} <= found["versions"].keys()
    (only,) = found["differences"]
    values = {"ours": 0.25, "theirs": 0.25, "difference": 0.0, "allowed": 1e-5}
    assert only == {"quantity": "loss", "held": True} | values
    for text in (capsys.readouterr().out, (tmp_path / "out" / "pretrain.md").read_text()):
        assert "| loss | 0.25 | 0.25 | 0 | 1e-05 | yes |" in text


def test_one_difference_too_large_fails_the_command(call, capsys):
    assert call(SAME, Difference("rate", 2.0, 1.0, 1.0, 0.5), SAME) == 1
    assert "| rate | 2 | 1 | 1 | 0.5 | NO |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "--reference DIR is needed: the original is facebookresearch/mae main_pretrain.py"),
        (["--reference", "."], ".: models_mae.py is not there; give a checkout of facebookresearch/mae"),
    ],
)
def test_wrong_calls_are_refused_in_one_sentence(tmp_path, capsys, flags, sentence):
    assert twins.main(["pretrain", "--data", str(tmp_path), "--out", str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert list((tmp_path / "out").glob("*")) == []


def test_every_twin_s_function_is_there():
    for twin in twins.TWINS.values():
        assert callable(twin.load()), twin
