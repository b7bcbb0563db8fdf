"""A checkpoint file -> Checkpoint: checked, and its tensors in timm's names."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from mae_core.checkpoint.convert import KINDS, is_converted, model_settings, read_weights
from mae_core.checkpoint.errors import CheckpointError, printable
from mae_core.checkpoint.identify import identify, image_size_of
from mae_core.checkpoint.locate import Source, locate
from mae_core.checkpoint.of_timm import check_timm, read_timm
from mae_core.checkpoint.weights_file import as_float32, sha256_of
from mae_core.data import MEAN, STD, Normalization
from mae_core.errors import UserError
from mae_core.remembered import remembered
from mae_core.timm_encoder import PREFIX, is_timm, model_config
from mae_core.vit import EPS, PLAIN, Variant, build_vit, get_arch


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checked weight file. Tensors are float32 on the CPU (counters of a BatchNorm stay integers).

    encoder: timm's names (mae_core/vit.py); without ``norm.*`` in a classifier fine-tuned with average pooling.
    decoder: names of the official code (``mask_token``, ``decoder_*``); {} if the file has none.
    classifier: ``fc_norm.*`` and ``head.*`` (``head_dist.*`` of DeiT), or a linear probe's ``head.0.*`` (BatchNorm) and
    ``head.1.*``; else {}. dropped: names of entries that belong to none of these.
    sources: a tensor's name -> the names in the file that it was made of, where these differ.
    meta: what the file says about its training, such as `epochs` and `norm_pix`; always `image_size`, the side in px.
    mean, std: of the channels (0..1), for normalising its images. eps: of its LayerNorms. pool: "token" or "avg", its
    representation of an image. variant: what it has beyond a plain ViT.
    config: SHA-256 of the configs beside the weights that these come from, "" without.
    """

    path: str
    name: str
    format: str
    arch: str
    sha256: str
    encoder: Mapping[str, Tensor] = field(repr=False)
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
        """Whether it is a ViT of only class token, positions and blocks, as MAE's is."""
        return self.variant == PLAIN and not is_timm(self.arch)

    @property
    def normalization(self) -> Normalization:
        """(mean, std)"""
        return self.mean, self.std

    @property
    def identity(self) -> str:
        """What its numbers depend on: the SHA-256 of the file and that of the configs beside it."""
        return f"{self.sha256}+{self.config}" if self.config else self.sha256

    @property
    def kind(self) -> str:
        """One of encoder (pre-trained), classifier (fine-tuned end to end), linear-probe (frozen encoder and probe).

        A file with ``norm.*`` and ``head.*`` is an encoder, as supervised pre-training leaves it (timm, DeiT, Google),
        unless it is of a format whose class-token fine-tuning leaves such files too (MAE's, ours).
        """
        if any(name.startswith("head.0.") for name in self.classifier):
            return "linear-probe"
        tuned = self.format in ("mae-finetuned", "mae-full", "mae-training", "ours") and self.classifier
        if self.meta.get("kind") in KINDS:
            return str(self.meta["kind"])
        pooled = {"fc_norm.weight", "head.weight"} <= self.classifier.keys()
        return "classifier" if pooled or tuned else "encoder"


PARTS = {
    "encoder": re.compile(r"(cls|reg|dist)_token$|pos_embed$|patch_embed\.|blocks\.|norm\.|net\."),
    "decoder": re.compile(r"mask_token$|decoder_"),
    "classifier": re.compile(r"fc_norm\.|head\.|head_dist\."),
}


