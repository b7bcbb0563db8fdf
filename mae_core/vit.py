"""The encoder sizes, and the timm VisionTransformer of each; what other encoders have in addition.

Parameter names and shapes are timm's, which are also those of the released MAE files:
``cls_token [1, 1, D]``, ``pos_embed [1, 1 + N, D]``, ``patch_embed.proj.{weight, bias}``, ``blocks.i.*``, ``norm.*``.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from mae_core.errors import UserError
from mae_core.settings import choose
from mae_core.timm_encoder import PREFIX, TimmEncoder, described, is_timm

if TYPE_CHECKING:
    from timm.models.beit import Beit
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

ViT: TypeAlias = "VisionTransformer | Beit | TimmEncoder"


@dataclass(frozen=True)
class Arch:
    """One encoder size: embedding width, blocks, attention heads, patch side and pre-training input side (px)."""

    name: str
    dim: int
    depth: int
    heads: int
    patch: int
    image_size: int


LARGEST = 8192  # px of a side: a million patches of 8 px, whose positions alone fill 4 GB at a width of 1024

# B, L, H: MAE paper, section 4 and the official models (ViT-H has patches of 14). Ti and S: DeiT (arXiv 2012.12877).
# Patches of 8: DINO; of 14: DINOv2, whose giant has SwiGLU layers; of 32: AugReg. MoCo v3's ViT-S has 12 heads
# (facebookresearch/moco-v3 vits.py): the same shapes as DeiT's with 6, but another function.
# vit_mini_patch8 is this project's own: it trains on the generated 48 px miniature in minutes on two cores.
ARCHS = {
    arch.name: arch
    for arch in (
        Arch("vit_mini_patch8", 128, 6, 4, 8, 48),
        Arch("vit_tiny_patch16", 192, 12, 3, 16, 224),
        Arch("vit_small_patch8", 384, 12, 6, 8, 224),
        Arch("vit_small_patch14", 384, 12, 6, 14, 224),
        Arch("vit_small_patch16", 384, 12, 6, 16, 224),
        Arch("vit_small_patch16_heads12", 384, 12, 12, 16, 224),
        Arch("vit_small_patch32", 384, 12, 6, 32, 224),
        Arch("vit_base_patch8", 768, 12, 12, 8, 224),
        Arch("vit_base_patch14", 768, 12, 12, 14, 224),
        Arch("vit_base_patch16", 768, 12, 12, 16, 224),
        Arch("vit_base_patch32", 768, 12, 12, 32, 224),
        Arch("vit_large_patch14", 1024, 24, 16, 14, 224),
        Arch("vit_large_patch16", 1024, 24, 16, 16, 224),
        Arch("vit_huge_patch14", 1280, 32, 16, 14, 224),
        Arch("vit_giant_patch14", 1536, 40, 24, 14, 224),
    )
}


@dataclass(frozen=True)
class Variant:
    """What an encoder has beyond MAE's plain ViT.

    registers: tokens between the class token and the patches (DINOv2's; DeiT's distillation token). positions: how many
    of the class token and the registers have a position in ``pos_embed``. layer_scale: ``blocks.i.ls1.gamma``. swiglu:
    rows of the gated ``mlp.fc1``, 0 for a plain one. beit: relative positions in every block instead of ``pos_embed``,
    layer scale, keys without bias.
    """

    registers: int = 0
    positions: int = 1
    layer_scale: bool = False
    swiglu: int = 0
    beit: bool = False


PLAIN = Variant()


def variant_in_words(variant: Variant) -> str:
    """What an encoder has beyond a plain ViT, in words; "" for nothing."""
    if variant.beit:
        return "BEiT's relative positions and layer scale"
    # Registers, or the token by which a distilled DeiT learns from its teacher.
    tokens = {0: "", 1: "a second token"}.get(variant.registers, f"{variant.registers} further tokens")
    found = [f"{tokens} beside the class token"] if tokens else []
    found += ["layer scale"] if variant.layer_scale else []
    return ", ".join(found + (["SwiGLU layers"] if variant.swiglu else []))


EPS = 1e-6  # of MAE's LayerNorms
norm_layer = partial(nn.LayerNorm, eps=EPS)


def get_arch(name: str) -> Arch:
    """The Arch of that name, "timm/NAME" for an encoder of timm's; UserError with the nearest name if there is none."""
    if not is_timm(name):
        return choose("arch", name, ARCHS)
    try:
        sizes = described(name.removeprefix(PREFIX))
    except KeyError:
        raise UserError(
            f"timm has no encoder '{name.removeprefix(PREFIX)}' that gives tokens: check the name"
        ) from None
    return Arch(name, *(sizes[key] for key in ("dim", "depth", "heads", "patch", "image_size")))


def nearest(arch: str, known: Iterable[str]) -> str:
    """Of the known archs the one whose recipe stands in for this arch: itself, else the nearest in depth, and of one
    depth the nearest in width (both as ratios).

    Depth comes first because layer decay is taken once per block: 0.65, which is meant for 12 blocks, would leave the
    lowest of 24 with 3e-5 of the rate.
    """
    a = get_arch(arch)

    def distance(name: str) -> tuple[bool, float, float]:
        other = get_arch(name)
        return name != arch, abs(math.log(other.depth / a.depth)), abs(math.log(other.dim / a.dim))

    return min(known, key=distance)


def stand_in(arch: str, known: Iterable[str]) -> str:
    """What a recipe's sources call a value that `nearest` chose, such as "stand-in: ViT-L's value"."""
    return f"stand-in: ViT-{nearest(arch, known).split('_')[1][0].upper()}'s value"


