"""A checkpoint's encoder into the pyramid, and the depth of each of its parameters."""

import math
import re

import torch
from torch import Tensor, nn

from mae_core.checkpoint import Checkpoint, LoadReport, load_encoder, model_of
from mae_core.timm_encoder import INNER, is_timm
from mae_core.vit import get_arch
from transfer.pyramid.bias import resize_geometrically
from transfer.pyramid.model import ViTPyramid

NEW = re.compile(
    r"upsample_|stages\.|bias_(windowed|global)$|"
    r"(net\.)?blocks\.\d+\.(bias|bias_class|rel_pos_[hw]|ls[12]\.gamma|gamma_[12])$"
)
TABLE = re.compile(r"blocks\.\d+\.bias")
# timm's names of BEiT's tensors, and the pyramid's.
BEIT = ((r"gamma_([12])$", r"ls\1.gamma"), (r"attn\.[qv]_bias$", "attn.qkv.bias"), (r"attn\.relative_.*table$", "bias"))


def load_pyramid(pyramid: ViTPyramid, source: Checkpoint) -> LoadReport:
    """Load a checkpoint's encoder: all its tensors but the last norm, which no map passes through, and, where the
    pyramid has none, the class token and registers. Positions and BEiT's tables are resized to what the pyramid stores,
    ViT-H's patch projection to 16 px (by pseudo-inverse, as in FlexiViT). The LayerNorms get the checkpoint's eps;
    timm's encoders keep theirs. CheckpointError if a tensor is missing or has another shape.

    The pseudo-inverse keeps the token of a flat patch. ViTDet's authors interpolate the projection
    (facebookresearch/long_seq_mae issue 2), which makes that token 1.3 times as large."""
    if pyramid.variant != source.variant:
        raise ValueError("the pyramid was built for another kind of encoder")
    patch = get_arch(pyramid.arch).patch
    size = (pyramid.stored[0] * patch, pyramid.stored[1] * patch)
    # BEiT's tables at the size that they were trained at: they are resized below.
    vit = model_of(source, source.meta["image_size"] if source.variant.beit else size)
    report = load_encoder(vit, source)
    state = from_beit(vit.state_dict()) if source.variant.beit else vit.state_dict()
    own, resized = pyramid.state_dict(), list(report.resized)
    for name in {"pos_embed", f"{INNER}pos_embed"} & own.keys():  # the last are the patches'
        state[name] = state[name][:, -own[name].shape[1] :]
    if not is_timm(pyramid.arch) and pyramid.side != patch:
        from timm.layers import resample_patch_embed

        side = [pyramid.side, pyramid.side]
        state["patch_embed.proj.weight"] = resample_patch_embed(state["patch_embed.proj.weight"], side)
        resized.append("patch_embed.proj.weight")
    for name in [name for name in own if TABLE.fullmatch(name) and name in state]:
        if state[name].shape != own[name].shape:
            state[name] = resize_geometrically(state[name][None], (own[name].shape[1], own[name].shape[2]))[0]
            resized.append(name)
    unused = tuple(name for name in report.loaded if renamed(name) not in own)
    new = tuple(name for name in own if NEW.match(name) and name not in state)
    encoder = {name: state[name] for name in own if name not in new}
    pyramid.load_state_dict(own | encoder, strict=True)
    for module in pyramid.blocks.modules():
        if isinstance(module, nn.LayerNorm) and not is_timm(pyramid.arch):
            module.eps = source.eps
    changed = {renamed(name) for name in report.loaded if renamed(name) != name}
    converted = tuple(name for name in encoder if name in changed or name in report.converted)
    return LoadReport(tuple(encoder), tuple(resized), report.dropped + unused, new, converted)


def renamed(name: str) -> str:
    """The pyramid's name for a tensor of timm's BEiT."""
    for theirs, ours in () if name.startswith(INNER) else BEIT:
        name = re.sub(theirs, ours, name)
    return name


def from_beit(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's BEiT as the plain ViT with layer scales that it is beside its tables: its keys have no bias, and a table
    [distances + 3, heads] ends with the three entries of the class token."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith("relative_position_bias_table"):
            side = math.isqrt(len(tensor) - 3)
            block = name.removesuffix("attn.relative_position_bias_table")
            found[f"{block}bias"] = tensor[:-3].T.unflatten(1, (side, side))
            found[f"{block}bias_class"] = tensor[-3:].T
        elif name.endswith("q_bias"):
            values = state[f"{name.removesuffix('q_bias')}v_bias"]
            found[renamed(name)] = torch.cat([tensor, torch.zeros_like(tensor), values])
        elif not name.endswith("v_bias"):
            found[renamed(name)] = tensor
    return found


def layer_of(name: str, depth: int) -> int:
    """The layer that sets a pyramid parameter's learning rate under layer-wise decay: 0 for the embeddings, i + 1 for
    block i and what is new in it, depth + 1 for other new parameters."""
    name = name.removeprefix(INNER)
    if name.startswith(("patch_embed.", "pos_embed", "cls_token", "reg_token", "norm_pre.", "rope.")):
        return 0
    block = re.match(r"blocks\.(\d+)\.", name)
    return int(block[1]) + 1 if block else depth + 1
