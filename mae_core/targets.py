"""What is reconstructed (MAE paper, Table 1d): pixels, normalised pixels, PCA coefficients, discrete tokens."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mae_core.errors import UserError
from mae_core.patches import normalise_patches, patchify, take

TARGETS = ("pixels", "pca", "tokens")


class Target(nn.Module):
    """Called with predictions [B, M, width] of the patches index [B, M], the images [B, 3, H, W] and all their patches
    [B, N, P], it gives the error of each patch [B, M]."""

    width: int  # of the prediction of a patch

    def to_pixels(self, prediction: Tensor, patches: Tensor) -> Tensor:
        """Predictions [B, N, width] of all patches -> pixels [B, N, P], for pictures."""
        raise NotImplementedError  # abstract: each target below has its own


class PixelTarget(Target):
    """The pixels of the patch, or with norm_pix the pixels normalised per patch: mean squared error."""

    def __init__(self, patch: int, norm_pix: bool = False) -> None:
        super().__init__()
        self.width, self.norm_pix = patch * patch * 3, norm_pix

    def forward(self, prediction: Tensor, images: Tensor, patches: Tensor, index: Tensor) -> Tensor:
        target = take(patches, index)
        if self.norm_pix:
            target = normalise_patches(target)
        return (prediction - target).square().mean(dim=-1)

    def to_pixels(self, prediction: Tensor, patches: Tensor) -> Tensor:
        """Normalised pixels get back each patch's true mean and standard deviation."""
        if not self.norm_pix:
            return prediction
        deviation = (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        return prediction * deviation + patches.mean(dim=-1, keepdim=True)


class PCATarget(Target):
    """The coefficients of the patch on the principal components: mean squared error. mean [P], components [C, P]."""

    mean: Tensor
    components: Tensor

    def __init__(self, mean: Tensor, components: Tensor) -> None:
        super().__init__()
        self.width = len(components)
        self.register_buffer("mean", mean)
        self.register_buffer("components", components)

    def forward(self, prediction: Tensor, images: Tensor, patches: Tensor, index: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            target = (take(patches, index).float() - self.mean) @ self.components.T
        return (prediction - target).square().mean(dim=-1)

    def to_pixels(self, prediction: Tensor, patches: Tensor) -> Tensor:
        return prediction @ self.components + self.mean


class TokenTarget(Target):
    """The token that a frozen tokenizer gives the patch: cross-entropy. tokenizer: any module that maps normalised
    images [B, 3, H, W] to token ids [B, N] in 0..vocabulary-1, in raster order."""

    def __init__(self, tokenizer: nn.Module, vocabulary: int) -> None:
        super().__init__()
        self.width, self.tokenizer = vocabulary, tokenizer.requires_grad_(False)

    def forward(self, prediction: Tensor, images: Tensor, patches: Tensor, index: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            tokens = self.tokenizer(images.float()).gather(1, index)
        return F.cross_entropy(prediction.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)

    def to_pixels(self, prediction: Tensor, patches: Tensor) -> Tensor:
        """UserError unless the tokenizer knows what a token looks like."""
        if not isinstance(self.tokenizer, KMeansTokenizer):
            raise UserError("this model predicts tokens of a tokenizer without a decoder: there is no picture of them")
        return self.tokenizer.centres[prediction.argmax(dim=-1)]


class KMeansTokenizer(nn.Module):
    """The number of each patch's nearest centre. centres [K, P]: of k-means over patches. It is no dVAE and learns no
    features: what it keeps of a patch is roughly its colour and one edge."""

    centres: Tensor

    def __init__(self, patch: int, centres: Tensor) -> None:
        super().__init__()
        self.patch = patch
        self.register_buffer("centres", centres)

    def forward(self, images: Tensor) -> Tensor:
        patches = patchify(images, self.patch)
        # |x - c|^2 without |x|^2, which is the same for every centre.
        return (self.centres.square().sum(dim=1) - 2 * patches @ self.centres.T).argmin(dim=-1)


def fit_pca(patches: Tensor, components: int) -> PCATarget:
    """Principal components of patches [M, P]; UserError where there are fewer patches or values than components."""
    from sklearn.decomposition import PCA  # late: the import takes a second

    if components > min(patches.shape):
        raise UserError(f"pca_components={components}: {len(patches)} patches of {patches.shape[1]} values have fewer")
    pca = PCA(components, svd_solver="covariance_eigh").fit(patches.double().numpy())
    return PCATarget(torch.tensor(pca.mean_).float(), torch.tensor(pca.components_).float())


def fit_kmeans(patches: Tensor, patch: int, vocabulary: int, seed: int) -> TokenTarget:
    """k-means over patches [M, P]; UserError where there are fewer patches than tokens."""
    from sklearn.cluster import MiniBatchKMeans

    if vocabulary > len(patches):
        raise UserError(f"vocabulary={vocabulary}: k-means needs more than {len(patches)} patches; raise fit_images")
    kmeans = MiniBatchKMeans(vocabulary, random_state=seed % 2**32, n_init=1, batch_size=4096)
    kmeans.fit(patches.numpy())
    return TokenTarget(KMeansTokenizer(patch, torch.tensor(kmeans.cluster_centers_).float()), vocabulary)
