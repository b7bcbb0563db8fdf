"""The official MAE code (facebookresearch/mae), imported from the user's checkout of it, and run beside ours.

It was written for timm 0.3.2, torch 1.7 and a GPU. What its files miss in today's libraries is patched in during the
import, and what they miss on a CPU while they run; numpy's old name `float` stays until this process ends.
"""

import contextlib
import importlib
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import timm
import timm.models.vision_transformer as timm_vit
import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from benchmarks.originals import check_checkout
from mae_core.recipe import PretrainRecipe
from mae_core.vit import get_arch

PROJECT = "facebookresearch/mae"
FILES = ("models_mae.py", "models_vit.py", "util/pos_embed.py", "util/lr_decay.py")


class OldBlock(timm_vit.Block):
    """Today's block, which also takes the old argument qk_scale; the official code leaves it at None."""

    def __init__(self, *args: Any, qk_scale: None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


@contextmanager
def old_names(folder: Path) -> Iterator[None]:
    """The names and the version that the official code expects, and its folder on the import path."""
    np.float = np.float64  # type: ignore[attr-defined]
    six = sys.modules["torch._six"] = ModuleType("torch._six")
    six.inf = float("inf")  # type: ignore[attr-defined]
    try:
        with (
            warnings.catch_warnings(action="ignore"),  # of old names
            patch.object(timm_vit, "Block", OldBlock),
            patch.object(timm, "__version__", "0.3.2"),
            patch.object(sys, "path", [str(folder), *sys.path]),
        ):
            yield
    finally:
        del sys.modules["torch._six"]


def load(folder: Path, name: str) -> ModuleType:
    """One module of the official code; UserError if the folder does not hold that code."""
    check_checkout(folder, FILES, PROJECT)
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


def classifier(
    folder: Path, arch: str, image_size: int, classes: int, drop_path: float, pool: str = "avg"
) -> nn.Module:
    """Its VisionTransformer with that pooling, and the forward pass that timm 0.3.2 gave it: features, then head."""
    model = load(folder, "models_vit").VisionTransformer(
        **encoder_arguments(arch, image_size),
        qkv_bias=True,
        num_classes=classes,
        drop_path_rate=drop_path,
        global_pool=pool == "avg",
    )

    def forward(images: torch.Tensor) -> torch.Tensor:
        return model.head(model.forward_features(images))

    model.forward = forward
    return model


def finetuning_groups(folder: Path, model: Any, weight_decay: float, layer_decay: float) -> list[dict]:
    """Its parameter groups with layer-wise learning rate decay. model: from `classifier`."""
    groups = load(folder, "util.lr_decay").param_groups_lrd
    return groups(model, weight_decay, no_weight_decay_list=model.no_weight_decay(), layer_decay=layer_decay)


class Curve:
    """In the place of tensorboard's writer: what the official loop logs at every step, and at the end of an epoch."""

    log_dir = "none"

    def __init__(self) -> None:
        self.scalars: dict[str, list[float]] = {}

    def add_scalar(self, name: str, value: float, at: int) -> None:
        self.scalars.setdefault(name, []).append(value)

    def flush(self) -> None:
        """Nothing is written."""


def run(
    folder: Path, script: str, build: Any, images: Any, flags: dict[str, Any], switches: Sequence[str] = ()
) -> Curve:
    """Run the main function of one of its scripts in this process on the CPU, and return what it logged.

    build: makes its model, with the keyword arguments that the script gives. images: takes the place of torchvision's
    ImageFolder. flags: of the script's command line, with their values; switches: those without.
    """
    main, curve = load(folder, script), Curve()
    models = main.models_mae if script == "main_pretrain" else main.models_vit
    gpu = {"is_available": lambda: False, "synchronize": lambda: None}
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings(action="ignore"))  # of old names, and of AMP without a GPU
        for name, stub in gpu.items():
            stack.enter_context(patch.object(torch.cuda, name, stub))
        stack.enter_context(patch.dict(os.environ))
        for name in ("RANK", "SLURM_PROCID"):  # of a cluster: the script would look for its other processes
            os.environ.pop(name, None)
        stack.enter_context(patch.object(main, "SummaryWriter", lambda log_dir: curve))
        stack.enter_context(patch.object(models, "twin", build, create=True))
        stack.enter_context(patch("torchvision.datasets.ImageFolder", images))
        stack.enter_context(patch("timm.optim.optim_factory.add_weight_decay", param_groups_weight_decay, create=True))
        stack.enter_context(patch("builtins.print"))  # which the script replaces, and never puts back
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        flags = {"model": "twin", "device": "cpu", "num_workers": 0, "output_dir": ""} | flags
        arguments = [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]
        main.main(main.get_args_parser().parse_args([*arguments, "--no_pin_mem", *switches]))
    return curve
