"""A Checkpoint -> a file: in the canonical form, or as another project reads it."""

import json
import os
from collections.abc import Collection, Iterable
from pathlib import Path

from torch import Tensor

from mae_core.checkpoint.errors import CheckpointError
from mae_core.checkpoint.read import Checkpoint
from mae_core.checkpoint.weights_file import copies, save_pickle, save_tensors, save_weights
from mae_core.data import MEAN, STD
from mae_core.settings import unknown
from mae_core.timm_encoder import is_timm
from mae_core.vit import ARCHS, EPS
from mae_core.writing import named_if_refused, write_text


def metadata_of(checkpoint: Checkpoint, pool: str, tensors: Collection[str]) -> dict[str, str]:
    """Safetensors metadata: what a model's numbers depend on besides its tensors; {} where all of it is MAE's. pool: of
    the saved model; tensors: its names, which show the usual pooling."""
    c, usual = checkpoint, "avg" if "fc_norm.weight" in tensors else "token"
    if (c.mean, c.std, c.eps, pool) == (MEAN, STD, EPS, usual):
        return {}
    return {"mean": " ".join(map(str, c.mean)), "std": " ".join(map(str, c.std)), "eps": str(c.eps), "pool": pool}


def save_canonical(checkpoint: Checkpoint, path: Path) -> None:
    """One safetensors file with timm's names; reading it gives this checkpoint back, bit for bit."""
    metadata = {
        name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in checkpoint.meta.items()
    }
    metadata |= {"arch": checkpoint.arch, "kind": checkpoint.kind, "source_format": checkpoint.format}
    metadata |= {"source_sha256": checkpoint.sha256}
    tensors = _everything(checkpoint)
    save_weights(path, tensors, metadata | metadata_of(checkpoint, checkpoint.pool, tensors))


def export(checkpoint: Checkpoint, form: str, path: Path) -> None:
    """Write for another project: "timm" (flat safetensors), "fair" ({"model": ...}, as FAIR's MAE code saves), "hf" (a
    folder for transformers' from_pretrained) or "detectron2" (a .pth that a ViTDet backbone starts from).

    UserError for an unknown form, and for an encoder that the form cannot hold.
    """
    if form in TARGETS and form != "timm" and not checkpoint.plain:
        raise CheckpointError(f"{checkpoint.path} is not a plain ViT: only --to timm holds it")
    if is_timm(checkpoint.arch):
        raise CheckpointError(f"{checkpoint.path} is timm's already: --to converts this project's own encoders")
    check_target(form, path)
    TARGETS[form](checkpoint, path)


def check_target(form: str, path: Path) -> None:
    """UserError for a form that is unknown, and for a path that it cannot be written to."""
    if form not in TARGETS:
        raise unknown("form", form, TARGETS)
    if os.path.exists(path) and os.path.isdir(path) != (form == "hf"):
        raise CheckpointError(f"{path} is {'a folder' if os.path.isdir(path) else 'a file'}: give another name")
    suffixes = SUFFIXES.get(form, ())
    if suffixes and path.suffix not in suffixes:
        raise CheckpointError(f"{path}: --to {form} writes a file that ends in {' or '.join(suffixes)}")


SUFFIXES = {"timm": (".safetensors",), "fair": (".pth", ".pt"), "detectron2": (".pth",)}


def left_out(checkpoint: Checkpoint, form: str) -> str:
    """What that form leaves out, "" for nothing: its reader assumes MAE's normalization and eps."""
    c, found = checkpoint, []
    if c.decoder and form in ("timm", "detectron2"):
        found.append(f"the decoder ({len(c.decoder)} tensors)")
    if c.classifier and form == "detectron2":
        found.append(f"the classifier ({len(c.classifier)} tensors)")
    if form != "hf":
        assumed = {"mean": (c.mean, MEAN), "std": (c.std, STD), "eps": ((c.eps,), (EPS,))}
        found += [f"{name} {numbers(values)}" for name, (values, usual) in assumed.items() if values != usual]
    return ", ".join(found)


