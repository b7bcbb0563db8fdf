"""Any published MAE checkpoint -> Checkpoint: its encoder in timm's names, and strict loading into a ViT.

    python -m mae_core.checkpoint FILE      what a file holds

Formats: the released encoder, full, visualise and fine-tuned files of facebookresearch/mae, its training and
linear-probe checkpoints, timm's flat files, and our own. The size comes from the tensor shapes, never from a name.
"""

import argparse
import hashlib
import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from mae_core.data import MEAN, STD
from mae_core.errors import UserError
from mae_core.vit import ARCHS, build_vit, get_arch
from mae_core.weights_file import CheckpointError, as_float32, read_weights, save_weights, sha256_of

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "LoadReport",
    "load_classifier",
    "load_encoder",
    "read_checkpoint",
    "resize_position_embedding",
    "save_weights",
]


@dataclass(frozen=True)
class LoadReport:
    """What one load did, as tensor names. `resized` is part of `loaded`; `missing` are new heads left as they were."""

    loaded: tuple[str, ...]
    resized: tuple[str, ...]
    dropped: tuple[str, ...]
    missing: tuple[str, ...]

    def summary(self) -> str:
        """One line for a log: "148 tensors loaded (pos_embed resized), 2 dropped, new: fc_norm.weight, head.weight"."""
        resized = f" ({', '.join(self.resized)} resized)" if self.resized else ""
        new = f", new: {', '.join(self.missing)}" if self.missing else ""
        return f"{len(self.loaded)} tensors loaded{resized}, {len(self.dropped)} dropped{new}"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checked weight file. Tensors are float32 on the CPU (counters of a BatchNorm stay integers).

    encoder: timm's names (mae_core/vit.py); without ``norm.*`` in a classifier fine-tuned with average pooling.
    decoder: names of the official code (``mask_token``, ``decoder_*``); {} if the file has none.
    classifier: ``fc_norm.*`` and ``head.*``, or a linear probe's ``head.0.*`` (BatchNorm) and ``head.1.*``; else {}.
    dropped: names of entries that belong to none of these.
    meta: what the file says about its training, such as `epochs` and `norm_pix`; always `image_size`, the side in px.
    mean, std: of the channels (0..1) that its images are normalised with. eps: of its LayerNorms. pool: "token" or
    "avg". plain: a ViT of class token, positions and blocks alone, as MAE's is.
    """

    path: str
    name: str
    format: str
    arch: str
    sha256: str
    encoder: dict[str, Tensor] = field(repr=False)
    decoder: dict[str, Tensor] = field(repr=False)
    classifier: dict[str, Tensor] = field(repr=False)
    dropped: tuple[str, ...] = field(repr=False)
    meta: dict
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    eps: float = 1e-6
    pool: str = "token"
    plain: bool = True

    @property
    def kind(self) -> str:
        """One of encoder (pre-trained), classifier (fine-tuned end to end), linear-probe (frozen encoder and probe).

        A timm file with ``norm.*`` and ``head.*`` is an encoder: supervised pre-training looks like this.
        """
        if any(name.startswith("head.0.") for name in self.classifier):
            return "linear-probe"
        fine_tuned = "fc_norm.weight" in self.classifier or (self.classifier and self.format != "timm")
        return "classifier" if fine_tuned else "encoder"


PARTS = {
    "encoder": re.compile(r"cls_token$|pos_embed$|patch_embed\.|blocks\.|norm\."),
    "decoder": re.compile(r"mask_token$|decoder_"),
    "classifier": re.compile(r"fc_norm\.|head\."),
}
PLAIN = re.compile(
    r"cls_token|pos_embed|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)"
    r"|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)"
)
# Beside the encoder's names, what makes a model compute something else: DeiT distilled, DINOv2, BEiT, CLIP.
NOT_PLAIN = re.compile(r"dist_token|register_tokens|reg_token|rel_pos_bias|norm_pre\.")


def read_checkpoint(spec: str | Path, seed: int = 0) -> Checkpoint:
    """Read and check a file, or make random weights: "random:ARCH" is `build_vit` under that seed.

    CheckpointError unless every encoder tensor is there, has the shape that its size asks for, and is finite. Memory:
    about the bytes of the tensors read, since they stay mapped from the file; half-precision ones take float32 besides.
    """
    if str(spec).startswith("random:"):
        return _random(str(spec), seed)
    path = Path(spec).expanduser()
    format, entries, facts = read_weights(path)
    parts = {
        part: {name: value for name, value in entries.items() if pattern.match(name) and isinstance(value, Tensor)}
        for part, pattern in PARTS.items()
    }
    if "decoder_embed.weight" not in entries:
        parts["decoder"].pop("mask_token", None)  # masked-image training has one, an MAE decoder or not
    arch = _check_encoder(path, entries, parts["encoder"])
    encoder, decoder, classifier = (
        {name: as_float32(path, name, tensor) for name, tensor in part.items()} for part in parts.values()
    )
    return Checkpoint(
        path=str(path),
        name=path.stem,
        format=format,
        arch=arch,
        sha256=sha256_of(path),
        encoder=encoder,
        decoder=decoder,
        classifier=classifier,
        dropped=tuple(name for name in entries if not any(name in part for part in parts.values())),
        meta={**facts, "image_size": _image_size(encoder, arch)},
    )


def _random(spec: str, seed: int) -> Checkpoint:
    try:
        arch = get_arch(spec.removeprefix("random:")).name
    except UserError as error:
        raise CheckpointError(f"{spec}: {error}") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = build_vit(arch).state_dict()
    digest = hashlib.sha256(spec.encode()).hexdigest()
    meta = {"image_size": _image_size(encoder, arch)}
    return Checkpoint(spec, spec, "random", arch, digest, encoder, {}, {}, (), meta)


def _image_size(encoder: dict[str, Tensor], arch: str) -> int:
    return math.isqrt(encoder["pos_embed"].shape[1] - 1) * ARCHS[arch].patch


def _check_encoder(path: Path, entries: dict[str, object], encoder: dict[str, Tensor]) -> str:
    """The arch of the encoder; CheckpointError unless it is a plain ViT with every tensor there in the right shape."""
    blocks = {int(match[1]) for name in encoder if (match := re.match(r"blocks\.(\d+)\.", name))}
    if not blocks:
        if any(name.startswith("decoder_") for name in entries):
            raise CheckpointError(f"{path} holds only a decoder: give the file that has the encoder")
        raise CheckpointError(
            f"{path} holds no ViT encoder: none of its {len(entries)} tensors is named like blocks.0.attn.qkv.weight, "
            f"they are like {next(iter(entries))}; give an MAE checkpoint"
        )
    strange = [name for name in encoder if not PLAIN.fullmatch(name)] + [n for n in entries if NOT_PLAIN.match(n)]
    if strange:
        raise CheckpointError(f"{path} is not a plain ViT, it has {strange[0]}: give an encoder of the MAE kind")
    projection = encoder.get("patch_embed.proj.weight")
    if projection is None:
        raise CheckpointError(f"{path} has no patch_embed.proj.weight, which every ViT needs: give the complete file")
    size = (*projection.shape[:1], max(blocks) + 1, *projection.shape[-1:])
    sizes = {(a.dim, a.depth, a.patch): a.name for a in ARCHS.values()}
    if size not in sizes:
        known = ", ".join(f"{name} {'/'.join(map(str, s))}" for s, name in sizes.items())
        found = "/".join(map(str, size))
        raise CheckpointError(f"{path} has an unknown size, width/depth/patch {found}; known: {known}")
    arch = sizes[size]
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in build_vit(arch).state_dict().items()}
    if "fc_norm.weight" in entries and not {"norm.weight", "norm.bias"} & encoder.keys():
        del wanted["norm.weight"], wanted["norm.bias"]
    tokens = encoder["pos_embed"].shape[1:2].numel() if "pos_embed" in encoder else 0
    if tokens > 1 and math.isqrt(tokens - 1) ** 2 == tokens - 1:
        wanted["pos_embed"] = (1, tokens, size[0])  # pre-trained at another resolution
    _compare(str(path), encoder, wanted, arch)
    return arch


def resize_position_embedding(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """Position embedding [1, 1 + N, D] of a square grid -> [1, 1 + H*W, D] for grid (H, W), in float32.

    Bicubic without antialiasing, as the official code does; the class token keeps its own. The same grid comes back
    as it was.
    """
    side = math.isqrt(pos_embed.shape[1] - 1)
    if side * side != pos_embed.shape[1] - 1:
        raise CheckpointError(f"pos_embed {list(pos_embed.shape)} is not a class token and a square grid of patches")
    if (side, side) == tuple(grid):
        return pos_embed
    patches = pos_embed[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=tuple(grid), mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :1].float(), patches.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def load_encoder(vit: VisionTransformer, checkpoint: Checkpoint) -> LoadReport:
    """Load the encoder into a `build_vit` model, all of it; positions are resized to the model's grid.

    A model that pools by average has no ``norm``: the checkpoint's is dropped, and fc_norm is new, as in the official
    fine-tuning. CheckpointError for a fine-tuned classifier and for any tensor that is missing or does not fit; the
    model is then untouched.
    """
    if checkpoint.kind == "classifier":
        raise CheckpointError(
            f"{checkpoint.path} is a fine-tuned classifier, not a pre-trained encoder: give the pre-training checkpoint"
        )
    wanted = vit.state_dict()
    source = dict(checkpoint.encoder)
    if "fc_norm.weight" in wanted:
        source = {name: tensor for name, tensor in source.items() if not name.startswith("norm.")}
    return _load(vit, checkpoint, source, new=("fc_norm.", "head."))


def load_classifier(vit: VisionTransformer, checkpoint: Checkpoint) -> LoadReport:
    """Load a fine-tuned classifier, encoder and head, into a `build_vit` model of the same pooling and classes.

    CheckpointError if the file has no such head or any tensor is missing or does not fit; the model is then untouched.
    """
    if "head.weight" not in checkpoint.classifier:
        raise CheckpointError(
            f"{checkpoint.path} holds no fine-tuned classifier but {checkpoint.kind} weights: give a fine-tuned file"
        )
    pool = "avg" if "fc_norm.weight" in checkpoint.classifier else "token"
    if vit.global_pool != pool:
        raise CheckpointError(f"{checkpoint.path} was fine-tuned with pool='{pool}': build the model with it")
    return _load(vit, checkpoint, {**checkpoint.encoder, **checkpoint.classifier}, new=())


def _load(
    vit: VisionTransformer, checkpoint: Checkpoint, source: dict[str, Tensor], new: tuple[str, ...]
) -> LoadReport:
    wanted = vit.state_dict()
    missing = tuple(name for name in wanted if name not in source and name.startswith(new))
    positions = source["pos_embed"]
    source["pos_embed"] = resize_position_embedding(positions, vit.patch_embed.grid_size)
    shapes = {name: tensor.shape for name, tensor in wanted.items() if name not in missing}
    _compare(f"{checkpoint.path} ({checkpoint.arch})", source, shapes, "the model")
    vit.load_state_dict({**wanted, **source}, strict=True)
    everything = (*checkpoint.encoder, *checkpoint.decoder, *checkpoint.classifier, *checkpoint.dropped)
    return LoadReport(
        loaded=tuple(source),
        resized=() if source["pos_embed"] is positions else ("pos_embed",),
        dropped=tuple(name for name in everything if name not in source),
        missing=missing,
    )


def _compare(what: str, have: dict[str, Tensor], wanted: dict[str, tuple[int, ...]], by: str) -> None:
    """CheckpointError naming the first tensor that lacks, has another shape or is unknown."""
    for name, shape in wanted.items():
        if name not in have:
            raise CheckpointError(f"{what} has no {name}, which {by} needs: give the complete file")
        if tuple(have[name].shape) != tuple(shape):
            raise CheckpointError(f"{what}: {name} is {list(have[name].shape)} where {by} has {list(shape)}")
    for name in have:
        if name not in wanted:
            raise CheckpointError(f"{what} has {name}, which {by} has not")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mae_core.checkpoint", description="Say what a checkpoint file holds."
    )
    parser.add_argument("file", help="a checkpoint, or random:ARCH")
    try:
        checkpoint = read_checkpoint(parser.parse_args(argv).file)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    parts = {"encoder": checkpoint.encoder, "decoder": checkpoint.decoder, "classifier": checkpoint.classifier}
    for key in ("arch", "format", "kind", "sha256"):
        print(f"{key:<11}{getattr(checkpoint, key)}")
    for part, tensors in parts.items():
        if tensors:
            count = sum(tensor.numel() for tensor in tensors.values())
            print(f"{part:<11}{len(tensors)} tensors, {count:,} parameters")
    print(f"{'dropped':<11}{len(checkpoint.dropped)} {' '.join(checkpoint.dropped[:5])}".rstrip())
    print(f"{'meta':<11}{' '.join(f'{key}={value}' for key, value in checkpoint.meta.items())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
