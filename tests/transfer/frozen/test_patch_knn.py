"""Nearest neighbours of patches: the vote of each pixel, the choice on held-out images, and the score."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import confusion_matrix
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

from benchmarks.verify import verify
from mae_core.checkpoint import load_encoder, model_of, read_checkpoint
from mae_core.data import normalize, seed_for
from mae_core.errors import UserError
from mae_core.machine import Machine
from tests.fixtures.miniature import write_few
from tests.fixtures.transfer import ARCH, OTHERS, assert_objection_is_right, other_checkpoint, small_checkpoint
from transfer.frozen import patch_knn
from transfer.frozen.patch_knn import Patches, pixels_of, predicted
from transfer.frozen.scenes import ADE20K, VOID
from transfer.frozen.tasks import ADE20K_KNN
from transfer.miniature import dense
from transfer.run import run_job
from transfer.task import RECORD_FILE, Job


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_few(dense.ade20k, tmp_path_factory.mktemp("scenes"), 8, 3)


def job_of(root, work, checkpoint=None, seed=0, **knobs) -> Job:
    recipe, data = replace(ADE20K_KNN.recipe(ARCH, "mini"), **{"image_size": 48} | knobs), ADE20K_KNN.inspect(root)
    checkpoint = checkpoint or small_checkpoint()
    return Job(ADE20K_KNN, checkpoint, recipe, "mini", knobs, data, work, seed, machine=Machine(), out=work)


def test_the_recipe_is_capis():
    r = ADE20K_KNN.recipe("vit_large_patch14", "paper")
    assert (r.image_size, r.ks, r.held_out) == (224, (1.0, 3.0, 10.0, 30.0), 0.1)
    with pytest.raises(UserError, match="give whole numbers"):
        replace(r, ks=(1.5,))


@pytest.mark.parametrize("distance", ["cosine", "L2"])
@pytest.mark.parametrize("keys", [7, 1000])
def test_the_vote_is_that_of_scikit_learns_neighbours(distance, keys, monkeypatch):
    monkeypatch.setattr(patch_knn, "KEYS", keys)
    monkeypatch.setattr(patch_knn, "QUERIES", 4)
    rng = np.random.default_rng(0)
    train, queries = rng.normal(size=(40, 6)).astype(np.float32), rng.normal(size=(10, 6)).astype(np.float32)
    labels = rng.integers(0, 4, (40, 9)).astype(np.uint8)
    neighbours = NearestNeighbors(n_neighbors=5, metric={"L2": "euclidean"}.get(distance, distance)).fit(train)
    places = neighbours.kneighbors(queries, return_distance=False)
    expected = stats.mode(labels[places], axis=1).mode  # of equals the lowest
    known = Patches(torch.from_numpy(train), torch.from_numpy(labels))
    found = predicted(known, torch.from_numpy(queries), 5, distance, "cpu")
    np.testing.assert_array_equal(found.numpy(), expected)


def test_patches_without_a_class_do_not_vote(monkeypatch):
    """As if they were not there, wherever the pieces in which patches are compared begin."""
    rng = np.random.default_rng(1)
    train, queries = (torch.from_numpy(rng.normal(size=(n, 6)).astype(np.float32)) for n in (40, 10))
    labels = torch.from_numpy(rng.integers(0, 4, (40, 9)).astype(np.uint8))
    labels[5:25, :6] = VOID  # most of each
    expected = predicted(
        Patches(train[[*range(5), *range(25, 40)]], labels[[*range(5), *range(25, 40)]]), queries, 5, "L2", "cpu"
    )
    for keys in (7, 10, 1000):
        monkeypatch.setattr(patch_knn, "KEYS", keys)
        assert torch.equal(predicted(Patches(train, labels), queries, 5, "L2", "cpu"), expected)


def test_the_plan_says_how_much_memory_the_patches_take(root, tmp_path):
    job = job_of(root, tmp_path / "work")
    assert ADE20K_KNN.detail(job) == job.data.detail
    # ADE20K with ViT-B: 196 patches of 768 floats and 256 labels for each of 22,210 images, in GiB.
    full = replace(job.data, counts={"train": 20_210, "val": 2_000})
    checkpoint = read_checkpoint("random:vit_base_patch16")
    job = replace(job, data=full, checkpoint=checkpoint, recipe=ADE20K_KNN.recipe("vit_base_patch16", "paper"))
    assert f"{22_210 * 196 * (768 * 4 + 256) / 2**30:.1f} GiB of memory" in ADE20K_KNN.detail(job)


def test_the_number_is_that_of_an_independent_evaluation(root, tmp_path):
    job = job_of(root, tmp_path / "work", ks=(1.0, 5.0), held_out=0.25)
    record = run_job(job)
    assert record.status == "ok", record.reason
    model = model_of(job.checkpoint, 48).eval()
    load_encoder(model, job.checkpoint)

    def patches(pairs) -> tuple[np.ndarray, np.ndarray]:
        images, labels = zip(*(pixels_of(pair, 48) for pair in pairs))
        with torch.no_grad():
            tokens = model.forward_features(normalize(torch.stack(images)))[:, 1:]
        cut = [[y[8 * i : 8 * i + 8, 8 * j : 8 * j + 8].flatten() for i in range(6) for j in range(6)] for y in labels]
        return tokens.numpy(), np.array([[part.numpy() for part in image] for image in cut])

    pairs, folder = ADE20K.pairs, root / ADE20K.folder
    order = np.random.default_rng(seed_for(0)).permutation(8)
    x, y = patches([pairs(folder, "train")[i] for i in order])
    test_x, test_y = patches(pairs(folder, "val"))
    scaler = StandardScaler().fit(x[2:].reshape(-1, 128))

    def miou(x, y, test_x, test_y, k, metric) -> float:
        x, y = scaler.transform(x.reshape(-1, 128)), y.reshape(-1, 64)
        kept = stats.mode(y, axis=1).mode != VOID
        found = NearestNeighbors(n_neighbors=k, metric=metric).fit(x[kept])
        places = found.kneighbors(scaler.transform(test_x.reshape(-1, 128)), return_distance=False)
        guess, truth = stats.mode(y[kept][places], axis=1).mode.ravel(), test_y.ravel()
        guess, truth = guess[truth != VOID], truth[truth != VOID]
        matrix = confusion_matrix(truth, guess, labels=range(256))[:, :150]  # a pixel without a class is wrong
        both = np.diag(matrix[:150])
        union = matrix.sum(axis=0) + confusion_matrix(truth, guess, labels=range(256)).sum(axis=1)[:150] - both
        return 100 * (both[union > 0] / union[union > 0]).mean()

    grid = [(k, metric) for k in (1, 5) for metric in ("cosine", "euclidean")]
    tried = {choice: miou(x[2:], y[2:], x[:2], y[:2], *choice) for choice in grid}
    assert list(record.tables["held_out_miou"].values()) == pytest.approx(list(tried.values()), abs=0.02)
    best = max(tried, key=lambda choice: tried[choice])
    assert record.resolved["neighbours"] == best[0]
    assert record.resolved["distance"] == {"euclidean": "L2"}.get(best[1], "cosine")
    assert record.metrics["miou"] == pytest.approx(miou(x, y, test_x, test_y, *best), abs=0.02)
    assert verify(job.work / RECORD_FILE) == pytest.approx(record.metrics)
    assert (record.n_eval, record.images_seen, record.resolved["held_out_images"]) == (3, 11, 2)


@pytest.mark.parametrize("name", OTHERS)
def test_other_encoders_have_neighbours_too(name, root, tmp_path):
    record = run_job(job_of(root, tmp_path / "w", other_checkpoint(OTHERS[name]), ks=(1.0,)))
    assert record.status == "ok", record.reason


def test_every_knob_and_the_seed_move_the_number(root, tmp_path):
    def run(name, **changes) -> dict:
        record = run_job(job_of(root, tmp_path / name, **changes))
        assert record.status == "ok", record.reason
        return record.tables["held_out_miou"], record.metrics

    first = run("first", ks=(1.0,))
    assert run("again", ks=(1.0,)) == first
    others = {"ks": {"ks": (7.0,)}, "held_out": {"held_out": 0.5}, "seed": {"seed": 1}, "size": {"image_size": 56}}
    for name, changes in others.items():
        assert run(name, **{"ks": (1.0,)} | changes) != first


def test_too_few_patches_and_sizes_that_do_not_fit_are_refused(root, tmp_path):
    assert_objection_is_right(job_of(root, tmp_path / "a", ks=(1.0,)), None, "")
    few = run_job(job_of(root, tmp_path / "b", ks=(1000.0,)))
    assert (few.status, "training patches have a class" in few.reason) == ("failed", True)
    job = job_of(root, tmp_path / "c")
    assert_objection_is_right(replace(job, recipe=replace(job.recipe, image_size=50)), "image_size", "not divisible")
