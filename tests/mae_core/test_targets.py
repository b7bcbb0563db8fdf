import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from torch import nn

from mae_core.errors import UserError
from mae_core.patches import patchify, unpatchify
from mae_core.targets import KMeansTokenizer, PCATarget, PixelTarget, TokenTarget, fit_kmeans, fit_pca


@pytest.fixture
def patches():
    """Patches [500, 48] of 4 px a side with correlated pixels, as images have."""
    rng = np.random.default_rng(0)
    return torch.tensor(rng.normal(size=(500, 8)) @ rng.normal(size=(8, 48)) + rng.normal(size=48)).float()


def test_pca_coefficients_agree_with_scikit_learn_and_with_the_singular_values(patches):
    target = fit_pca(patches, 5)
    images, index = unpatchify(patches[:36].view(1, 36, 48), 4, (6, 6)), torch.tensor([[3, 20, 7]])
    pca, centred = PCA(5).fit(patches.numpy()), patches.double() - patches.double().mean(0)
    coefficients = pca.transform(patches[[3, 20, 7]].numpy())
    by_hand = centred[[3, 20, 7]] @ torch.linalg.svd(centred)[2][:5].T
    np.testing.assert_allclose(np.abs(coefficients), by_hand.abs().numpy(), atol=1e-4)
    # The sign of a component is arbitrary: compare with the target's own.
    signs = np.sign((pca.components_ * target.components.numpy()).sum(axis=1))
    error = target(torch.zeros(1, 3, 5), images, patchify(images, 4), index)
    np.testing.assert_allclose(error[0].numpy(), (coefficients**2).mean(axis=1), rtol=1e-4)
    exact = target(torch.tensor(coefficients * signs)[None].float(), images, patchify(images, 4), index)
    assert exact.abs().max() < 1e-6
    assert target.width == 5


def test_pca_pictures_are_projections(patches):
    target = fit_pca(patches, 8)  # as many as there are directions
    coefficients = (patches - target.mean) @ target.components.T
    torch.testing.assert_close(target.to_pixels(coefficients[None], patches[None])[0], patches, atol=1e-3, rtol=1e-3)


def test_pca_needs_as_many_patches_as_components(patches):
    with pytest.raises(UserError, match="pca_components=49: 500 patches of 48 values have fewer"):
        fit_pca(patches, 49)


def test_normalised_pixels_are_taken_back(patches):
    shown = patches[None, :36]
    normalised = (shown - shown.mean(-1, keepdim=True)) / shown.std(-1, keepdim=True)
    torch.testing.assert_close(PixelTarget(4, True).to_pixels(normalised, shown), shown, atol=1e-4, rtol=1e-4)
    assert PixelTarget(4).to_pixels(normalised, shown) is normalised


class Colour(nn.Module):
    """A tokenizer for tests: 1 where a 4 px patch is bright, else 0."""

    def forward(self, images):
        return (patchify(images, 4).mean(dim=-1) > 0).long()


def test_tokens_of_any_module_cost_cross_entropy():
    images = unpatchify(torch.tensor([1.0, -1, -1, 1]).view(1, 4, 1).expand(1, 4, 48), 4, (2, 2))
    logits, index = torch.tensor([[[0.5, 2.0, -1.0], [1.0, 0.0, 3.0]]]), torch.tensor([[3, 1]])
    error = TokenTarget(Colour(), 3)(logits, images, patchify(images, 4), index)
    expected = [np.log(np.exp(row).sum()) - row[token] for row, token in zip(logits[0].numpy(), (1, 0))]
    np.testing.assert_allclose(error[0].numpy(), expected, rtol=1e-6)
    with pytest.raises(UserError, match="tokens of a tokenizer without a decoder"):
        TokenTarget(Colour(), 3).to_pixels(logits, patchify(images, 4))


def test_k_means_tokens_are_the_nearest_centres(patches):
    kmeans = KMeans(6, n_init=1, random_state=0).fit(patches.double().numpy())
    tokenizer = KMeansTokenizer(4, torch.tensor(kmeans.cluster_centers_).float())
    images = unpatchify(patches[:72].view(2, 36, 48), 4, (6, 6))
    assert tokenizer(images).flatten().tolist() == kmeans.predict(patches[:72].double().numpy()).tolist()


def test_k_means_finds_clusters_and_is_seeded():
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 4, 400)
    points = torch.tensor(10 * np.eye(4, 48)[kinds] + 0.1 * rng.normal(size=(400, 48))).float()
    target = fit_kmeans(points, 4, 4, seed=0)
    tokens = target.tokenizer(unpatchify(points.view(4, 100, 48), 4, (10, 10))).flatten().numpy()
    assert target.width == 4
    assert len({(kind, token) for kind, token in zip(kinds, tokens)}) == 4
    torch.testing.assert_close(target.to_pixels(10.0 * torch.eye(4)[None], None)[0], target.tokenizer.centres)
    assert torch.equal(target.tokenizer.centres, fit_kmeans(points, 4, 4, seed=0).tokenizer.centres)
    with pytest.raises(UserError, match="vocabulary=401: k-means needs more than 400 patches"):
        fit_kmeans(points, 4, 401, seed=0)


def test_what_a_target_fits_travels_in_the_state_dict(small_mae):
    model = small_mae(target=PCATarget(torch.zeros(192), torch.ones(7, 192)))
    fitted = {n.removeprefix("decoder_target.") for n in model.state_dict() if n.startswith("decoder_target.")}
    assert fitted == {"mean", "components"}
    assert model.decoder_pred.weight.shape == (7, 32)
    assert not any(n.startswith("decoder_target") for n in small_mae().state_dict())