def sincos_axis(dim: int, positions: torch.Tensor) -> torch.Tensor:
    """Sine-cosine embedding of scalar positions [M] -> [M, dim]: first half sines, second half cosines, base 10000."""
    omega = 1.0 / 10000 ** (torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = positions.double().flatten()[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_position_embedding(dim: int, grid: tuple[int, int]) -> torch.Tensor:
    """MAE's fixed 2-D sin-cos embedding for a grid (H, W): [1, 1 + H*W, dim], zeros for the class token.

    The first half of the channels encodes the column, the second half the row: that is what the released files hold,
    whatever the variable names in their code say.
    """
    if dim % 4:
        raise ValueError(f"sin-cos positions need a width divisible by 4, not {dim}")
    height, width = grid
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    table = torch.cat([sincos_axis(dim // 2, columns), sincos_axis(dim // 2, rows)], dim=1)
    return torch.cat([torch.zeros(1, dim, dtype=table.dtype), table])[None].float()


def build_vit(
    arch: str,
    image_size: int | tuple[int, int] | None = None,
    num_classes: int = 0,
    pool: str = "token",
    drop_path: float = 0.0,
    eps: float = EPS,
    variant: Variant = PLAIN,
) -> ViT:
    """A timm VisionTransformer of that size, initialised as MAE's; other variants keep timm's initialisation, and BEiT
    is timm's Beit.

    image_size: side or (height, width) in px, each divisible by the patch; the arch's own by default.
    pool: "token" (class token after ``norm``) or "avg" (mean of the patch tokens, then ``fc_norm``; no ``norm``).
    drop_path: rate of the last block; it rises linearly from 0 at block 0. eps: of every LayerNorm; timm's encoders
    keep their own.
    """
    from timm.layers import SwiGLUPacked
    from timm.models.beit import Beit
    from timm.models.vision_transformer import VisionTransformer

    arguments = vit_arguments(arch, image_size) | {"norm_layer": partial(nn.LayerNorm, eps=eps)}
    if is_timm(arch):
        return TimmEncoder(arch.removeprefix(PREFIX), arguments["img_size"], num_classes, pool, drop_path)
    arguments |= {"num_classes": num_classes, "global_pool": pool, "drop_path_rate": drop_path}
    if variant.beit:
        del arguments["weight_init"]
        return Beit(**arguments, init_values=0.1, use_abs_pos_emb=False, use_rel_pos_bias=True)
    if variant == PLAIN:
        vit = VisionTransformer(**arguments)
        init_as_mae(vit)
        return vit
    if variant.swiglu:
        # Half a row more, so that timm's rounding down gives exactly these rows.
        arguments |= {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
        arguments["mlp_ratio"] = (variant.swiglu + 0.5) / arguments["embed_dim"]
    return VisionTransformer(
        **arguments | {"weight_init": ""},
        reg_tokens=variant.registers,
        no_embed_class=variant.positions == 0,
        init_values=1e-5 if variant.layer_scale else None,
    )


def build_distilled(
    arch: str, image_size: int | tuple[int, int] | None, num_classes: int
) -> "VisionTransformerDistilled":
    """timm's ViT with DeiT's distillation token and second head; its logits are the mean of the two heads' logits."""
    from timm.models.deit import VisionTransformerDistilled

    return VisionTransformerDistilled(**vit_arguments(arch, image_size), num_classes=num_classes)


def vit_arguments(arch: str, image_size: int | tuple[int, int] | None = None) -> dict[str, Any]:
    """The arguments of timm's VisionTransformer for this arch and input size; UserError if the patches do not fit, or
    there would be too many to hold."""
    a = get_arch(arch)
    size = (image_size, image_size) if isinstance(image_size, int) else image_size or (a.image_size, a.image_size)
    if size[0] % a.patch or size[1] % a.patch or min(size) < a.patch:
        raise UserError(
            f"{arch} cuts images into patches of {a.patch} px: {size[0]}x{size[1]} is not divisible by it; "
            f"set a multiple of {a.patch}"
        )
    if max(size) > LARGEST:
        raise UserError(f"{size[0]}x{size[1]} px are more than this ViT could hold: at most {LARGEST} px a side")
    return {
        "img_size": size,
        "patch_size": a.patch,
        "embed_dim": a.dim,
        "depth": a.depth,
        "num_heads": a.heads,
        "norm_layer": norm_layer,
        "weight_init": "skip",
    }


def init_as_mae(module: "VisionTransformer") -> None:
    """Initialise in place as MAE does (paper A.1, "ViT architecture", and official code): xavier-uniform for every
    linear layer and for the patch projection as a linear layer, zero biases, unit LayerNorms, tokens normal with std
    0.02, sin-cos positions."""
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Conv2d) and name.endswith("patch_embed.proj"):
            nn.init.xavier_uniform_(part.weight.view(part.weight.shape[0], -1))
            # The official code leaves this bias at torch's default for convolutions.
            bound = part.weight[0].numel() ** -0.5
            if part.bias is not None:
                nn.init.uniform_(part.bias, -bound, bound)
    for name, parameter in module.named_parameters():
        if name.endswith(("cls_token", "mask_token")):
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith("pos_embed"):
            with torch.no_grad():
                parameter.copy_(sincos_position_embedding(parameter.shape[-1], module.patch_embed.grid_size))


def init_as_timm(module: "VisionTransformer") -> None:
    """Initialise in place as timm 0.3.2 does, and so MAE's fine-tuning code without a checkpoint: linear layers, class
    token and positions normal with std 0.02, zero biases, unit LayerNorms, the patch projection by torch's default."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm | nn.Conv2d):
            part.reset_parameters()
    for name, parameter in module.named_parameters():
        if name in ("cls_token", "pos_embed"):
            nn.init.trunc_normal_(parameter, std=0.02)
