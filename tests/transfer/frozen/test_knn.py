import math
import os
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.neighbors import KNeighborsClassifier

from mae_core import outputs
from mae_core.checkpoint import load_encoder, model_of, read_checkpoint
from mae_core.claim import claimed
from mae_core.data import normalize
from mae_core.errors import UserError
from mae_core.vit import Variant, build_vit
from tests.fixtures.transfer import make_job, write_imagenet
from transfer.classification import robustness, train
from transfer.classification.robustness import EVAL
from transfer.classification.tasks import FINETUNE, LINPROBE
from transfer.data.imagenet import read_split
from transfer.data.transforms import eval_transform
from transfer.frozen.features import Representation, feature_folder
from transfer.frozen.knn import KnnRecipe
from transfer.frozen.knn import recipe as knn_recipe
from transfer.frozen.tasks import KNN
from transfer.run import run_job


@pytest.fixture
def images_shown(monkeypatch):
    """Every image that a model is shown, in order."""
    shown = []
    forward = outputs.forward

    def spy(model, images, normalization, *rest):
        shown.extend(normalize(images, normalization))
        return forward(model, images, normalization, *rest)

    monkeypatch.setattr(outputs, "forward", spy)
    return shown


def independent(job, pool="token"):
    """Features by the model itself, one image at a time: (train, labels, val, labels)."""
    model = model_of(job.checkpoint, job.recipe.image_size).eval()
    load_encoder(model, job.checkpoint)
    transform = eval_transform(job.recipe.image_size, job.recipe.transform)
    found = []
    for name in ("train", "val"):
        split, _ = read_split(Path(job.data.root) / "imagenet" / name)
        with torch.inference_mode():
            images = [transform(Image.open(f).convert("RGB"))[None] for f in split.files]
            tokens = torch.cat([model.forward_features(normalize(i, job.checkpoint.normalization)) for i in images])
        prefix = model.num_prefix_tokens
        found += [tokens[:, 0] if pool == "token" else tokens[:, prefix:].mean(1), np.array(split.labels)]
    return found


def by_scikit_learn(k, train, labels, val, truth) -> float:
    model = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07))
    return model.fit(train.numpy(), labels).score(val.numpy(), truth)


def test_the_number_is_that_of_scikit_learn_on_the_same_features(root, tmp_path):
    job = make_job(KNN, root, tmp_path / "a" / "work", k=5)
    record = run_job(job)
    assert record.status == "ok", record.reason
    found = independent(job)
    for name, k in (("top1", 5), ("top1@10", 10), ("top1@20", 20)):
        expected = by_scikit_learn(k, *found)
        assert record.metrics[name] == pytest.approx(100 * expected)
        assert record.stderr[name] == pytest.approx(100 * math.sqrt(expected * (1 - expected) / 12))
    assert record.metrics.keys() == {"top1", "top1@10", "top1@20"}  # 32 training images: no 100, no 200
    assert (record.n_eval, record.images_seen) == (12, 44)
    assert record.resolved["feature"] == "class token after the final norm"
    assert "100 % of the encoder" in record.resolved["load"]


def test_another_k_reads_the_features_and_computes_none(root, tmp_path, images_shown):
    first = run_job(make_job(KNN, root, tmp_path / "a" / "k20", k=20))
    assert len(images_shown) == 44
    second = run_job(make_job(KNN, root, tmp_path / "a" / "k10", k=10, temperature=0.2))
    assert len(images_shown) == 44
    assert second.resolved["features"] == first.resolved["features"]
    assert second.images_seen == first.images_seen == 44
    files = (tmp_path / "a" / first.resolved["features"]).glob("[!.]*")
    assert sorted(p.name for p in files) == ["train.safetensors", "val.safetensors"]


def test_what_another_run_computes_is_waited_for_and_taken(root, tmp_path, images_shown):
    job = make_job(KNN, root, tmp_path / "a" / "work", k=5)
    other = replace(job, work=tmp_path / "a" / "other")
    with ThreadPoolExecutor() as pool:
        with claimed(feature_folder(job)):
            waiting = [pool.submit(run_job, one) for one in (job, other)]
            assert wait(waiting, timeout=1.0).not_done == set(waiting)
            assert images_shown == []
        wait(waiting)
    assert [future.result().status for future in waiting] == ["ok", "ok"]
    assert len(images_shown) == 44


def test_kept_features_bring_the_seconds_that_they_took(root, tmp_path):
    job = make_job(KNN, root, tmp_path / "a" / "one", k=5)
    run_job(job)
    for path in feature_folder(job).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            metadata, features = file.metadata(), file.get_tensor("features")
        save_file({"features": features}, path, metadata | {"seconds": "500"})
    record = run_job(make_job(KNN, root, tmp_path / "a" / "two", k=5))
    assert 1000 <= record.seconds < 1060
    assert record.images_per_second == pytest.approx(44 / record.seconds, abs=0.01)


