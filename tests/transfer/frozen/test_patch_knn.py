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
from transfer.frozen.patch_knn import Patches, most_frequent, neighbours, pixels_of, vote
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


def noise(count: int, seed: int = 0) -> Patches:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, (count, 9)).astype(np.uint8)
    return Patches(torch.from_numpy(rng.normal(size=(count, 6)).astype(np.float32)), torch.from_numpy(labels))


@pytest.mark.parametrize("distance", ["cosine", "L2"])
@pytest.mark.parametrize("keys", [3, 7, 1000])
def test_the_neighbours_are_scikit_learns(distance, keys, monkeypatch):
    """Also where a block has fewer keys than k; fewer neighbours are the first of more."""
    monkeypatch.setattr(patch_knn, "KEYS", keys)
    monkeypatch.setattr(patch_knn, "QUERIES", 4)
    train, queries = noise(40), noise(10, seed=1).features
    metric = {"L2": "euclidean"}.get(distance, distance)
    brute = NearestNeighbors(n_neighbors=40, metric=metric, algorithm="brute").fit(train.features.numpy())
    expected = brute.kneighbors(queries.numpy(), return_distance=False)
    for k in (1, 3, 5, 40):
        found = neighbours(train, queries, k, distance, "cpu")
        np.testing.assert_array_equal(found.numpy(), expected[:, :k])
    classes = vote(train.labels, neighbours(train, queries, 5, distance, "cpu"))
    lowest = stats.mode(train.labels.numpy()[expected[:, :5]], axis=1).mode  # of equals, as nothing is VOID
    np.testing.assert_array_equal(classes.numpy(), lowest)


def test_each_block_of_keys_is_fetched_once(monkeypatch):
    monkeypatch.setattr(patch_knn, "KEYS", 7)
    monkeypatch.setattr(patch_knn, "QUERIES", 4)
    given, original = [], patch_knn.closest
    monkeypatch.setattr(patch_knn, "closest", lambda q, keys, *rest: (given.append(keys), original(q, keys, *rest))[1])
    neighbours(noise(40), noise(10, seed=1).features, 5, "L2", "cpu")
    assert len(given) == 6 * 3  # of 7 keys or 5, and of 4 queries or 2
    assert len({id(keys) for keys in given}) == 6


def test_a_pixel_without_a_class_wins_a_tie():
    """As class 0 of CAPI: label files' 0, which is VOID here."""
    labels = torch.tensor([[VOID, VOID, 3, 3, 7], [3, 1, 1, 3, VOID], [VOID, 0, 0, 9, 9], [VOID, 149, 149, 2, VOID]])
    labels = labels.to(torch.uint8)
    assert most_frequent(labels).tolist() == [VOID, 1, 0, VOID]
    assert Patches(torch.zeros(4, 1), labels).voting.tolist() == [False, True, True, False]
    capis = torch.where(labels == VOID, 0, labels.int() + 1).mode(dim=1).values
    assert torch.equal(torch.where(capis == 0, VOID, capis - 1), most_frequent(labels).int())
    columns = torch.arange(5)[None]  # the five patches whose one pixel has the labels of a row
    assert [vote(row[:, None], columns).item() for row in labels] == [VOID, 1, 0, VOID]


def test_patches_without_a_class_do_not_vote(monkeypatch):
    """As if they were not there, wherever the pieces in which patches are compared begin."""
    train, queries = noise(40), noise(10, seed=1).features
    train.labels[5:25, :6] = VOID  # most of each
    others = [*range(5), *range(25, 40)]
    alone = neighbours(Patches(train.features[others], train.labels[others]), queries, 5, "L2", "cpu")
    for keys in (7, 10, 1000):
        monkeypatch.setattr(patch_knn, "KEYS", keys)
        assert torch.equal(neighbours(train, queries, 5, "L2", "cpu"), torch.tensor(others)[alone])


def test_the_plan_says_how_much_memory_the_patches_take(root, tmp_path):
    job = job_of(root, tmp_path / "work")
    assert ADE20K_KNN.detail(job) == job.data.detail
    # ADE20K with ViT-B: 196 patches of 768 floats and 256 labels for each of 22,210 images, in GiB.
    full = replace(job.data, counts={"train": 20_210, "val": 2_000})
    checkpoint = read_checkpoint("random:vit_base_patch16")
    job = replace(job, data=full, checkpoint=checkpoint, recipe=ADE20K_KNN.recipe("vit_base_patch16", "paper"))
    assert f"{22_210 * 196 * (768 * 4 + 256) / 2**30:.1f} GiB of memory" in ADE20K_KNN.detail(job)
    # The search takes two FLOPs for each channel of two patches that are compared: those of the 2,021 held-out images
    # twice with those of the others, those of the validation images with all.
    (part,) = ADE20K_KNN.parts(job)
    search = 2 * 768 * 196**2 * (2 * 2_021 * 18_189 + 2_000 * 20_210)
    assert (part.images, part.passes * 22_210) == (22_210, pytest.approx(22_210 + search / ADE20K_KNN.flops(job)))
    assert 9 < part.passes < 10


def test_the_number_is_that_of_an_independent_evaluation(root, tmp_path, monkeypatch):
    searches = []
    monkeypatch.setattr(patch_knn, "neighbours", lambda *given: (searches.append(given[2:4]), neighbours(*given))[1])
    job = job_of(root, tmp_path / "work", ks=(1.0, 5.0), held_out=0.25)
    record = run_job(job)
    assert record.status == "ok", record.reason
    chosen = record.resolved["neighbours"], record.resolved["distance"]
    assert searches == [(5, "cosine"), (5, "L2"), chosen]  # one for each distance, and the one that counts
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

    def mode(y):  # VOID is 0 for CAPI, and so the lowest of equals
        return (stats.mode((y.astype(int) + 1) % 256, axis=1).mode - 1) % 256

    def miou(x, y, test_x, test_y, k, metric) -> float:
        x, y = scaler.transform(x.reshape(-1, 128)), y.reshape(-1, 64)
        kept = mode(y) != VOID
        found = NearestNeighbors(n_neighbors=k, metric=metric).fit(x[kept])
        places = found.kneighbors(scaler.transform(test_x.reshape(-1, 128)), return_distance=False)
        guess, truth = mode(y[kept][places]).ravel(), test_y.ravel()
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
