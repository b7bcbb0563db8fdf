"""Which ViT a set of tensors is, by their shapes; and whether it is complete."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from mae_core.checkpoint.errors import CheckpointError
from mae_core.remembered import remembered
from mae_core.vit import ARCHS, Variant, build_vit

# Tensors of models that no variant in mae_core/vit.py computes: CLIP's, a ConvStem, EVA's.
FOREIGN = re.compile(r"norm_pre\.|pre_norm\.|ln_pre\.|rope\.|rel_pos_bias\.")


def identify(
    path: Path, tensors: dict[str, Tensor], encoder: dict[str, Tensor], heads: int | None
) -> tuple[str, Variant]:
    """The encoder's arch and variant; CheckpointError unless it is a known ViT with every tensor in the right shape."""
    blocks = {int(match[1]) for name in encoder if (match := re.match(r"blocks\.([0-9]{1,4})\.", name))}
    if not blocks:
        if any(name.startswith("decoder_") for name in tensors):
            raise CheckpointError(f"{path} holds only a decoder: give the file that has the encoder")
        raise CheckpointError(
            f"{path} holds no ViT encoder: none of its {len(tensors)} tensors is named like blocks.0.attn.qkv.weight, "
            f"they are like {next(iter(tensors))}; give a checkpoint of a ViT (--formats lists what is read)"
        )
    if "blocks.0.attn.rel_pos_h" in encoder:
        raise CheckpointError(
            f"{path} is a trained ViTDet detector: its blocks attend in windows and by relative positions "
            "(blocks.0.attn.rel_pos_h), which is no encoder for these tasks; give the checkpoint it started from"
        )
    foreign = next((name for name in tensors if FOREIGN.match(name)), None)
    if foreign:
        raise CheckpointError(
            f"{path} has {foreign}, which none of the ViTs that this project builds has: "
            "give timm's folder of the model (config.json beside model.safetensors) or timm:NAME, and timm builds it"
        )
    projection = encoder.get("patch_embed.proj.weight")
    if projection is None:
        raise CheckpointError(f"{path} has no patch_embed.proj.weight, which every ViT needs: give the complete file")
    variant = variant_of(encoder)
    arch = arch_of(path, (*projection.shape[:1], max(blocks) + 1, *projection.shape[-1:]), heads)
    side = grid_of(encoder, variant) * ARCHS[arch].patch
    wanted = dict(shapes_of(arch, side, variant))
    if "fc_norm.weight" in tensors and not {"norm.weight", "norm.bias"} & encoder.keys():
        del wanted["norm.weight"], wanted["norm.bias"]
    check_shapes(str(path), registered(encoder, wanted), wanted, arch)
    return arch, variant


@remembered
def shapes_of(arch: str, side: int, variant: Variant) -> dict[str, list[int]]:
    """The shape of every tensor of `build_vit` for images of that side (0: its own)."""
    with torch.device("meta"):
        model = build_vit(arch, side or None, variant=variant)
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def arch_of(path: Path, size: tuple[int, ...], heads: int | None) -> str:
    """The arch of that width, depth and patch, and of that number of heads where it is known."""
    found = [a for a in ARCHS.values() if (a.dim, a.depth, a.patch) == size]
    if not found:
        known = ", ".join(f"{a.name} {a.dim}/{a.depth}/{a.patch}" for a in ARCHS.values())
        shown = "/".join(map(str, size))
        raise CheckpointError(f"{path} has an unknown size, width/depth/patch {shown}; known: {known}")
    chosen = [a for a in found if heads in (None, a.heads)]
    if not chosen:
        known = ", ".join(f"{a.name} {a.heads}" for a in found)
        raise CheckpointError(f"{path} has {heads} attention heads, where a ViT of its size has: {known}")
    return chosen[0].name


def registered(encoder: dict[str, Tensor], wanted: dict) -> dict[str, Tensor]:
    """The encoder with DeiT's distillation token named as a register, which it is to a model without a second head."""
    renamed = {"dist_token": "reg_token"} if "reg_token" in wanted else {}
    return {renamed.get(name, name): tensor for name, tensor in encoder.items()}


def variant_of(encoder: dict[str, Tensor]) -> Variant:
    """What the tensors show beyond a plain ViT."""
    if "blocks.0.attn.q_bias" in encoder:
        return Variant(beit=True)
    registers = encoder["reg_token"].shape[1:2].numel() if "reg_token" in encoder else int("dist_token" in encoder)
    layer_scale = "blocks.0.ls1.gamma" in encoder
    tokens = encoder["pos_embed"].shape[1:2].numel() if "pos_embed" in encoder else 0
    # Only with registers or layer scale: a plain ViT whose class token has no position is none of MAE's kind.
    without = (registers or layer_scale) and math.isqrt(tokens) ** 2 == tokens
    rows, columns = (
        encoder[f"blocks.0.mlp.{n}.weight"].shape[i : i + 1].numel() if f"blocks.0.mlp.{n}.weight" in encoder else 0
        for n, i in (("fc1", 0), ("fc2", 1))
    )
    return Variant(registers, 0 if without else 1 + registers, layer_scale, rows if rows == 2 * columns else 0)


def grid_of(encoder: dict[str, Tensor], variant: Variant) -> int:
    """Patches along one side; 0 if the positions are not those of a square."""
    if variant.beit:
        table = encoder.get("blocks.0.attn.relative_position_bias_table", torch.empty(0))
        distances = table.shape[:1].numel() - 3  # (2 w - 1)^2 of them, and three of the class token
        side = math.isqrt(max(distances, 0))
        return (side + 1) // 2 if side**2 == distances else 0
    tokens = encoder["pos_embed"].shape[1:2].numel() - variant.positions if "pos_embed" in encoder else 0
    return math.isqrt(max(tokens, 0)) if math.isqrt(max(tokens, 0)) ** 2 == tokens else 0


def image_size_of(encoder: dict[str, Tensor], arch: str, variant: Variant) -> int:
    return grid_of(encoder, variant) * ARCHS[arch].patch


def resize_position_embedding(pos_embed: Tensor, grid: tuple[int, int], prefix: int = 1) -> Tensor:
    """Position embedding [1, prefix + N, D] of a square grid -> [1, prefix + H*W, D] for grid (H, W), in float32.

    Bicubic without antialiasing, as the official code does; the `prefix` tokens before the patches keep their own. For
    the same grid it returns pos_embed itself.
    """
    side = math.isqrt(pos_embed.shape[1] - prefix)
    if side * side != pos_embed.shape[1] - prefix:
        raise CheckpointError(f"pos_embed {list(pos_embed.shape)} is not a class token and a square grid of patches")
    if (side, side) == tuple(grid):
        return pos_embed
    patches = pos_embed[:, prefix:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=tuple(grid), mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :prefix].float(), patches.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def check_shapes(what: str, have: dict[str, Tensor], wanted: Mapping[str, Sequence[int]], by: str) -> None:
    """CheckpointError that names the first tensor that is missing, has another shape or is unknown."""
    for name, shape in wanted.items():
        if name not in have:
            raise CheckpointError(f"{what} has no {name}, which {by} needs: give the complete file")
        if tuple(have[name].shape) != tuple(shape):
            raise CheckpointError(f"{what}: {name} is {list(have[name].shape)} where {by} has {list(shape)}")
    for name in have:
        if name not in wanted:
            raise CheckpointError(f"{what} has {name}, which {by} does not have")
