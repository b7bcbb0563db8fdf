"""The dense training steps that speed.py times do the same work in every arm."""

import importlib.util
import json
from functools import partial

import pytest
import torch

from benchmarks import speed, speed_dense
from benchmarks.speed_dense import dense_workloads
from mae_core.machine import Machine

needs_mmseg = pytest.mark.skipif(importlib.util.find_spec("mmseg") is None, reason="mmsegmentation is not installed")


@pytest.fixture
def models(monkeypatch):
    """The models of the arms, as they are handed to their steps."""
    seen = []

    def keeping(real, model, *more):
        seen.append(model)
        return real(model, *more)

    for name in ("our_step", "their_step"):
        monkeypatch.setattr(speed_dense, name, partial(keeping, getattr(speed_dense, name)))
    return seen


def weights(model):
    return sum(p.numel() for p in model.parameters())


@needs_mmseg
def test_ours_and_mmsegmentation_s_segmentor_have_as_many_weights_and_learn(models):
    workloads = dense_workloads("ade20k", "vit_mini_patch8", 64, 2, Machine())
    ours, theirs = models
    assert weights(ours) == weights(theirs)
    for model, step in zip(models, workloads.values()):
        step()
        assert all(p.grad is not None for p in model.parameters())


@needs_mmseg
def test_the_table_and_the_json_name_the_size(tmp_path, capsys):
    more = ["--arch", "vit_mini_patch8", "--image-size", "64", "--warmup", "0", "--repeats", "1", "--device", "cpu"]
    assert speed.main(["ade20k", *more, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "ade20k-vit_mini_patch8-fp32-64px.json").read_text())
    assert (found["image_size"], found["batch"]) == (64, 2)
    assert [arm["name"] for arm in found["arms"]] == ["ours", "mmsegmentation's MAE"]
    assert "64 px, batch 2" in (tmp_path / "ade20k-vit_mini_patch8-fp32-64px.md").read_text()
    assert "1.00x" not in capsys.readouterr().out.split("mmsegmentation's MAE")[0]


def test_the_torchvision_arm_learns(models):
    (step, *_) = dense_workloads("coco", "vit_mini_patch8", 64, 1, Machine()).values()
    step()
    assert all(p.grad is not None for p in models[0].parameters())


@pytest.mark.detectron2
def test_both_engines_have_as_many_weights_as_vitdet(models):
    pytest.importorskip("detectron2")
    workloads = dense_workloads("coco", "vit_base_patch16", 64, 1, Machine())
    assert list(workloads) == ["ours, torchvision", "ours, detectron2", "detectron2's ViTDet"]
    ours, again, theirs = map(weights, models)
    assert again == theirs - 768  # theirs keep the class token's position, which they do not use
    # torchvision's heads have the background's box and mask too.
    assert ours == again + 4 * (1024 + 1) + (256 + 1)
    for step in workloads.values():
        step()


def test_boxes_lie_in_the_image_and_their_masks_fill_them():
    torch.manual_seed(0)
    boxes = speed_dense.random_boxes(96)
    assert boxes.min() >= 0
    assert boxes.max() <= 96
    sides = boxes[:, 2:] - boxes[:, :2]
    assert sides.min() > 0
    assert speed_dense.rectangles(boxes, 96).sum(dim=(1, 2)).tolist() == sides.prod(dim=1).int().tolist()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["pretrain", "--image-size", "64"], "--image-size is for coco and ade20k"),
        (["ade20k", "--compare", "."], "no --compare"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, said, tmp_path, capsys):
    assert speed.main([*flags, "--device", "cpu", "--out", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err
