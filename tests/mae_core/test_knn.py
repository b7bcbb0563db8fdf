import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from mae_core import knn
from mae_core.errors import UserError


@pytest.fixture
def features():
    """Noisy features of 5 classes of unequal length: train [200, 16], labels, test [64, 16], labels."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(5, 16))
    labels = rng.integers(0, 5, 264)
    points = (centres[labels] + rng.normal(scale=1.5, size=(264, 16))) * rng.uniform(0.1, 10, (264, 1))
    points, labels = torch.tensor(points, dtype=torch.float32), torch.tensor(labels)
    return points[:200], labels[:200], points[200:], labels[200:]


@pytest.mark.parametrize(("k", "temperature"), [(20, 0.07), (5, 1.0), (1, 0.07), (200, 0.02)])
def test_agrees_with_scikit_learn(features, k, temperature, monkeypatch):
    train, labels, test, _ = features
    monkeypatch.setattr(knn, "CHUNK", 10)  # which does not divide 64
    other = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
    ).fit(train.numpy(), labels.numpy())
    predicted = knn.knn_predict(train, labels, test, classes=5, k=k, temperature=temperature)
    assert predicted.tolist() == other.predict(test.numpy()).tolist()


def test_training_features_may_be_compared_in_parts(features, monkeypatch):
    """Also where a part is smaller than k."""
    train, _, test, _ = features
    similarity, index = knn.nearest_features(train, test, 20, "cpu")
    assert torch.equal(
        torch.nn.functional.cosine_similarity(train[index[3]], test[3]).argsort(), torch.arange(19, -1, -1)
    )
    monkeypatch.setattr(knn, "PART", 7)
    parts = knn.nearest_features(train, test, 20, "cpu")
    assert torch.equal(parts[1], index)
    torch.testing.assert_close(parts[0], similarity)


def test_a_near_neighbour_outvotes_two_far_ones():
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    labels, test = torch.tensor([2, 0, 0]), torch.tensor([[9.0, 1.0]])
    assert knn.knn_predict(train, labels, test, classes=3, k=3).tolist() == [2]
    assert knn.knn_predict(train, labels, test, classes=3, k=3, temperature=1e3).tolist() == [0]  # one vote each


def test_small_temperatures_do_not_overflow():
    train, labels = torch.eye(3), torch.tensor([0, 1, 2])
    assert knn.knn_predict(train, labels, torch.eye(3), classes=3, k=3, temperature=1e-3).tolist() == [0, 1, 2]


def test_fewer_training_images_than_k_are_refused():
    with pytest.raises(UserError, match="3 training images for k-NN with k=20: give more images"):
        knn.knn_predict(torch.eye(3), torch.arange(3), torch.eye(3), classes=3)