def test_a_share_of_the_images_votes_by_features_kept_of_all(root, tmp_path, images_shown):
    record = run_job(make_job(KNN, root, tmp_path / "a" / "half", k=5, train_fraction=0.5))
    assert (len(images_shown), record.resolved["train_images"]) == (44, 16)
    train, labels, val, truth = independent(make_job(KNN, root, tmp_path / "other"))
    split = read_split(root / "imagenet" / "train")[0]
    voters = set(split.share(0.5, 0).files)
    rows = [i for i, file in enumerate(split.files) if file in voters]
    assert record.metrics["top1"] == pytest.approx(100 * by_scikit_learn(5, train[rows], labels[rows], val, truth))
    run_job(make_job(KNN, root, tmp_path / "a" / "all", k=5))
    assert len(images_shown) == 44
    few = run_job(make_job(KNN, root, tmp_path / "a" / "few", k=5, train_fraction=0.01))
    assert "has 4 images in its share of 0.01, fewer than k=5" in few.reason


def test_features_are_kept_by_what_they_depend_on(root, tmp_path):
    job = make_job(KNN, root, tmp_path / "work")
    other_checkpoints = ({"sha256": "0"}, {"config": "1"}, {"eps": 1e-5}, {"mean": (0.5, 0.5, 0.5)})
    changed = [
        *(replace(job, checkpoint=replace(job.checkpoint, **change)) for change in other_checkpoints),
        *(
            replace(job, recipe=replace(job.recipe, **change))
            for change in ({"image_size": 32}, {"transform": "resize"})
        ),
        replace(job, data=replace(job.data, fingerprint="0")),
        replace(job, machine=replace(job.machine, precision="bf16")),
        replace(job, seed=1),  # random weights: another seed is another model
    ]
    assert len({feature_folder(j) for j in (job, *changed)}) == len(changed) + 1
    assert len({j.identity()["checkpoint"] for j in changed[:2]} | {job.identity()["checkpoint"]}) == 3
    assert feature_folder(replace(job, recipe=replace(job.recipe, k=3, temperature=1.0))) == feature_folder(job)
    assert feature_folder(replace(job, machine=replace(job.machine, workers=2))) == feature_folder(job)
    file = replace(job, checkpoint=replace(job.checkpoint, format="timm"))
    assert feature_folder(replace(file, seed=5)) == feature_folder(file)


def same_size(file: Path, colour: tuple[int, int, int]) -> None:
    """Another image in a file of the same name, size and time."""
    size, times = file.stat().st_size, file.stat()
    Image.new("RGB", (48, 48), colour).save(file, "JPEG")
    file.write_bytes(file.read_bytes().ljust(size, b"\0"))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def rewrite(path: Path, change) -> None:
    """The features changed, and the metadata kept."""
    with safe_open(path, "pt") as file:
        metadata, features = file.metadata(), file.get_tensor("features")
    save_file({"features": change(features)}, path, metadata)


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(path.read_bytes()[:-40]),
    lambda path: path.write_bytes(b""),
    lambda path: rewrite(path, lambda f: torch.full_like(f, float("nan"))),
    lambda path: rewrite(path, lambda f: f.flip(0).contiguous()),
    lambda path: save_file({"features": load_file(path)["features"]}, path),
])  # fmt: skip
def test_damaged_features_are_computed_again(root, tmp_path, images_shown, capsys, damage):
    first = run_job(make_job(KNN, root, tmp_path / "a" / "one", k=5))
    kept = tmp_path / "a" / first.resolved["features"] / "train.safetensors"
    damage(kept)
    second = run_job(make_job(KNN, root, tmp_path / "a" / "two", k=5))
    assert f"{kept} is damaged: its features are computed again" in capsys.readouterr().out
    assert (second.metrics, second.images_seen, len(images_shown)) == (first.metrics, 44, 44 + 32)


@pytest.mark.parametrize("change", [
    lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    lambda file: os.utime(file, (1, 1)),
    lambda file: same_size(file, (9, 9, 9)),
], ids=["size", "time", "content"])  # fmt: skip
def test_features_of_other_images_under_the_same_names_are_not_taken(tmp_path, images_shown, capsys, change):
    root = write_imagenet(tmp_path / "data", train=3, val=1)
    first = run_job(make_job(KNN, root, tmp_path / "a" / "one", k=5))
    change(next((root / "imagenet" / "train").glob("*/*")))
    again = run_job(make_job(KNN, root, tmp_path / "a" / "two", k=5))
    assert again.resolved["features"] == first.resolved["features"]
    assert (len(images_shown), again.images_seen) == (16 + 12, 16)
    assert "train.safetensors is of other images: its features are computed again" in capsys.readouterr().out


