"""Weighted k-nearest-neighbour classification of features: what an encoder separates without any training."""

import torch
from torch import Tensor
from torch.nn import functional as F

from mae_core.errors import UserError

CHUNK = 1024  # test features compared at a time: 1024 x 1.3 million similarities take 5 GB


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
    if len(train_features) < k:
        raise UserError(f"{len(train_features)} training images for k-NN with k={k}: give more images or a smaller k")
    train = F.normalize(train_features.float(), dim=1)
    predicted = []
    for part in test_features.split(CHUNK):
        similarity, nearest = (F.normalize(part.float(), dim=1) @ train.T).topk(k, dim=1)
        # exp(x - max) instead of exp(x): the same winner at any temperature, and nothing overflows.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = torch.zeros(len(part), classes, device=weights.device)
        votes.scatter_add_(1, train_labels.to(weights.device)[nearest], weights)
        predicted.append(votes.argmax(dim=1))
    return torch.cat(predicted) if predicted else train_labels.new_zeros(0)
