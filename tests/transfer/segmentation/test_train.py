"""Crops, and trainings on a few generated images: where they start, and that every knob moves something."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mae_core.data import Sample, seed_all
from mae_core.machine import Machine
from tests.fixtures.segmentation import make_config, make_job
from transfer.data.ade20k import FOLDER
from transfer.segmentation import train as train_module
from transfer.segmentation.mmseg_config import dataset_of, train_pipeline
from transfer.segmentation.train import Crops, make_runner, run_test, train


def crops_of(job, seed: int = 0) -> Crops:
    from mmengine.registry import init_default_scope
    from mmseg.registry import DATASETS, MODELS

    init_default_scope("mmseg")
    config = make_config(job)
    dataset = DATASETS.build(dataset_of(Path(job.data.root) / FOLDER, "train", train_pipeline(job.recipe)))
    return Crops(dataset, MODELS.build(config["model"]["data_preprocessor"]), seed)


def test_crops_are_normalised_padded_and_labelled(root, tmp_path, mmseg):
    """An image smaller than the crop: on the right and below nothing but 0 and 255; classes are ids minus 1."""
    job = make_job(root, tmp_path, image_size=128, flip=0.0, photometric=False, min_scale=1.0, max_scale=1.0,
                   test_short_side=56, test_long_side=224)  # fmt: skip
    crops = crops_of(job)
    image, target, bad = crops[Sample(0, 0)]
    label = target["label"]
    assert (image.shape, image.dtype, label.shape, bad) == ((3, 128, 128), torch.float32, (128, 128), "")
    first = sorted((root / FOLDER / "images/training").iterdir())[0]
    width, height = Image.open(first).size  # 52 x 52, resized to 56 x 56
    assert (width, height) == (52, 52)
    assert not image[:, 56:].any()
    assert not image[:, :, 56:].any()
    assert (label[56:] == 255).all()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    small = np.asarray(Image.open(first).resize((56, 56), Image.Resampling.BILINEAR)) / 255
    inside = image[:, :56, :56].permute(1, 2, 0) * std + mean
    assert np.abs(inside.numpy() - small).mean() < 0.02  # of one colour order, one scale
    truth = np.asarray(Image.open(root / FOLDER / "annotations/training" / f"{first.stem}.png"))
    seen = {int(c) for c in label[:56, :56].unique()}
    assert seen == {int(c) - 1 if c else 255 for c in np.unique(truth)}  # enlarged: none is lost
    assert len(seen) > 1


def test_a_crop_depends_on_seed_and_position_only(root, tmp_path, mmseg):
    crops = [crops_of(make_job(root, tmp_path), seed) for seed in (0, 1)]

    def crop(seed: int, position: int, noise: int) -> torch.Tensor:
        seed_all(noise)
        return crops[seed][Sample(3, position)][0]

    assert torch.equal(crop(0, 7, noise=1), crop(0, 7, noise=2))
    assert not torch.equal(crop(0, 7, noise=1), crop(0, 8, noise=1))
    assert not torch.equal(crop(0, 7, noise=1), crop(1, 7, noise=1))


@pytest.mark.slow
def test_training_starts_from_the_encoder_and_changes_it(root, tmp_path):
    """At a rate of nothing the encoder is the checkpoint's to the bit: nothing initialises it again."""
    still = make_job(root, tmp_path / "still", lr=0.0, iterations=2)
    runner, _ = train(still, make_config(still))
    encoder = still.checkpoint.encoder
    own = runner.model.backbone.state_dict()
    shared = [name for name in own if name in encoder]
    assert len(shared) == 4 + 6 * 12
    assert all(torch.equal(own[name], encoder[name]) for name in shared)  # 48 px, as in pre-training
    tables = [name for name in own if re.fullmatch(r"blocks\.\d+\.bias(_class)?", name)]
    assert len(tables) == 12
    assert not any(own[name].any() for name in tables)
    moving = make_job(root, tmp_path / "moving")
    moved = train(moving, make_config(moving))[0].model.backbone.state_dict()
    assert all(not torch.equal(moved[name], encoder[name]) for name in shared)


@pytest.mark.slow
def test_micro_batches_give_the_gradient_of_the_whole_batch(root, tmp_path):
    """Without drop path and dropout, and with BatchNorm's statistics frozen. AdamW keeps a tenth of the gradient."""

    def gradient(micro_batch: int) -> list[torch.Tensor]:
        machine = Machine(micro_batch=micro_batch)
        job = make_job(root, tmp_path / str(micro_batch), machine, head_dropout=0.0, iterations=1, warmup_iterations=0)
        fitted, fit = [], train_module.fit
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.BatchNorm2d, "train", lambda self, mode=True: torch.nn.Module.train(self, False))
            patch.setattr(train_module, "fit", lambda *arguments: fitted.extend(arguments) or fit(*arguments))
            train(job, make_config(job))
        optimizer = fitted[1]
        return [optimizer.state[p]["exp_avg"] for group in optimizer.param_groups for p in group["params"]]

    for whole, halves in zip(gradient(4), gradient(2)):
        assert torch.allclose(whole, halves, rtol=1e-3, atol=1e-3 * float(whole.abs().max()))


TRAINING = {
    "image_size": 56, "iterations": 3, "warmup_iterations": 0, "batch": 3, "lr": 3e-3, "power": 0.5,
    "betas": (0.5, 0.9), "weight_decay": 2.0, "layer_decay": 0.9, "drop_path": 0.5, "taps": (0, 1, 2, 5),
    "pool_scales": (1, 2, 3, 4), "head_channels": 12, "head_dropout": 0.5, "auxiliary_channels": 12,
    "auxiliary_weight": 1.0, "min_scale": 0.5, "max_scale": 1.5, "max_class_share": 0.3, "flip": 0.0,
    "photometric": False, "test_short_side": 64, "test_long_side": 60,
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    found = {}

    def make(**changes) -> dict[str, torch.Tensor]:
        key = json.dumps(changes)
        if key not in found:
            job = make_job(root, tmp_path_factory.mktemp("knob"), **changes)
            found[key] = train(job, make_config(job))[0].model.state_dict()
        return found[key]

    return make


@pytest.mark.slow
@pytest.mark.parametrize("knob", TRAINING)
def test_every_knob_of_training_moves_the_weights(trained, knob):
    before, after = trained(), trained(**{knob: TRAINING[knob]})
    moved = [n for n in before if before[n].shape != after[n].shape or not torch.equal(before[n], after[n])]
    assert moved


@pytest.mark.slow
def test_the_knobs_of_the_test_move_its_numbers(root, tmp_path):
    job = make_job(root, tmp_path)
    runner, _ = train(job, make_config(job))

    def counts(**changes) -> np.ndarray:
        other = replace(job, recipe=replace(job.recipe, **changes))
        again = make_runner(make_config(other), other)
        again.model.load_state_dict(runner.model.state_dict(), strict=True)
        return run_test(again).areas

    before = counts()
    assert np.array_equal(before, counts())
    for knob, value in {"stride": 20, "test_short_side": 70, "test_long_side": 60}.items():
        assert not np.array_equal(before, counts(**{knob: value})), knob
