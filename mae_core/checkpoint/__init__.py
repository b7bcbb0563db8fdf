"""Any published ViT checkpoint -> Checkpoint: its encoder in timm's names, and strict loading into a ViT.

    python -m mae_core.checkpoint FILE      what a file holds; --formats lists what is read

The formats are those of mae_core/checkpoint/formats.py. The size comes from the tensor shapes, never from a name.
"""

import hashlib
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from timm.layers import resize_rel_pos_bias_table
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae_core.checkpoint.convert import is_converted, model_settings, read_weights
from mae_core.checkpoint.identify import compare, identify, image_size_of, registered, resize_position_embedding
from mae_core.checkpoint.locate import locate
from mae_core.checkpoint.weights_file import CheckpointError, as_float32, save_weights, sha256_of
from mae_core.data import MEAN, STD, Normalization
from mae_core.errors import UserError
from mae_core.vit import ARCHS, EPS, PLAIN, Variant, build_distilled, build_vit, get_arch

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "LoadReport",
    "classifier_of",
    "load_classifier",
    "load_encoder",
    "model_of",
    "read_checkpoint",
    "resize_position_embedding",
    "save_weights",
]


@dataclass(frozen=True)
class LoadReport:
    """What one load did, as tensor names: every tensor of the file is in `loaded` or `dropped`, every tensor of the
    model in `loaded` or `missing` (new heads, left as they were). `resized` and `converted` (made of others, or turned)
    are parts of `loaded`. coverage: percent of the model's parameters without its head that were loaded."""

    loaded: tuple[str, ...]
    resized: tuple[str, ...]
    dropped: tuple[str, ...]
    missing: tuple[str, ...]
    converted: tuple[str, ...] = ()
    coverage: float = 100.0

    def summary(self) -> str:
        """One line for a log: "148 tensors loaded (pos_embed resized), 2 dropped, new: head.weight; 100 % of the
        encoder"."""
        resized = f" ({', '.join(self.resized[:3])}{' ...' * (len(self.resized) > 3)} resized)" if self.resized else ""
        converted = f", {len(self.converted)} of them converted" if self.converted else ""
        new = f", new: {', '.join(self.missing)}" if self.missing else ""
        counts = f"{len(self.loaded)} tensors loaded{resized}{converted}, {len(self.dropped)} dropped{new}"
        return f"{counts}; {self.coverage:.4g} % of the encoder"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checked weight file. Tensors are float32 on the CPU (counters of a BatchNorm stay integers).

    encoder: timm's names (mae_core/vit.py); without ``norm.*`` in a classifier fine-tuned with average pooling.
    decoder: names of the official code (``mask_token``, ``decoder_*``); {} if the file has none.
    classifier: ``fc_norm.*`` and ``head.*`` (``head_dist.*`` of DeiT), or a linear probe's ``head.0.*`` (BatchNorm) and
    ``head.1.*``; else {}. dropped: names of entries that belong to none of these.
    sources: a tensor's name -> the names in the file that it was made of, where they are others.
    meta: what the file says about its training, such as `epochs` and `norm_pix`; always `image_size`, the side in px.
    mean, std: of the channels (0..1) that its images are normalised with. eps: of its LayerNorms. pool: "token" or
    "avg", what its representation of an image is. variant: what it has beyond a plain ViT.
    config: SHA-256 of the configs beside the weights that decided about these, "" without.
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
    eps: float = EPS
    pool: str = "token"
    variant: Variant = PLAIN
    sources: dict[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    config: str = ""

    @property
    def plain(self) -> bool:
        """Whether it is a ViT of class token, positions and blocks alone, as MAE's is."""
        return self.variant == PLAIN

    @property
    def normalization(self) -> Normalization:
        """mean and std."""
        return self.mean, self.std

    @property
    def identity(self) -> str:
        """What its numbers depend on: the file's SHA-256, and that of the configs beside it."""
        return f"{self.sha256}+{self.config}" if self.config else self.sha256

    @property
    def kind(self) -> str:
        """One of encoder (pre-trained), classifier (fine-tuned end to end), linear-probe (frozen encoder and probe).

        A file with ``norm.*`` and ``head.*`` is an encoder: supervised pre-training looks like this (timm, DeiT,
        Google). MAE's fine-tuning with the class token and our own leave such files too.
        """
        if any(name.startswith("head.0.") for name in self.classifier):
            return "linear-probe"
        tuned = self.format in ("mae-finetuned", "mae-full", "mae-training", "ours") and self.classifier
        if "kind" in self.meta:
            return str(self.meta["kind"])
        pooled = {"fc_norm.weight", "head.weight"} <= self.classifier.keys()
        return "classifier" if pooled or tuned else "encoder"


PARTS = {
    "encoder": re.compile(r"(cls|reg|dist)_token$|pos_embed$|patch_embed\.|blocks\.|norm\."),
    "decoder": re.compile(r"mask_token$|decoder_"),
    "classifier": re.compile(r"fc_norm\.|head\.|head_dist\."),
}


def read_checkpoint(spec: str | Path, seed: int = 0, key: str | None = None) -> Checkpoint:
    """Read and check a file, a folder with a config, "hf:NAME" or "timm:NAME"; or make random weights: "random:ARCH" is
    `build_vit` under that seed. key: which of several models in one file.

    CheckpointError unless every encoder tensor is there, has the shape that its size asks for, and is finite. Memory:
    about the bytes of the tensors read, since they stay mapped from the file; half-precision ones, and queries, keys
    and values that are joined, take theirs besides.
    """
    if str(spec).startswith("random:"):
        return _random(str(spec), seed)
    source = locate(str(spec))
    path = source.path
    weights = read_weights(path, key)
    tensors, known = weights.tensors, model_settings(path, weights, source.said)
    parts = {part: {n: t for n, t in tensors.items() if p.match(n)} for part, p in PARTS.items()}
    if "decoder_embed.weight" not in tensors:
        parts["decoder"].pop("mask_token", None)  # masked-image training has one, an MAE decoder or not
    arch, variant = identify(path, tensors, parts["encoder"], known.pop("heads"))
    head = parts["classifier"].get("head.weight")
    if head is not None and head.shape[1:] != (ARCHS[arch].dim,):  # DINOv2's head over class token and average
        parts["classifier"] = {}
    encoder, decoder, classifier = (
        {name: as_float32(path, name, tensor) for name, tensor in part.items()} for part in parts.values()
    )
    kept = encoder.keys() | decoder.keys() | classifier.keys()
    left = [old for name in tensors if name not in kept for old in weights.sources[name]]
    if classifier:
        known["pool"] = "avg" if "fc_norm.weight" in classifier else "token"
    return Checkpoint(
        path=source.spec,
        name=source.name,
        format=weights.format.name,
        arch=arch,
        sha256=sha256_of(path),
        encoder=encoder,
        decoder=decoder,
        classifier=classifier,
        dropped=(*weights.dropped, *left),
        meta={**weights.facts, "image_size": image_size_of(encoder, arch, variant)},
        variant=variant,
        sources={name: old for name, old in weights.sources.items() if name in kept and is_converted(name, old)},
        config=source.config,
        **known,
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
    meta = {"image_size": image_size_of(encoder, arch, PLAIN)}
    return Checkpoint(spec, spec, "random", arch, digest, encoder, {}, {}, (), meta)


def model_of(
    checkpoint: Checkpoint,
    image_size: int | tuple[int, int] | None = None,
    num_classes: int = 0,
    pool: str = "token",
    drop_path: float = 0.0,
) -> VisionTransformer | Beit:
    """`build_vit` for this checkpoint: of its size and variant and with its eps; `load_encoder` brings the weights."""
    c = checkpoint
    return build_vit(c.arch, image_size, num_classes, pool, drop_path, c.eps, c.variant)


def classifier_of(checkpoint: Checkpoint, image_size: int | tuple[int, int] | None = None) -> VisionTransformer | Beit:
    """The classifier in a checkpoint, loaded: its classes, its pooling, and both heads of a distilled DeiT.
    image_size: px; by default the one it was trained at. CheckpointError if the file holds none.
    """
    classes = len(_head(checkpoint))
    size = image_size or checkpoint.meta["image_size"]
    if "head_dist.weight" in checkpoint.classifier:
        vit = build_distilled(checkpoint.arch, size, classes)
    else:
        vit = model_of(checkpoint, size, classes, checkpoint.pool)
    load_classifier(vit, checkpoint)
    return vit


def load_encoder(vit: VisionTransformer | Beit, checkpoint: Checkpoint) -> LoadReport:
    """Load the encoder into a `model_of` model, all of it; positions are resized to the model's grid. The eps of the
    checkpoint is set in every LayerNorm: it is as much a part of what was trained as the weights.

    A model that pools by average has no ``norm``: the checkpoint's is dropped, and fc_norm is new, as in the official
    fine-tuning. CheckpointError for a fine-tuned classifier and for any tensor that is missing or does not fit; the
    model is then untouched.
    """
    if checkpoint.kind == "classifier":
        raise CheckpointError(
            f"{checkpoint.path} is a fine-tuned classifier, not a pre-trained encoder: give the pre-training checkpoint"
        )
    source = dict(checkpoint.encoder)
    if "fc_norm.weight" in vit.state_dict():
        source = {name: tensor for name, tensor in source.items() if not name.startswith("norm.")}
    return _load(vit, checkpoint, source, new=("fc_norm.", "head."))


def load_classifier(vit: VisionTransformer | Beit, checkpoint: Checkpoint) -> LoadReport:
    """Load a classifier, encoder and head, into a model of the same pooling and classes (`classifier_of` builds one).
    CheckpointError if the file has no such head or any tensor is missing or does not fit; the model is then untouched.
    """
    _head(checkpoint)
    if vit.global_pool != checkpoint.pool:
        raise CheckpointError(
            f"{checkpoint.path} was fine-tuned with pool='{checkpoint.pool}': build the model with it"
        )
    return _load(vit, checkpoint, {**checkpoint.encoder, **checkpoint.classifier}, new=())


def _head(checkpoint: Checkpoint) -> Tensor:
    if "head.weight" not in checkpoint.classifier:
        raise CheckpointError(
            f"{checkpoint.path} holds no fine-tuned classifier but {checkpoint.kind} weights: give a fine-tuned file"
        )
    return checkpoint.classifier["head.weight"]


def _load(
    vit: VisionTransformer | Beit, checkpoint: Checkpoint, source: dict[str, Tensor], new: tuple[str, ...]
) -> LoadReport:
    wanted = vit.state_dict()
    source = registered(source, wanted)
    missing = tuple(name for name in wanted if name not in source and name.startswith(new))
    resized = {}
    for name, tensor in source.items():
        if name == "pos_embed":
            tensor = resize_position_embedding(tensor, vit.patch_embed.grid_size, checkpoint.variant.positions)
        elif name.endswith("relative_position_bias_table") and name in wanted and tensor.ndim == 2:
            # Geometrically spaced bicubic interpolation, as BEiT fine-tunes at another size.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a remark on the layout of timm's own tensors
                tensor = resize_rel_pos_bias_table(tensor, vit.patch_embed.grid_size, tuple(wanted[name].shape))
        if tensor is not source[name]:
            resized[name] = tensor
    source |= resized
    what = f"{checkpoint.path} ({checkpoint.arch})"
    compare(what, source, {n: t.shape for n, t in wanted.items() if n not in missing}, "the model")
    heads, wrong = get_arch(checkpoint.arch).heads, {block.attn.num_heads for block in vit.blocks}
    if wrong != {heads}:
        raise CheckpointError(
            f"{what} has {heads} attention heads, the model {wrong.pop()}: the same shapes, another ViT"
        )
    if not next(iter(wanted.values())).is_meta:
        vit.load_state_dict({**wanted, **source}, strict=True)
    for module in vit.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = checkpoint.eps
    everything = (*checkpoint.encoder, *checkpoint.decoder, *checkpoint.classifier)
    trunk = [name for name in wanted if not name.startswith(("fc_norm.", "head"))]
    loaded = sum(wanted[name].numel() for name in trunk if name in source)
    return LoadReport(
        loaded=tuple(source),
        resized=tuple(resized),
        dropped=(*(name for name in everything if name not in source and name != "dist_token"), *checkpoint.dropped),
        missing=missing,
        converted=tuple(name for name in source if name in checkpoint.sources),
        coverage=100 * loaded / sum(wanted[name].numel() for name in trunk),
    )
