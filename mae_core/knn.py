"""Weighted k-nearest-neighbour classification of features: what an encoder separates without any training."""

import torch
from torch import Tensor
from torch.nn import functional as F

from mae_core.errors import UserError

# Test features compared at a time with a part of the training features: their similarities take 0.5 GB, and 1280-wide
# features of ImageNet in all 3 GB (counted), where 1.3 million at once would take 18.
CHUNK, PART = 1024, 131072


def knn_predict(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> Tensor:
    """Features [N, D] with labels [N] in 0..classes-1, and features [M, D] -> predicted labels [M].

    Each of the k training features nearest by cosine votes for its class with the weight exp(similarity / temperature);
    the lower class wins a tie. The rule, k and temperature are those of Wu et al. (arXiv 1805.01978), as DINO evaluates
    (facebookresearch/dino, eval_knn.py). UserError for fewer than k training features.
    """
    similarity, nearest = nearest_features(train_features, test_features, k, train_features.device)
    return vote(similarity, train_labels.to(nearest.device)[nearest], classes, temperature)


def nearest_features(train: Tensor, test: Tensor, k: int, device: str | torch.device) -> tuple[Tensor, Tensor]:
    """The k rows of train [N, D] nearest by cosine to each of test [M, D]: similarities and indices, both [M, k], the
    nearest first. The work is done on the device, to which train goes in parts. UserError for fewer than k rows."""
    if len(train) < k:
        raise UserError(f"{len(train)} training images for k-NN with k={k}: give more images or a smaller k")
    queries = F.normalize(test.to(device).float(), dim=1).split(CHUNK)
    similarity = torch.empty(len(test), 0, device=device)
    index = torch.empty(len(test), 0, dtype=torch.int64, device=device)
    for start in range(0, len(train), PART):
        part = F.normalize(train[start : start + PART].to(device).float(), dim=1)
        found = [(chunk @ part.T).topk(min(k, len(part)), dim=1) for chunk in queries]
        similarity = torch.cat([similarity, torch.cat([values for values, _ in found])], dim=1)
        index = torch.cat([index, start + torch.cat([rows for _, rows in found])], dim=1)
        if start:  # else they are in order already
            similarity, best = similarity.topk(min(k, similarity.shape[1]), dim=1)
            index = index.gather(1, best)
    return similarity, index


def vote(similarity: Tensor, labels: Tensor, classes: int, temperature: float) -> Tensor:
    """Similarities [M, k], the nearest first, and labels [M, k] of neighbours -> the winning labels [M]."""
    # exp(x - max) instead of exp(x): the same winner at any temperature, and nothing overflows.
    weights = ((similarity - similarity[:, :1]) / temperature).exp()
    votes = torch.zeros(len(similarity), classes, device=weights.device)
    return votes.scatter_add_(1, labels, weights).argmax(dim=1)
