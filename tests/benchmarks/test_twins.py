"""The command of the twins, without an original: what it says, and that a difference is a failure."""

import json
import math

import pytest

from benchmarks import twins
from benchmarks.originals import Call, Difference, evaluation, features, pretraining
from benchmarks.originals.pictures import some_images
from mae_core.errors import UserError
from tests.fixtures.transfer import write_noise_image

PARTS = ("train", "val")
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
        (["pretrain"], "--reference DIR is needed: the original is facebookresearch/mae main_pretrain.py"),
        (["pretrain", "--reference", "."], ".: models_mae.py is not there; give a checkout of facebookresearch/mae"),
        (["finetune", "--reference", "."], ".: models_mae.py is not there; give a checkout of facebookresearch/mae"),
        (["linprobe", "--reference", "."], ".: models_mae.py is not there; give a checkout of facebookresearch/mae"),
        (["knn", "--reference", "."], ".: eval_knn.py is not there; give a checkout of facebookresearch/dino"),
        (["eval", "--reference", "."], ".: validate.py is not there; give a checkout of huggingface/pytorch-image"),
    ],
)
def test_wrong_calls_are_refused_in_one_sentence(tmp_path, capsys, flags, sentence):
    assert twins.main([*flags, "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert list((tmp_path / "out").glob("*")) == []


def test_every_twin_s_function_is_there():
    for twin in twins.TWINS.values():
        assert callable(twin.load()), twin


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Six files in each of three classes."""
    folder = tmp_path_factory.mktemp("photographs")
    for file in range(18):
        write_noise_image(folder / f"class{file // 6}" / f"{file:02}.png", (10 * file, 0, 0), seed=file)
    return folder


def test_a_twin_takes_a_few_images_of_every_class_and_always_the_same(photographs, tmp_path):
    def taken(name):
        folder = some_images(photographs, tmp_path / name, train=6, val=3)
        return {
            part: sorted(str(p.relative_to(folder / part)) for p in (folder / part).rglob("*.png")) for part in PARTS
        }

    once = taken("once")
    assert once == taken("again")
    assert [len(once[part]) for part in PARTS] == [6, 3]
    assert not set(once["train"]) & set(once["val"])
    for part in PARTS:
        assert {name.partition("/")[0] for name in once[part]} == {"class0", "class1", "class2"}


@pytest.mark.parametrize(("folder", "images"), [("", 19), ("class0", 6)])
def test_too_few_images_or_classes_are_refused(photographs, tmp_path, folder, images):
    with pytest.raises(UserError, match=r"holds \d+ images in class folders; this twin takes"):
        some_images(photographs / folder, tmp_path / "some", train=images)


def test_classes_that_are_not_imagenet_s_are_refused(photographs, tmp_path, monkeypatch):
    for module, twin in ((features, features.nearest_neighbours), (evaluation, evaluation.evaluation)):
        monkeypatch.setattr(module, "check_checkout", lambda *_: None)
        monkeypatch.setattr(module, "TRAIN", 6)
        monkeypatch.setattr(module, "VAL", 3)
        (tmp_path / module.__name__).mkdir()
        with pytest.raises(UserError, match="holds no ImageNet classes"):
            twin(Call(photographs, tmp_path, tmp_path / module.__name__))
