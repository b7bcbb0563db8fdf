"""The official MAE code (facebookresearch/mae), imported from the user's checkout of it, to be timed beside ours.

It was written for timm 0.3.2, and its files are not touched: what they miss in today's timm is patched in during the
import, and numpy's old name `float` until this process ends. None of that code is part of this project.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import timm.models.vision_transformer as timm_vit
import torch
from torch import nn

from mae_core.errors import UserError
from mae_core.recipe import PretrainRecipe
from mae_core.vit import get_arch

FILES = ("models_mae.py", "models_vit.py", "util/pos_embed.py", "util/lr_decay.py")


class OldBlock(timm_vit.Block):
    """Today's block, which also takes the old argument qk_scale; the official code leaves it at None."""

    def __init__(self, *args: Any, qk_scale: None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


@contextmanager
def old_names(folder: Path) -> Iterator[None]:
    """The names that the official code expects, and its folder on the import path."""
    block = timm_vit.Block
    timm_vit.Block = OldBlock  # type: ignore[misc]
    np.float = np.float64  # type: ignore[attr-defined]
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        timm_vit.Block = block  # type: ignore[misc]


def load(folder: Path, name: str) -> ModuleType:
    """One module of the official code; UserError if the folder does not hold that code."""
    for file in FILES:
        if not (folder / file).is_file():
            raise UserError(f"--compare {folder}: {file} is not there; give a checkout of facebookresearch/mae")
    with old_names(folder.resolve()):
        return importlib.import_module(name)


def encoder_arguments(arch: str, image_size: int) -> dict[str, Any]:
    a, norm = get_arch(arch), partial(nn.LayerNorm, eps=1e-6)
    sizes = {"img_size": image_size, "patch_size": a.patch, "embed_dim": a.dim, "depth": a.depth, "num_heads": a.heads}
    return sizes | {"mlp_ratio": 4, "norm_layer": norm}


def autoencoder(folder: Path, arch: str, r: PretrainRecipe) -> nn.Module:
    """Its MaskedAutoencoderViT with the sizes of our recipe."""
    return load(folder, "models_mae").MaskedAutoencoderViT(
        **encoder_arguments(arch, r.image_size),
        decoder_embed_dim=r.decoder_dim,
        decoder_depth=r.decoder_depth,
        decoder_num_heads=r.decoder_heads,
        norm_pix_loss=r.norm_pix,
    )


def classifier(folder: Path, arch: str, image_size: int, classes: int, drop_path: float) -> nn.Module:
    """Its VisionTransformer with average pooling, and the forward pass that timm 0.3.2 gave it: features, then head."""
    model = load(folder, "models_vit").VisionTransformer(
        **encoder_arguments(arch, image_size),
        qkv_bias=True,
        num_classes=classes,
        drop_path_rate=drop_path,
        global_pool=True,
    )

    def forward(images: torch.Tensor) -> torch.Tensor:
        return model.head(model.forward_features(images))

    model.forward = forward
    return model


def finetuning_groups(folder: Path, model: Any, weight_decay: float, layer_decay: float) -> list[dict]:
    """Its parameter groups with layer-wise learning rate decay. model: from `classifier`."""
    groups = load(folder, "util.lr_decay").param_groups_lrd
    return groups(model, weight_decay, no_weight_decay_list=model.no_weight_decay(), layer_decay=layer_decay)
