"""Logistic regression beside scikit-learn's, and what a run makes of a list."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import normalize

from benchmarks.verify import verify
from mae_core.checkpoint import load_encoder, model_of, read_checkpoint
from mae_core.data import normalize as normalize_images
from tests.fixtures import ROOT
from tests.fixtures.lowshot import write_numbered, write_shots
from tests.fixtures.transfer import (
    CLASSES,
    OTHERS,
    assert_objection_is_right,
    make_job,
    other_checkpoint,
    small_checkpoint,
)
from transfer.data.imagenet import read_split
from transfer.data.lowshot import SUBSETS, read_subset
from transfer.data.predictions import read_predictions
from transfer.data.transforms import eval_transform
from transfer.frozen.features import Representation, feature_folder
from transfer.frozen.logreg import CHUNK, fit, images_of, normalised, store_of
from transfer.frozen.tasks import LOGREG
from transfer.miniature import imagenet as miniature
from transfer.run import run_job
from transfer.task import RECORD_FILE

TASK = {task.name: task for task in LOGREG}
MINI = ROOT / "results" / "miniature" / "mae_mini.safetensors"


@pytest.fixture
def data(tmp_path):
    return write_numbered(tmp_path / "data")


def rows(count: int, dim: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features around a centre for each class."""
    generator = torch.Generator().manual_seed(count)
    labels = torch.arange(count) % classes
    centres = torch.randn(classes, dim, generator=generator)
    return centres[labels] + 1.5 * torch.randn(count, dim, generator=generator) + 3, labels


