"""The poolings against the formulas of their papers, and the sizes that were published."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mae_core.vit import get_arch
from transfer.frozen.heads import HEADS, AbMILP, AttentivePooler, AttentiveProbe, EfficientProbing


@pytest.fixture
def tokens():
    return torch.randn(3, 10, 32, generator=torch.Generator().manual_seed(0))


def test_efficient_probing_is_a_softmax_of_each_query_over_its_own_channels(tokens):
    """softmax(q_i X^T / sqrt(D)) V_i, written out for each image and query."""
    torch.manual_seed(0)
    pooling = EfficientProbing(32, queries=4)
    nn.init.normal_(pooling.queries)  # so that the attention is far from even
    found = pooling(tokens)
    for image, x in enumerate(tokens):
        for i, q in enumerate(pooling.queries[0]):
            v = x @ pooling.values.weight[8 * i : 8 * (i + 1)].T  # [N, 8]
            scores = torch.stack([q @ key for key in x]) / math.sqrt(32)
            weights = scores.exp() / scores.exp().sum()
            torch.testing.assert_close(found[image, 8 * i : 8 * (i + 1)], weights @ v)


def test_the_attentive_pooler_is_a_block_around_torchs_own_attention(tokens):
    torch.manual_seed(0)
    pooling = AttentivePooler(32)
    nn.init.normal_(pooling.query)
    reference = nn.MultiheadAttention(32, HEADS, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([pooling.q.weight, pooling.kv.weight]))
        reference.in_proj_bias.copy_(torch.cat([pooling.q.bias, pooling.kv.bias]))
    reference.out_proj = pooling.proj
    query, keys = pooling.query.expand(3, -1, -1), F.layer_norm(tokens, (32,), pooling.norm1.weight, pooling.norm1.bias)
    query = query + reference(query, keys, keys)[0]
    expected = query + pooling.mlp(pooling.norm2(query))
    torch.testing.assert_close(pooling(tokens), expected[:, 0])


def test_abmilp_is_a_mean_weighted_by_what_a_small_network_says(tokens):
    torch.manual_seed(0)
    pooling = AbMILP(32)
    qkv = F.linear(tokens, pooling.attention.qkv.weight).chunk(3, dim=2)
    attended = pooling.attention.proj((qkv[0] @ qkv[1].mT / math.sqrt(32)).softmax(dim=2) @ qkv[2])
    first, _, second = pooling.predictor
    scores = second(torch.tanh(first(attended)))[..., 0]
    expected = torch.stack([w @ x for w, x in zip(scores.softmax(dim=1), attended)])
    torch.testing.assert_close(pooling(tokens), expected)


@pytest.mark.parametrize("kind", ["ep", "vjepa", "abmilp"])
def test_a_pooling_does_not_depend_on_the_order_of_the_patches(kind, tokens):
    torch.manual_seed(0)
    probe = AttentiveProbe(kind, 32, 5, 4).eval()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    given = tokens[:, None]
    shuffled = torch.cat([given[:, :, :1], given[:, :, 1:][:, :, order]], dim=2)
    torch.testing.assert_close(probe(shuffled), probe(given))
    without = given.clone()
    without[:, :, 0] = 0  # the class token has no part in it
    torch.testing.assert_close(probe(without), probe(given))


@pytest.mark.parametrize(("arch", "published"), [("vit_base_patch16", 1_383_400), ("vit_large_patch16", 2_106_344)])
def test_efficient_probing_has_the_parameters_of_its_logs(arch, published):
    """ "Trainable Parameters" in logs/mae_base/ep.txt and logs/mae_vitl/ep.txt of billpsomas/efficient-probing."""
    with torch.device("meta"):
        probe = AttentiveProbe("ep", get_arch(arch).dim, 1000, 32)
    assert sum(p.numel() for p in probe.parameters()) == published