def read_checkpoint(spec: str | Path, seed: int = 0, key: str | None = None) -> Checkpoint:
    """Read and check a file, a folder with a config, "hf:NAME" or "timm:NAME"; or make random weights: "random:ARCH" is
    `build_vit` with that seed. key: which of several models in one file.

    CheckpointError unless every encoder tensor is there, finite, and of the shape that its size asks for. Memory:
    float32 tensors stay mapped from the file; half-precision ones, and joined queries, keys and values, are copies.
    """
    if str(spec).startswith("random:"):
        return _random(str(spec), seed)
    source = locate(str(spec))
    architecture = source.settings.pop("architecture", "")
    try:
        return _read(source, key)
    except CheckpointError:  # none of this project's own encoders; timm may build it
        import timm

        if not timm.is_model(architecture):
            raise
    return _of_timm(source, architecture)


def _read(source: Source, key: str | None) -> Checkpoint:
    path = source.path
    weights = read_weights(path, key)
    tensors, settings = weights.tensors, model_settings(path, weights, source.settings)
    parts = {part: {n: t for n, t in tensors.items() if p.match(n)} for part, p in PARTS.items()}
    if "decoder_embed.weight" not in tensors:
        parts["decoder"].pop("mask_token", None)  # masked-image training has one, an MAE decoder or not
    arch, heads, variant = str(weights.facts.get("arch", "")), settings.pop("heads"), PLAIN
    if is_timm(arch):
        size = check_timm(path, arch, parts["encoder"], weights.facts.get("image_size"))
    else:
        arch, variant = identify(path, tensors, parts["encoder"], heads)
        size = image_size_of(parts["encoder"], arch, variant)
    head = parts["classifier"].get("head.weight")
    if head is not None and head.shape[1:] != (get_arch(arch).dim,):  # DINOv2's head over class token and average
        parts["classifier"] = {}
    encoder, decoder, classifier = (
        {name: as_float32(path, name, tensor) for name, tensor in part.items()} for part in parts.values()
    )
    kept = encoder.keys() | decoder.keys() | classifier.keys()
    left = [old for name in tensors if name not in kept for old in weights.sources[name]]
    if classifier and not is_timm(arch):
        settings["pool"] = "avg" if "fc_norm.weight" in classifier else "token"
    return Checkpoint(
        path=source.spec,
        name=printable(source.name),
        format=weights.format.name,
        arch=arch,
        sha256=sha256_of(path),
        encoder=encoder,
        decoder=decoder,
        classifier=classifier,
        dropped=(*weights.dropped, *left),
        meta={**weights.facts, "image_size": size},
        variant=variant,
        sources={name: old for name, old in weights.sources.items() if name in kept and is_converted(name, old)},
        config=source.config,
        **settings,
    )


def _of_timm(source: Source, architecture: str) -> Checkpoint:
    encoder, dropped, pool = read_timm(source.path, architecture)
    arch = get_arch(PREFIX + architecture)
    return Checkpoint(
        path=source.spec,
        name=printable(source.name),
        format="timm",
        arch=arch.name,
        sha256=sha256_of(source.path),
        encoder=encoder,
        decoder={},
        classifier={},
        dropped=dropped,
        meta={"image_size": arch.image_size},
        pool=pool,
        config=source.config,
        **{name: source.settings.get(name, usual) for name, usual in model_config(architecture).items()},
    )


@remembered
def numbers_of(arch: str) -> int:
    """How many numbers the encoder of `build_vit` holds."""
    with torch.device("meta"):
        return sum(tensor.numel() for tensor in build_vit(arch).state_dict().values())


class Drawn(Mapping[str, Tensor]):
    """An encoder's random weights, which are drawn when the first is asked for: a plan asks for none."""

    def __init__(self, arch: str, seed: int) -> None:
        self.arch, self.seed = arch, seed

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return build_vit(self.arch).state_dict()

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def _random(spec: str, seed: int) -> Checkpoint:
    try:
        arch = get_arch(spec.removeprefix("random:")).name
    except UserError as error:
        raise CheckpointError(f"{spec}: {error}") from None
    digest = hashlib.sha256(spec.encode()).hexdigest()
    return Checkpoint(
        spec, spec, "random", arch, digest, Drawn(arch, seed), {}, {}, (), {"image_size": get_arch(arch).image_size}
    )
