"""A Checkpoint -> a model with its weights, strictly: one tensor that is missing or does not fit is an error."""

import warnings
from dataclasses import dataclass

from torch import Tensor, nn

from mae_core.checkpoint.errors import CheckpointError
from mae_core.checkpoint.identify import check_shapes, registered, resize_position_embedding
from mae_core.checkpoint.read import Checkpoint
from mae_core.timm_encoder import INNER, PREFIX, TimmEncoder, timm_names
from mae_core.vit import ViT, build_distilled, build_vit, get_arch


@dataclass(frozen=True)
class LoadReport:
    """What one load did, as tensor names: every tensor of the file is in `loaded` or `dropped`, every tensor of the
    model in `loaded` or `missing` (new heads, left as they were). `resized` and `converted` (made of others, or
    transposed) are parts of `loaded`. coverage: percent of the model's parameters, without its head, that were
    loaded."""

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


def model_of(
    checkpoint: Checkpoint,
    image_size: int | tuple[int, int] | None = None,
    num_classes: int = 0,
    pool: str = "token",
    drop_path: float = 0.0,
) -> ViT:
    """`build_vit` for this checkpoint: its size, variant and eps. `load_encoder` loads the weights."""
    c = checkpoint
    return build_vit(c.arch, image_size, num_classes, pool, drop_path, c.eps, c.variant)


def classifier_of(checkpoint: Checkpoint, image_size: int | tuple[int, int] | None = None) -> ViT:
    """The classifier in a checkpoint, loaded: its classes, its pooling, and both heads of a distilled DeiT.
    image_size: px; by default the one it was trained at. CheckpointError if the file holds none.
    """
    classes = len(_head(checkpoint))
    size = image_size or checkpoint.meta["image_size"]
    vit: ViT = model_of(checkpoint, size, classes, checkpoint.pool)
    if "head_dist.weight" in checkpoint.classifier:
        vit = build_distilled(checkpoint.arch, size, classes)
    load_classifier(vit, checkpoint)
    return vit


def load_encoder(vit: ViT, checkpoint: Checkpoint) -> LoadReport:
    """Load the whole encoder into a `model_of` model; positions are resized to the model's grid. Every LayerNorm gets
    the checkpoint's eps, which is as much a part of what was trained as the weights.

    A model that pools by average has no ``norm``: the checkpoint's is dropped, and fc_norm is new, as in the official
    fine-tuning. CheckpointError for a fine-tuned classifier and for any tensor that is missing or does not fit; the
    model is then unchanged.
    """
    if checkpoint.kind == "classifier":
        raise CheckpointError(
            f"{checkpoint.path} is a fine-tuned classifier, not a pre-trained encoder: give the pre-training checkpoint"
        )
    source = dict(checkpoint.encoder)
    if "fc_norm.weight" in vit.state_dict():
        source = {name: tensor for name, tensor in source.items() if not name.startswith("norm.")}
    return _load(vit, checkpoint, source, new=("fc_norm.", "head."))


def load_classifier(vit: ViT, checkpoint: Checkpoint) -> LoadReport:
    """Load a classifier, encoder and head, into a model of the same pooling and classes (`classifier_of` builds one).
    CheckpointError if the file has no such head or any tensor is missing or does not fit; the model is then unchanged.
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


def _load(vit: ViT, checkpoint: Checkpoint, source: dict[str, Tensor], new: tuple[str, ...]) -> LoadReport:
    wanted = vit.state_dict()
    if isinstance(vit, TimmEncoder):
        return _load_timm(vit, checkpoint, source, new)
    source = registered(source, wanted)
    missing = tuple(name for name in wanted if name not in source and name.startswith(new))
    resized = {}
    for name, tensor in source.items():
        if name == "pos_embed":
            tensor = resize_position_embedding(tensor, vit.patch_embed.grid_size, checkpoint.variant.positions)
        elif name.endswith("relative_position_bias_table") and name in wanted and tensor.ndim == 2:
            from timm.layers import resize_rel_pos_bias_table

            # Geometrically spaced bicubic interpolation, as BEiT fine-tunes at another size.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about timm's own way of indexing
                tensor = resize_rel_pos_bias_table(tensor, vit.patch_embed.grid_size, tuple(wanted[name].shape))
        if tensor is not source[name]:
            resized[name] = tensor
    source |= resized
    what = f"{checkpoint.path} ({checkpoint.arch})"
    check_shapes(what, source, {n: t.shape for n, t in wanted.items() if n not in missing}, "the model")
    heads = get_arch(checkpoint.arch).heads
    for module in vit.modules():
        if getattr(module, "num_heads", heads) != heads:
            raise CheckpointError(
                f"{what} has {heads} attention heads, the model {module.num_heads}: the same shapes, but another ViT"
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


def _load_timm(
    encoder: TimmEncoder, checkpoint: Checkpoint, source: dict[str, Tensor], new: tuple[str, ...]
) -> LoadReport:
    """As timm loads and resizes them."""
    wanted, what = encoder.state_dict(), f"{checkpoint.path} ({checkpoint.arch})"
    own = {name.removeprefix(INNER): tensor for name, tensor in source.items() if name.startswith(INNER)}
    try:
        found = timm_names(checkpoint.arch.removeprefix(PREFIX), own, encoder)
    except ValueError as error:
        raise CheckpointError(f"{what}: {error}") from None
    found |= {name: tensor for name, tensor in source.items() if not name.startswith(INNER)}
    missing = tuple(name for name in wanted if name not in found and name.startswith(new))
    check_shapes(what, found, {n: t.shape for n, t in wanted.items() if n not in missing}, "the model")
    if not next(iter(wanted.values())).is_meta:
        encoder.load_state_dict({**wanted, **found}, strict=True)
    return LoadReport(
        loaded=tuple(found),
        resized=tuple(name for name, tensor in found.items() if tensor.shape != source[name].shape),
        dropped=checkpoint.dropped,
        missing=missing,
    )
