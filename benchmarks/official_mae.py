"""The official MAE code (facebookresearch/mae), imported from a folder of the user's, to be timed beside ours.

It was written for timm 0.3.2, and its files are read as they are: what they miss in today's timm is put there for the
time of the import, and numpy's old name float for as long as this process lives. Nothing of it is part of this project.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import timm.models.vision_transformer as timm_vit
import torch
from torch import nn

from mae_core.errors import UserError
from mae_core.recipe import PretrainRecipe
from mae_core.vit import get_arch

FILES = ("models_mae.py", "models_vit.py", "util/pos_embed.py", "util/lr_decay.py")


class Block(timm_vit.Block):
    """Today's block, taking the old one's argument qk_scale, which the official code leaves at None."""

    def __init__(self, *args, qk_scale=None, **kwargs) -> None:
        super().__init__(*args, **kwargs)


@contextmanager
def old_names(folder: Path) -> Iterator[None]:
    block = timm_vit.Block
    timm_vit.Block, np.float = Block, np.float64
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        timm_vit.Block = block


def load(folder: Path, name: str) -> ModuleType:
    """One module of the official code; UserError if the folder is not that code."""
    for file in FILES:
        if not (folder / file).is_file():
            raise UserError(f"--compare {folder}: {file} is not there; give a checkout of facebookresearch/mae")
    with old_names(folder.resolve()):
        return importlib.import_module(name)


def autoencoder(folder: Path, arch: str, r: PretrainRecipe) -> nn.Module:
    """Its MaskedAutoencoderViT of the same sizes."""
    a, module = get_arch(arch), load(folder, "models_mae")
    return module.MaskedAutoencoderViT(
        img_size=r.image_size,
        patch_size=a.patch,
        embed_dim=a.dim,
        depth=a.depth,
        num_heads=a.heads,
        decoder_embed_dim=r.decoder_dim,
        decoder_depth=r.decoder_depth,
        decoder_num_heads=r.decoder_heads,
        mlp_ratio=4,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        norm_pix_loss=r.norm_pix,
    )


def classifier(folder: Path, arch: str, image_size: int, classes: int, drop_path: float) -> nn.Module:
    """Its VisionTransformer with average pooling. Its forward pass is the old timm's: features, then the head."""
    a, module = get_arch(arch), load(folder, "models_vit")
    model = module.VisionTransformer(
        img_size=image_size,
        patch_size=a.patch,
        embed_dim=a.dim,
        depth=a.depth,
        num_heads=a.heads,
        mlp_ratio=4,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        num_classes=classes,
        drop_path_rate=drop_path,
        global_pool=True,
    )

    def forward(images: torch.Tensor) -> torch.Tensor:
        return model.head(model.forward_features(images))

    model.forward = forward
    return model


def finetuning_groups(folder: Path, model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict]:
    """Its parameter groups with layer-wise decay of the learning rate."""
    groups = load(folder, "util.lr_decay").param_groups_lrd
    return groups(model, weight_decay, no_weight_decay_list=model.no_weight_decay(), layer_decay=layer_decay)