def numbers(values: Iterable[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


def _everything(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {**checkpoint.encoder, **checkpoint.decoder, **checkpoint.classifier}


def _timm(checkpoint: Checkpoint, path: Path) -> None:
    _safetensors({**checkpoint.encoder, **checkpoint.classifier}, path)


def _fair(checkpoint: Checkpoint, path: Path) -> None:
    save_pickle(path, {"model": _everything(checkpoint)})


def _detectron2(checkpoint: Checkpoint, path: Path) -> None:
    # matching_heuristics: what ViTDet's own configs ask for; with these names nothing is left to guess.
    encoder = {f"backbone.net.{name}": tensor for name, tensor in checkpoint.encoder.items()}
    save_pickle(path, {"model": encoder, "__author__": "MAE", "matching_heuristics": True})


def _hf(checkpoint: Checkpoint, folder: Path) -> None:
    if "fc_norm.weight" in checkpoint.classifier or any(n.startswith("head.0.") for n in checkpoint.classifier):
        raise CheckpointError(
            f"{checkpoint.path} pools by average or has a linear probe, unlike transformers' ViT: use --to timm"
        )
    a, decoder, head = ARCHS[checkpoint.arch], checkpoint.decoder, checkpoint.classifier.get("head.weight")
    kind = "vit_mae" if decoder else "vit"
    config = {
        "model_type": kind,
        "architectures": [
            "ViTMAEForPreTraining" if decoder else "ViTForImageClassification" if head is not None else "ViTModel"
        ],
        "hidden_size": a.dim,
        "num_hidden_layers": a.depth,
        "num_attention_heads": a.heads,
        "intermediate_size": 4 * a.dim,
        "hidden_act": "gelu",
        "layer_norm_eps": checkpoint.eps,
        "image_size": checkpoint.meta["image_size"],
        "patch_size": a.patch,
        "num_channels": 3,
        "qkv_bias": True,
    }
    if head is not None and not decoder:
        config |= {"id2label": {str(i): f"LABEL_{i}" for i in range(len(head))}}
    if decoder:
        width = decoder["decoder_embed.weight"].shape[0]
        blocks = {name.split(".")[1] for name in decoder if name.startswith("decoder_blocks.")}
        heads = int(checkpoint.meta.get("decoder_heads") or 16)
        config |= {
            "decoder_hidden_size": width,
            "decoder_num_hidden_layers": len(blocks),
            "decoder_num_attention_heads": heads,
        }
        config |= {"decoder_intermediate_size": 4 * width, "mask_ratio": 0.75}
        config |= {"norm_pix_loss": bool(checkpoint.meta.get("norm_pix", False))}
    tensors: dict[str, Tensor] = {}
    whole = bool(decoder) or head is not None
    for name, tensor in ({**checkpoint.encoder, **decoder} if decoder else _everything(checkpoint)).items():
        tensors |= _hf_names(name, tensor, "vit." if whole else "")
    with named_if_refused(folder):
        folder.mkdir(parents=True, exist_ok=True)
    _safetensors(tensors, folder / "model.safetensors")
    preprocessor = {
        "image_processor_type": "ViTImageProcessor",
        "do_normalize": True,
        "image_mean": list(checkpoint.mean),
        "image_std": list(checkpoint.std),
        "size": {"height": config["image_size"], "width": config["image_size"]},
    }
    for name, content in (("config.json", config), ("preprocessor_config.json", preprocessor)):
        write_text(folder / name, json.dumps(content, indent=2) + "\n")


HF_TOP = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
HF_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def _hf_names(name: str, tensor: Tensor, prefix: str) -> dict[str, Tensor]:
    """One canonical tensor under transformers' names (the older generation, which every version reads)."""
    if name.startswith("head."):
        return {name.replace("head.", "classifier."): tensor}
    in_decoder = name.startswith("decoder_") or name == "mask_token"
    if "blocks." not in name:
        stem, _, kind = name.rpartition(".")
        top = HF_TOP.get(name) or f"{HF_TOP.get(stem, stem)}.{kind}"
        return {f"decoder.{name}": tensor} if in_decoder else {prefix + top: tensor}
    _, number, rest = name.split(".", 2)
    stem, kind = rest.rsplit(".", 1)
    start = f"decoder.decoder_layers.{number}." if in_decoder else f"{prefix}encoder.layer.{number}."
    if stem == "attn.qkv":
        parts = zip(("query", "key", "value"), tensor.chunk(3))
        return {f"{start}attention.attention.{part}.{kind}": piece for part, piece in parts}
    return {f"{start}{HF_BLOCK[stem]}.{kind}": tensor}


def _safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_tensors(path, copies(tensors), {"format": "pt"})  # which transformers asks for


TARGETS = {"timm": _timm, "hf": _hf, "fair": _fair, "detectron2": _detectron2}
