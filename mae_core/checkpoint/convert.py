"""A weight file -> its format, and its tensors under timm's names."""

import argparse
import math
import re
from collections.abc import Set
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mae_core.checkpoint.errors import CheckpointError
from mae_core.checkpoint.formats import FORMATS, HALF, Format
from mae_core.checkpoint.renaming import from_flax
from mae_core.checkpoint.weights_file import OUR_FORMAT, check_memory, is_mapped, read_file
from mae_core.settings import did_you_mean
from mae_core.timm_encoder import is_timm
from mae_core.vit import ARCHS

MODELS = ("model", "state_dict", "teacher", "module", "student", "model_ema", "state_dict_ema")
WRAPPER = "module."
# What torch.compile, activation checkpointing and FSDP put into the names of whatever they wrap, a block for instance.
WRAPPED = re.compile(r"(?<![^.])(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
FLAT = re.compile(r"(.*\.)?(_flat_param|flat_param_\d+)")
KINDS = ("encoder", "classifier", "linear-probe")
CHOOSE = "write one to its own file (python -m mae_core.checkpoint FILE --key NAME --convert OUT.safetensors)"
OURS = Format("ours", "written by this project: mae.safetensors, classifier.safetensors, --convert")
PREFIXED = Format("prefixed", "Lightning, solo-learn, lightly: the one ViT below a prefix (backbone., encoder., ...)")


class Weights(NamedTuple):
    """format; tensors by canonical name; sources: canonical name -> the names in the file that it was made of; dropped:
    names in the file that were not used; facts: what the file says about its training."""

    format: Format
    tensors: dict[str, Tensor]
    sources: dict[str, tuple[str, ...]]
    dropped: tuple[str, ...]
    facts: dict[str, Any]


def read_weights(path: Path, key: str | None = None) -> Weights:
    """Read a file and bring it to canonical names. key: which of several models, by the key it lies under or by the
    prefix of its names. Facts come from safetensors metadata or a pre-training run's arguments.

    Tensors of zip and safetensors files are mapped from the file (copy on write), not copied into memory.
    CheckpointError if it is no weight file, is damaged, or holds more than tensors and plain values.
    """
    content, metadata = read_file(path)
    if str(metadata.get("format")).startswith(OUR_FORMAT) and is_timm(metadata.get("arch", "")):  # its names are final
        return Weights(OURS, dict(content), {name: (name,) for name in content}, (), dict(metadata))
    under, entries = _state_dict(path, content, key)
    beside = {str(name) for name in content if name != under}
    tensors = {name: value for name, value in entries.items() if isinstance(value, Tensor)}
    check_memory(path, tensors)
    dropped = [name for name in entries if name not in tensors]
    format, prefix = _choose(path, tensors, under, beside, key if key != under else None)
    if str(metadata.get("format") or content.get("format")).startswith(OUR_FORMAT):
        format = OURS
    facts: dict[str, Any] = {name: metadata[name] for name in sorted(metadata) if name != "format"}
    # Metadata is only text, and "false" would be true to Python.
    facts |= {name: int(text) for name, text in metadata.items() if name == "epochs" and re.fullmatch(r"\d{1,9}", text)}
    facts |= {name: text == "true" for name, text in metadata.items() if text in ("true", "false")}
    if "decoder_embed.weight" in tensors:
        facts |= _training_facts(format.name, content)
    if not re.fullmatch("[1-9][0-9]{0,3}", str(facts.get("decoder_heads", 1))):
        raise CheckpointError(f"{path}: its metadata decoder_heads={facts['decoder_heads']} is no number of heads")
    if format is OURS and facts.get("kind", KINDS[0]) not in KINDS:
        raise CheckpointError(f"{path}: its metadata kind={facts['kind']} is none of {', '.join(KINDS)}")
    dropped += [name for name in tensors if not name.startswith(prefix)]
    dropped += [f"{other}.*" for other in sorted(beside & set(MODELS)) if isinstance(content[other], dict)]
    names = {name: name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
    weights = _convert(path, format, {new: (old, tensors[old]) for old, new in names.items()}, dropped, facts)
    if any(name.endswith(".attn.q.weight") for name in weights.tensors):
        # From a second mapping of the file, which is released after joining: else they would be in memory twice.
        again = is_mapped(path) and format.convert is not from_flax
        try:
            _join_qkv(weights, _state_dict(path, read_file(path, checked=True)[0], key)[1] if again else {})
        except RuntimeError as error:
            raise CheckpointError(f"{path}: queries, keys and values cannot be joined ({error})") from None
    return weights


def _choose(
    path: Path, tensors: dict[str, Tensor], under: str | None, beside: set[str], key: str | None
) -> tuple[Format, str]:
    """The format, and the prefix of the names of the model to read: the format's own, the one that key means, or that
    of the only ViT in the file."""
    format = detect(tensors, under, beside)
    prefix = format.prefix if key is None else _prefix_of_key(path, key, tensors)
    if format.prefix or (key is None and format is not FORMATS[-1]):
        return format, prefix
    below = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    while below and all(name.startswith(WRAPPER) for name in below):
        prefix, below = prefix + WRAPPER, {name.removeprefix(WRAPPER): t for name, t in below.items()}
    inner = detect(below, None)
    found = inner.prefix or (_prefix_of_vit(path, below) if inner is FORMATS[-1] else "")
    if found and inner is FORMATS[-1]:
        inner = detect({n.removeprefix(found): t for n, t in below.items() if n.startswith(found)}, None)
    prefix += found
    return (PREFIXED if prefix and inner is FORMATS[-1] else inner), prefix


def detect(tensors: dict[str, Tensor], under: str | None, beside: Set[str] = frozenset()) -> Format:
    """The first format that fits these names; the last format fits all."""
    under = under and under.removesuffix("_ema")

    def holds(pattern: str) -> bool:
        return any(re.fullmatch(pattern, name) for name in tensors)

    return next(
        f for f in FORMATS if f.under in (None, under) and f.beside <= beside and all(holds(p) for p in f.holds)
    )


def _convert(
    path: Path, format: Format, named: dict[str, tuple[str, Tensor]], dropped: list[str], facts: dict[str, Any]
) -> Weights:
    tensors: dict[str, Tensor] = {}
    sources: dict[str, tuple[str, ...]] = {}
    for name, (original, tensor) in named.items():
        for pattern, replacement in format.rename:
            name = re.sub(pattern, replacement, name)
        if format.drop and re.fullmatch(format.drop, name):
            dropped.append(original)
            continue
        if name in tensors:
            raise CheckpointError(f"{path}: both {sources[name][0]} and {original} are {name}: save only one model")
        tensors[name], sources[name] = tensor, (original,)
    if format.convert is not None:
        try:
            format.convert(tensors, sources)
        except (KeyError, RuntimeError, IndexError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{path} is no complete {format.name} file: {error} is missing or has another shape"
            ) from None
    return Weights(format, tensors, sources, tuple(dropped), facts)


def is_converted(name: str, sources: tuple[str, ...]) -> bool:
    """Whether a tensor is anything but one of the file's with a prefix taken off its name."""
    return not (len(sources) == 1 and f".{sources[0]}".endswith(f".{name}"))


def _join_qkv(weights: Weights, entries: dict[str, Any]) -> None:
    """Separate projections of queries, keys and values -> one, in this order; biases too, but where keys have none
    (BEiT) the others keep names of their own. entries: the file's, to take the parts from, or {} for weights'."""
    tensors, sources = weights.tensors, weights.sources
    for query in [name for name in tensors if name.endswith(".attn.q.weight")]:
        stem = query.removesuffix("q.weight")
        for kind in ("weight", "bias"):
            parts = [f"{stem}{part}.{kind}" for part in "qkv"]
            if all(part in tensors for part in parts):
                pieces = [tensors.pop(part) for part in parts]
                if entries:
                    pieces = [entries[sources[part][0]] for part in parts]
                if len({(piece.shape, piece.dtype) for piece in pieces}) == 1:
                    tensors[f"{stem}qkv.{kind}"] = torch.cat(pieces)
                    sources[f"{stem}qkv.{kind}"] = tuple(name for part in parts for name in sources.pop(part))
        for part in "qv":
            if f"{stem}{part}.bias" in tensors:
                tensors[f"{stem}{part}_bias"] = tensors.pop(f"{stem}{part}.bias")
                sources[f"{stem}{part}_bias"] = sources.pop(f"{stem}{part}.bias")


def _is_state(value: object) -> bool:
    return isinstance(value, dict) and any(isinstance(v, Tensor) for v in value.values())


def _state_dict(path: Path, content: dict[Any, Any], key: str | None) -> tuple[str | None, dict[str, Any]]:
    """The key that the state dict lies under (None: the file is the state dict), and its entries without wrappers."""
    models = [name for name in MODELS if _is_state(content.get(name))]
    under = models[0] if models else None
    if _is_state(content.get(key)):
        under = key
    elif len(models) > 1 and key is None and models != ["teacher", "student"]:
        raise CheckpointError(f"{path} holds {len(models)} models, {' and '.join(models)}: {CHOOSE}")
    if under is None:
        under = next((name for name in MODELS[:2] if isinstance(content.get(name), dict)), None)
    entries = content if under is None else content[under]
    if not _is_state(entries):
        found = f"only {', '.join(map(str, list(entries)[:3]))}" if entries else "none"
        raise CheckpointError(f"{path} holds no named tensors ({found}): give a file with a model's state_dict")
    if key is not None and key != under and key in content:
        raise CheckpointError(f"{path}: '{key}' is no model; the models are {', '.join(models) or 'none'}")
    return under, _unwrapped(path, entries)


def _unwrapped(path: Path, entries: dict[Any, Any]) -> dict[str, Any]:
    """The entries without wrappers in their names; CheckpointError for two of one name, and for FSDP's flat ones."""
    found: dict[str, Any] = {}
    for original, value in entries.items():
        if FLAT.fullmatch(str(original)):
            raise CheckpointError(
                f"{path} holds FSDP's flat parameters ({original}), which have lost their shapes: save the full state "
                "dict (StateDictType.FULL_STATE_DICT; of sharded folders, torch.distributed.checkpoint.format_utils "
                "makes one file: dcp_to_torch_save)"
            )
        name = WRAPPED.sub("", str(original))
        if name in found:
            raise CheckpointError(f"{path}: two entries are {name}, with a wrapper's prefix and without: save one")
        found[name] = value
    # Of every name or none: "module." inside names, or at the start of only some, is no wrapper's prefix.
    while found and all(name.startswith(WRAPPER) for name in found):
        found = {name.removeprefix(WRAPPER): value for name, value in found.items()}
    return found


def _prefix_of_key(path: Path, key: str, tensors: dict[str, Tensor]) -> str:
    """The prefix that --key means; CheckpointError if no name begins with it."""
    if not any(name.startswith(f"{key}.") for name in tensors):
        known = list(dict.fromkeys(name.partition(".")[0] for name in tensors if "." in name))
        raise CheckpointError(f"{path} has no model under '{key}'; {did_you_mean(key, known)}")
    return f"{key}."


def _prefix_of_vit(path: Path, tensors: dict[str, Tensor]) -> str:
    """The prefix of the one ViT in the file, "" if it has none or there is no ViT."""
    tail = "blocks.0.norm1.weight"
    found = [name.removesuffix(tail) for name in tensors if name.endswith(tail)]
    found = [prefix for prefix in found if not prefix or prefix.endswith(".")]
    if len(found) > 1:
        keys = " and ".join(prefix.rstrip(".") or "the top" for prefix in found)
        raise CheckpointError(f"{path} holds {len(found)} models, {keys}: {CHOOSE}")
    return found[0] if found else ""


def _training_facts(format: str, content: dict) -> dict[str, Any]:
    """What a pre-training checkpoint says about its run: the plain values of our recipe, or the official arguments."""
    fixed, state, args, epoch = (content.get(key) for key in ("fixed", "state", "args", "epoch"))
    facts: dict[str, Any] = {}
    if format == "ours" and isinstance(fixed, dict) and isinstance(fixed.get("recipe"), dict):
        facts = {name: value for name, value in fixed["recipe"].items() if isinstance(value, str | int | float)}
        # It counts steps: only in mae.safetensors are the planned epochs sure to be done.
        facts["epochs_planned"] = facts.pop("epochs", None)
        facts["steps_done"] = state.get("step") if isinstance(state, dict) else None
    if format == "mae-training" and isinstance(args, argparse.Namespace):
        facts = {"epochs": getattr(args, "epochs", None), "norm_pix": getattr(args, "norm_pix_loss", None)}
    if format == "mae-training" and isinstance(epoch, int):
        facts["epochs_done"] = epoch + 1  # the official code counts from 0
    return {name: value for name, value in facts.items() if isinstance(value, str | int | float)}


def model_settings(path: Path, weights: Weights, config: dict[str, Any]) -> dict[str, Any]:
    """mean, std, eps, pool and heads: the format's, or those of the file's metadata or of the config beside it."""
    f, tensors, facts = weights.format, weights.tensors, weights.facts
    # ImageNet-21k as Google counts its classes: AugReg.
    augreg = f.name == "timm" and tensors.get("head.bias", torch.empty(0)).shape == (21843,)
    mean, std = HALF if augreg else f.normalization
    found: dict[str, Any] = {"mean": mean, "std": std, "eps": f.eps, "pool": f.pool, "heads": None}
    if f.heads and "patch_embed.proj.bias" in tensors:
        found["heads"] = f.heads.get(tensors["patch_embed.proj.bias"].shape[:1].numel())
    try:
        if "mean" in facts:
            found |= {name: tuple(map(float, str(facts.pop(name)).split())) for name in ("mean", "std")}
            found |= {"eps": float(str(facts.pop("eps"))), "pool": str(facts.pop("pool"))}
        if f.name == "ours" and facts.get("arch") in ARCHS:
            found["heads"] = ARCHS[str(facts["arch"])].heads
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: its metadata of mean, std, eps and pool is damaged ({error})") from None
    found |= config
    pixels = (*found["mean"], *found["std"])
    if len(pixels) != 6 or not all(map(math.isfinite, pixels)) or min(found["std"]) <= 0 or not 0 < found["eps"] < 1:
        said = ", ".join(f"{name} {found[name]}" for name in ("mean", "std", "eps"))
        raise CheckpointError(f"{path}: nothing can be normalised by {said}, which its metadata or config gives")
    if found["pool"] not in ("token", "avg"):
        raise CheckpointError(f"{path}: its metadata pool={found['pool']} is neither token nor avg")
    return found
