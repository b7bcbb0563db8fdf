import numpy as np
import pytest
import torch

from mae_core.checkpoint import CheckpointError, read_checkpoint
from mae_core.checkpoint.identify import resize_position_embedding
from mae_core.vit import build_vit
from tests.fixtures.checkpoint import DECODER, ENCODER, FC_NORM, TRUNK, shapes, tensors, without


@pytest.mark.parametrize(
    ("arch", "size", "count"),
    [("vit_base_patch16", (768, 12, 16, 14), 150), ("vit_large_patch16", (1024, 24, 16, 14), 294)],
)
def test_the_released_files_tensors_are_those_of_the_model(arch, size, count):
    with torch.device("meta"):
        model = build_vit(arch).state_dict()
    assert {name: list(tensor.shape) for name, tensor in model.items()} == shapes(*size)
    assert len(shapes(*size)) == count  # counted on the official models, as timm has them


def test_a_vit_b_is_recognised_by_its_shapes(put):
    state = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes(768, 12, 16, 14).items()}
    checkpoint = read_checkpoint(put({"model": state}, "mae_pretrain_vit_large.pth"))  # the name is no evidence
    assert (checkpoint.arch, len(checkpoint.encoder)) == ("vit_base_patch16", 150)


BAD = {
    "a missing tensor": (without(ENCODER, "blocks.3.attn.qkv.bias"), "no blocks.3.attn.qkv.bias"),
    "a missing block": (without(ENCODER, "blocks.2."), "no blocks.2.norm1.weight"),
    "a missing last block": (without(ENCODER, "blocks.5."), "128/5/8; known: vit_mini_patch8 128/6/8"),
    "no final norm": (TRUNK, "no norm.weight"),
    "half a final norm": ({**without(ENCODER, "norm.bias"), **FC_NORM}, "no norm.bias"),
    "no patches": (without(ENCODER, "patch_embed"), "no patch_embed.proj.weight"),
    "no positions": (without(ENCODER, "pos_embed"), "no pos_embed"),
    "a transposed tensor": (
        {**ENCODER, "blocks.0.attn.qkv.weight": torch.zeros(128, 384)},
        "blocks.0.attn.qkv.weight is [128, 384] where vit_mini_patch8 has [384, 128]",
    ),
    "positions without a class token": ({**ENCODER, "pos_embed": torch.zeros(1, 36, 128)}, "pos_embed is [1, 36, 128]"),
    "positions of another width": ({**ENCODER, "pos_embed": torch.zeros(1, 37, 64)}, "pos_embed is [1, 37, 64]"),
    "a flat projection": ({**ENCODER, "patch_embed.proj.weight": torch.zeros(128, 192)}, "128/6/192"),
    "an unknown width": (tensors(shapes(dim=64)), "unknown size, width/depth/patch 64/6/8"),
    "mixed prefixes": ({**without(ENCODER, "norm."), "module.norm.weight": torch.ones(128)}, "no norm.weight"),
    "only a decoder": (DECODER, "holds only a decoder"),
    "a ResNet": (
        {"conv1.weight": torch.zeros(8, 3, 7, 7), "layer1.0.bn1.running_mean": torch.zeros(8)},
        "none of its 2 tensors is named like blocks.0.attn.qkv.weight, they are like conv1.weight",
    ),
    "half a BEiT": (
        {**ENCODER, "blocks.0.attn.q_bias": torch.zeros(128)},
        "no blocks.0.gamma_1, which vit_mini_patch8 needs",
    ),
    "BEiT's shared table over plain attention": (
        {**ENCODER, "rel_pos_bias.relative_position_bias_table": torch.zeros(1)},
        "has rel_pos_bias.relative_position_bias_table, which none of the ViTs",
    ),
    "BEiT's own tables over plain attention": (
        {**ENCODER, "blocks.0.attn.relative_position_bias_table": torch.zeros(1)},
        "has blocks.0.attn.relative_position_bias_table, which vit_mini_patch8 does not have",
    ),
    "half a DINOv2": ({**ENCODER, "blocks.0.ls1.gamma": torch.ones(128)}, "no blocks.0.ls2.gamma"),
    "DINOv2 without positions": (
        {**without(ENCODER, "pos_embed"), "register_tokens": torch.zeros(1, 4, 128)},
        "no complete dinov2-registers file",
    ),
    "no position of DeiT's token": ({**ENCODER, "dist_token": torch.zeros(1, 1, 128)}, "pos_embed is [1, 37, 128]"),
    "CLIP": ({**ENCODER, "norm_pre.weight": torch.zeros(128)}, "has norm_pre.weight, which none of the ViTs"),
    "NaN": ({**ENCODER, "norm.bias": torch.tensor([float("nan")] * 128)}, "norm.bias holds NaN or infinite"),
    "infinity in a decoder": (
        {**ENCODER, **DECODER, "decoder_norm.weight": torch.full((96,), float("-inf"))},
        "decoder_norm.weight holds NaN or infinite",
    ),
    "integers": ({**ENCODER, "norm.bias": torch.zeros(128, dtype=torch.int8)}, "norm.bias is of type torch.int8"),
    "a sparse tensor": ({**ENCODER, "norm.bias": torch.zeros(128).to_sparse()}, "norm.bias is not a dense tensor"),
    "no tensors": ({"epoch": 3, "lr": 0.1}, "no named tensors (only epoch, lr)"),
    "a list": ([torch.zeros(3)], "no named tensors"),
    "an empty state dict": ({"model": {}}, "no named tensors"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("wrapped", [True, False], ids=["model", "flat"])
def test_a_state_dict_that_is_not_a_complete_plain_vit_is_refused(put, case, wrapped):
    state, message = BAD[case]
    path = put({"model": state} if wrapped and isinstance(state, dict) else state)
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def cubic_convolution(size, new):
    """[new, size] weights of Keys' kernel with a = -0.75, as PyTorch has it: centres at halves, edges repeated."""

    def kernel(t):
        t, a = abs(t), -0.75
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0

    weights = np.zeros((new, size))
    for i in range(new):
        x = (i + 0.5) * size / new - 0.5
        for k in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
            weights[i, min(max(k, 0), size - 1)] += kernel(x - k)
    return weights


@pytest.mark.parametrize(("side", "grid"), [(14, (28, 28)), (14, (32, 32)), (14, (9, 21)), (16, (32, 32)), (6, (6, 5))])
def test_positions_are_resized_by_cubic_convolution(side, grid):
    positions = torch.randn(1, 1 + side * side, 8, generator=torch.Generator().manual_seed(0))
    resized = resize_position_embedding(positions, grid)
    table = positions[0, 1:].double().numpy().reshape(side, side, 8)
    rows, columns = (cubic_convolution(side, new) for new in grid)
    expected = np.einsum("hi,wj,ijd->hwd", rows, columns, table).reshape(-1, 8)
    assert resized.shape == (1, 1 + grid[0] * grid[1], 8)
    assert torch.equal(resized[:, 0], positions[:, 0])
    np.testing.assert_allclose(resized[0, 1:].numpy(), expected, atol=1e-5)  # float32 coordinates


def test_positions_of_the_same_grid_are_not_touched():
    positions = torch.randn(1, 197, 8)
    assert resize_position_embedding(positions, (14, 14)) is positions
    # As many patches in another shape are another grid.
    assert not torch.equal(resize_position_embedding(positions, (7, 28)), positions)
    with pytest.raises(CheckpointError, match="square grid"):
        resize_position_embedding(torch.zeros(1, 196, 8), (14, 14))
