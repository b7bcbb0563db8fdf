"""A weight file of one of timm's architectures -> the tensors of a TimmEncoder, complete and in their shapes."""

from pathlib import Path

import torch
from torch import Tensor

from mae_core.checkpoint.errors import CheckpointError
from mae_core.checkpoint.identify import check_shapes
from mae_core.checkpoint.weights_file import as_float32, check_memory, read_file
from mae_core.timm_encoder import INNER, PREFIX, TimmEncoder, is_left_out, timm_names
from mae_core.vit import LARGEST, build_vit


def on_meta(arch: str, image_size: int | None) -> TimmEncoder:
    with torch.device("meta"):
        model = build_vit(arch, image_size)
    assert isinstance(model, TimmEncoder)
    return model


def read_timm(path: Path, architecture: str) -> tuple[dict[str, Tensor], tuple[str, ...], str]:
    """The encoder's tensors, the names in the file that it leaves out, and how it pools. CheckpointError unless the
    file is complete, in a form that timm reads for this architecture."""
    content, _ = read_file(path)
    inner = content.get("state_dict", content.get("model"))
    entries = inner if isinstance(inner, dict) else content
    tensors = {str(name): value for name, value in entries.items() if isinstance(value, Tensor)}
    check_memory(path, tensors)
    model = on_meta(PREFIX + architecture, None)
    try:
        found = timm_names(architecture, tensors, model)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    check_shapes(str(path), found, shapes_of(model), architecture)
    encoder = {name: as_float32(path, name, tensor) for name, tensor in found.items()}
    left = tuple(name for name in tensors if is_left_out(name, model))
    return encoder, left, "token" if model.has_class_token else "avg"


def check_timm(path: Path, arch: str, encoder: dict[str, Tensor], image_size: object) -> int:
    """The side in px that a file of ours was trained at; CheckpointError unless the encoder is complete."""
    side = int(str(image_size)) if str(image_size).isdecimal() and len(str(image_size)) < 6 else 0
    model = on_meta(arch, side if 0 < side <= LARGEST else None)
    check_shapes(str(path), encoder, shapes_of(model), arch)
    return side or model.net.pretrained_cfg["input_size"][-1]


def shapes_of(model: TimmEncoder) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items() if name.startswith(INNER)}
