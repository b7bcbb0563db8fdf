"""What a record says of its checkpoint: the encoder's size, and how and on what it was pre-trained."""

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch

from mae_core.errors import UserError
from mae_core.vit import build_vit, get_arch

PIXELS = {"true": "normalised pixels", "false": "pixels"}
TOKENS = {"dall-e": "dVAE tokens"}  # named as in the paper's Table 1d


class Pretraining(NamedTuple):
    """epochs: done; planned: by the schedule; images: of the pre-training data. None or "": the file does not say."""

    epochs: int | None = None
    planned: int | None = None
    target: str = ""
    images: int | None = None


def pretraining_of(checkpoint: Mapping[str, Any]) -> Pretraining:
    """What the checkpoint's file states; the metadata of safetensors files are text."""
    meta = checkpoint.get("meta") or {}
    epochs, images = whole(meta.get("epochs")), whole(meta.get("images"))
    done, planned = whole(meta.get("epochs_done")), whole(meta.get("epochs_planned"))
    target = PIXELS.get(str(meta.get("norm_pix")).lower(), "")
    if meta.get("target") == "pca":
        target = "PCA coefficients"
    elif meta.get("target") == "tokens":
        target = TOKENS.get(str(meta.get("tokenizer")), "k-means tokens")
    return Pretraining(done or epochs, planned or epochs, target, images)


def whole(value: Any) -> int | None:
    text = str(value)
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 and int(text) else None


def is_random(checkpoint: Mapping[str, Any]) -> bool:
    return checkpoint.get("format") == "random"


def in_words(epochs: int | str | None, target: str) -> str:
    """ "1600 ep, normalised pixels"; "" if neither is known."""
    return ", ".join(part for part in (f"{epochs} ep" if epochs else "", target) if part)


def pretraining(checkpoint: Mapping[str, Any]) -> str:
    """ "800 ep, pixels, 1,281,167 images", "300 of 800 ep, pixels", "none (random weights)" or "" if unknown."""
    if is_random(checkpoint):
        return "none (random weights)"
    p = pretraining_of(checkpoint)
    length = p.epochs if p.epochs == p.planned else f"{p.epochs} of {p.planned}"
    made = in_words(length, p.target)
    return ", ".join(part for part in (made, p.images and f"{p.images:,} images") if part)


@cache
def parameters(arch: str) -> int | None:
    """Of the encoder at its pre-training input side, with positions and class token; None for an unknown arch."""
    try:
        get_arch(arch)
    except UserError:
        return None
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_vit(arch).parameters())
