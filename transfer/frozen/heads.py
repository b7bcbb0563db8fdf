"""What is trained on the tokens of a frozen encoder: poolings by attention, and a linear layer behind each.

Sources: EfficientProbing is the multi-query cross attention of Psomas et al. (arXiv 2506.10178, ICLR 2026); V-JEPA's
attentive pooler (Bardes et al., arXiv 2404.08471) and AbMILP (Przewiezlikowski et al., arXiv 2412.03215) have the
settings with which billpsomas/efficient-probing compares them.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEADS = 16  # attention heads of V-JEPA's pooler


class EfficientProbing(nn.Module):
    """Tokens [B, N, D] -> [B, D]: query i of `queries` attends to the tokens, softmax(q_i X^T / sqrt(D)), and gathers
    its own D / queries channels of one value projection. The tokens are keys as they are: there is no other matrix."""

    def __init__(self, dim: int, queries: int) -> None:
        super().__init__()
        self.values = nn.Linear(dim, dim, bias=False)
        self.queries = nn.Parameter(0.02 * torch.randn(1, queries, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        weights = (self.queries @ tokens.mT * tokens.shape[2] ** -0.5).softmax(dim=2)  # [B, queries, N]
        values = self.values(tokens).unflatten(2, (weights.shape[1], -1))  # [B, N, queries, D / queries]
        return torch.einsum("bqn,bnqc->bqc", weights, values).flatten(1)


class AttentivePooler(nn.Module):
    """Tokens [B, N, D] -> [B, D]: a transformer block in which one learnt query attends to the tokens."""

    def __init__(self, dim: int) -> None:
        from timm.layers import Mlp

        super().__init__()
        self.query = nn.Parameter(torch.empty(1, 1, dim))
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.mlp = Mlp(dim, 4 * dim)
        for layer in (part for part in self.modules() if isinstance(part, nn.Linear)):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.query, std=0.02)
        with torch.no_grad():
            self.proj.weight /= math.sqrt(2)
            self.mlp.fc2.weight /= math.sqrt(2)

    def forward(self, tokens: Tensor) -> Tensor:
        query = self.query.expand(len(tokens), -1, -1)
        split = (self.q(query), *self.kv(self.norm1(tokens)).chunk(2, dim=2))
        q, k, v = (one.unflatten(2, (HEADS, -1)).transpose(1, 2) for one in split)
        query = query + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return (query + self.mlp(self.norm2(query)))[:, 0]


class AbMILP(nn.Module):
    """Tokens [B, N, D] -> [B, D]: the mean of the tokens after one layer of self-attention, weighted by a softmax over
    what two layers say of each token."""

    def __init__(self, dim: int) -> None:
        from timm.models.vision_transformer import Attention

        super().__init__()
        self.attention = Attention(dim, num_heads=1)
        self.predictor = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.attention(tokens)
        return (tokens * self.predictor(tokens).softmax(dim=1)).sum(dim=1)


POOLINGS = {"ep": EfficientProbing, "vjepa": AttentivePooler, "abmilp": AbMILP}


class AttentiveProbe(nn.Module):
    """`Tokens` [B, blocks, 1 + N, D] -> logits [B, classes] from the patch tokens of the last block: pooling, BatchNorm
    without affine parameters, linear layer."""

    def __init__(self, kind: str, dim: int, classes: int, queries: int) -> None:
        super().__init__()
        self.pooling = EfficientProbing(dim, queries) if kind == "ep" else POOLINGS[kind](dim)
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(self.norm(self.pooling(tokens[:, -1, 1:])))


class LinearProbe(nn.Module):
    """`Tokens` [B, blocks, 1 + N, D] -> logits [B, classes]: a linear layer, drawn as DINOv2's, on the class tokens of
    the last `blocks` blocks and, with `mean`, on the mean of the last patch tokens, which is given too [B, D]."""

    def __init__(self, dim: int, classes: int, blocks: int, mean: bool) -> None:
        super().__init__()
        self.blocks, self.mean = blocks, mean
        self.linear = nn.Linear((blocks + mean) * dim, classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Tensor, mean: Tensor) -> Tensor:
        found = tokens[:, -self.blocks :, 0].flatten(1)
        return self.linear(torch.cat([found, mean], dim=1) if self.mean else found)