def test_features_are_prepared_as_by_hand():
    features, _ = rows(6, 5, 2)
    expected = features.double().numpy()
    expected = normalize(expected - expected.mean(axis=1, keepdims=True))
    np.testing.assert_allclose(normalised(features).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("l2", [1.0, 0.01, 0.00025])
@pytest.mark.parametrize("chunk", [CHUNK, 7])
def test_the_weights_are_scikit_learns(l2, chunk, monkeypatch):
    monkeypatch.setattr("transfer.frozen.logreg.CHUNK", chunk)
    features, labels = rows(120, 12, 4)
    x, (tests, _) = normalised(features), rows(50, 12, 4)
    w, _, ended = fit(x, labels, 4, l2, iterations=5000)
    assert ended
    theirs = LogisticRegression(C=1 / l2, fit_intercept=False, tol=1e-8, max_iter=5000).fit(x.numpy(), labels.numpy())
    scale = np.abs(theirs.coef_).max()
    np.testing.assert_allclose(w.numpy() / scale, theirs.coef_ / scale, atol=2e-3)
    ours = (normalised(tests) @ w.T).softmax(dim=1).numpy()
    np.testing.assert_allclose(ours, theirs.predict_proba(normalised(tests).numpy()), atol=2e-3)


def test_a_fit_that_is_cut_short_says_so():
    features, labels = rows(120, 12, 4)
    _, steps, ended = fit(normalised(features), labels, 4, 0.00025, iterations=2)
    assert (steps, ended) == (2, False)


def test_a_run_is_scored_among_all_classes_and_keeps_its_features(data, tmp_path):
    """One checkpoint's validation features serve all of its lists."""
    write_shots(data)
    for seed in (0, 1):
        job = make_job(
            TASK["imagenet_logreg_2shot"], data, tmp_path / f"runs/x/imagenet_logreg_2shot/{seed}", seed=seed
        )
        job = replace(job, checkpoint=read_checkpoint(str(MINI)))
        record = run_job(job)
        assert record.status == "ok", record.reason
        assert verify(job.work / RECORD_FILE) == pytest.approx(record.metrics)
        assert (record.n_eval, record.resolved["train_images"]) == (8, 8)
        assert record.resolved["list"] == f"imagenet_subsets{seed + 1}/2imgs_class.txt"
    train, val = images_of(job, SUBSETS[3])
    assert train.files == read_subset(data, SUBSETS[3], 1)[0].files
    assert val == read_split(data / "imagenet/val")[0]
    assert {path.name for path in store_of(job, val).glob("*.safetensors")} == {
        "2shot-0.safetensors", "2shot-1.safetensors", "val.safetensors"
    }  # fmt: skip
    (found,) = read_predictions(job.work / "predictions.parquet").values()
    assert found["label"].tolist() == [c for c in CLASSES for _ in range(2)]


def test_the_feature_is_the_class_token_that_the_last_block_leaves(data, tmp_path):
    """MSN's `forward_blocks`: without the final norm, which makes k-NN's feature of it."""
    write_shots(data)
    job = make_job(TASK["imagenet_logreg_2shot"], data, tmp_path / "runs/x/imagenet_logreg_2shot/0")
    job = replace(job, checkpoint=read_checkpoint(str(MINI)))
    record = run_job(job)
    assert record.resolved["feature"] == "class token before the final norm"
    _, val = images_of(job, SUBSETS[3])
    kept = load_file(store_of(job, val) / "val.safetensors")["features"]
    model = model_of(job.checkpoint, 48).eval()
    load_encoder(model, job.checkpoint)
    transform = eval_transform(48, job.recipe.transform)
    images = normalize_images(torch.stack([transform(Image.open(file).convert("RGB")) for file in val.files]))
    with torch.no_grad():
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        for block in model.blocks:
            tokens = block(tokens)
        after = model.forward_features(images)[:, 0]
        torch.testing.assert_close(kept, tokens[:, 0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.norm(kept), after, rtol=1e-4, atol=1e-4)
    assert (kept - after).abs().mean() > 0.1


@pytest.mark.parametrize("name", OTHERS)
def test_features_of_other_encoders_lack_the_final_norm_too(name):
    source = other_checkpoint(OTHERS[name])
    model = model_of(source).eval()
    load_encoder(model, source)
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = (Representation(model, "token", norm)(images) for norm in (False, True))
    torch.testing.assert_close(model.norm(before), after)
    assert not torch.allclose(before, after)


def test_features_before_and_after_the_norm_lie_apart(data, tmp_path):
    write_shots(data)
    job = make_job(TASK["imagenet_logreg_2shot"], data, tmp_path / "runs/x/imagenet_logreg_2shot/0")
    assert feature_folder(job) != feature_folder(job, norm=False)


def test_each_knob_moves_the_number(data, tmp_path):
    write_shots(data)
    losses = set()
    for i, change in enumerate(({}, {"l2": 0.1}, {"iterations": 1}, {"image_size": 32}, {"transform": "center_crop"})):
        job = make_job(TASK["imagenet_logreg_2shot"], data, tmp_path / f"runs/x/imagenet_logreg_2shot/{i}", **change)
        losses.add(run_job(job).metrics["loss"])
    assert len(losses) == 5


def test_objections(data, tmp_path):
    write_shots(data)
    job = make_job(TASK["imagenet_logreg_2shot"], data, tmp_path / "runs/x/imagenet_logreg_2shot/0", image_size=47)
    assert_objection_is_right(job, "image_size", "47")


@pytest.mark.slow
def test_mae_mini_beats_random_weights_by_more_than_three_paired_standard_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(miniature, "TRAIN", 10)
    monkeypatch.setattr(miniature, "VAL", 20)
    miniature.imagenet_lists(tmp_path / "data")
    right = {}
    for name, checkpoint in (("mini", read_checkpoint(str(MINI))), ("random", small_checkpoint())):
        work = tmp_path / name / "runs/x/imagenet_logreg_5shot/0"
        record = run_job(
            replace(make_job(TASK["imagenet_logreg_5shot"], tmp_path / "data", work), checkpoint=checkpoint)
        )
        assert record.status == "ok", record.reason
        (found,) = read_predictions(work / "predictions.parquet").values()
        right[name] = (found["top1"] == found["label"]).astype(float)
    difference = right["mini"] - right["random"]
    assert difference.mean() > 3 * difference.std(ddof=1) / len(difference) ** 0.5
