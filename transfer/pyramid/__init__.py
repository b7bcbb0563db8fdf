"""The pre-trained ViT as a feature pyramid: the model, its position biases, and how a checkpoint gets into it."""

from transfer.pyramid.bias import relative_position_bias, resize_geometrically
from transfer.pyramid.load import layer_of, load_pyramid
from transfer.pyramid.model import (
    ViTPyramid,
    facts,
    patch_side,
    pretraining_grid,
    quarters,
    run_block,
    size_objections,
    token_side,
)
from transfer.pyramid.timm_pyramid import TimmPyramid, pyramid_class, refusal
from transfer.pyramid.vitdet import ViTDetPyramid

__all__ = [
    "TimmPyramid",
    "ViTDetPyramid",
    "ViTPyramid",
    "facts",
    "layer_of",
    "load_pyramid",
    "patch_side",
    "pretraining_grid",
    "pyramid_class",
    "quarters",
    "refusal",
    "relative_position_bias",
    "resize_geometrically",
    "run_block",
    "size_objections",
    "token_side",
]