def test_features_can_be_read_by_those_who_can_read_records(root, tmp_path):
    record = run_job(make_job(KNN, root, tmp_path / "a" / "one", k=5))
    (tmp_path / "plain").touch()
    kept = tmp_path / "a" / record.resolved["features"] / "train.safetensors"
    assert kept.stat().st_mode == (tmp_path / "plain").stat().st_mode


def beit_file(tmp_path):
    torch.manual_seed(3)
    state = build_vit("vit_mini_patch8", variant=Variant(beit=True)).state_dict()
    torch.save({"model": state}, tmp_path / "beit.pth")
    return read_checkpoint(tmp_path / "beit.pth")


def test_a_beit_is_shown_its_own_pixels_and_averaged(root, tmp_path, images_shown):
    job = replace(make_job(KNN, root, tmp_path / "a" / "work", k=5), checkpoint=beit_file(tmp_path))
    record = run_job(job)
    assert record.resolved["feature"] == "mean of the patch tokens after the final norm"
    split, _ = read_split(root / "imagenet" / "train")
    pixels = torch.from_numpy(np.array(Image.open(split.files[0]).convert("RGB").resize((54, 54), Image.BICUBIC)))
    expected = (pixels[3:51, 3:51].permute(2, 0, 1) / 255 - 0.5) / 0.5
    torch.testing.assert_close(images_shown[0], expected, atol=0.02, rtol=0)
    assert record.metrics["top1"] == pytest.approx(100 * by_scikit_learn(5, *independent(job, "avg")))


def test_registers_are_not_patches():
    model = build_vit("vit_mini_patch8", variant=Variant(4, 0, layer_scale=True)).eval()
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        tokens = model.forward_features(images)
        torch.testing.assert_close(Representation(model, "avg")(images), tokens[:, 5:].mean(1))
        torch.testing.assert_close(Representation(model, "token")(images), tokens[:, 0])


def test_what_cannot_give_a_number_gives_a_reason(root, tmp_path):
    few = run_job(make_job(KNN, root, tmp_path / "a" / "w", k=33))
    assert few.status == "failed"
    assert "has 32 images, fewer than k=33" in few.reason
    broken = write_imagenet(tmp_path / "data", train=2, val=1)
    file = next((broken / "imagenet" / "train").glob("*/*"))
    file.write_bytes(b"\xff\xd8 cut short")
    bad = run_job(make_job(KNN, broken, tmp_path / "b" / "w", k=2))
    assert bad.status == "failed"
    assert str(file) in bad.reason
    for wrong in ({"k": 0}, {"temperature": 0.0}, {"transform": "resize_corp"}):
        with pytest.raises(UserError):
            KnnRecipe(**{"image_size": 48, **wrong})


def test_the_recipe_is_dinos():
    r = knn_recipe("vit_base_patch16", "paper")
    assert (r.k, r.temperature, r.image_size, r.transform) == (20, 0.07, 224, "resize_crop")
    assert KNN.metric == "top1"


def test_every_classification_task_normalises_as_the_checkpoint_was_trained(root, tmp_path, monkeypatch):
    asked = set()

    def note(images, normalization):
        asked.add(normalization)
        return normalize(images, normalization)

    for module in (train, outputs):
        monkeypatch.setattr(module, "normalize", note)
    checkpoint = beit_file(tmp_path)
    for task in (FINETUNE, LINPROBE):
        job = make_job(task, root, tmp_path / task.name, epochs=1, warmup_epochs=0)
        record = run_job(replace(job, checkpoint=checkpoint))
        assert record.status == "ok", record.reason
        assert record.checkpoint["input"]["mean"] == [0.5, 0.5, 0.5]
    assert asked == {checkpoint.normalization}
    # What fine-tuning leaves says so too, and is evaluated with them.
    left = read_checkpoint(tmp_path / "imagenet_finetune" / "classifier.safetensors")
    assert (left.kind, left.normalization, left.variant) == (
        "classifier",
        checkpoint.normalization,
        Variant(beit=True),
    )
    asked.clear()
    assert run_job(replace(make_job(EVAL, root, tmp_path / "eval"), checkpoint=left)).status == "ok"
    assert asked == {checkpoint.normalization}


def test_the_shifted_sets_are_shown_as_the_classifier_was_trained(root, tmp_path):
    job = make_job(FINETUNE, root, tmp_path / "w")
    assert robustness.normalization_of(job) == job.checkpoint.normalization
    parent = replace(job.checkpoint, mean=(0.5, 0.5, 0.5))
    assert robustness.normalization_of(replace(job, parent=parent)) == parent.normalization
