"""Any encoder of timm behind the interface of a plain ViT, for frozen tasks and classification: rotary positions
(DINOv3, EVA-02), norms before the blocks (CLIP), no class token (SigLIP, AIMv2, I-JEPA), several stages (Hiera)."""

import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mae_core.errors import UserError

PREFIX = "timm/"  # of an arch's name; the rest is timm's
INNER = "net."  # of the names of the encoder's tensors


def is_timm(arch: str) -> bool:
    return arch.startswith(PREFIX)


class TimmEncoder(nn.Module):
    """timm's model of that name as ``net``, and a linear head.

    Tokens [B, 1 + registers + N, D] are those after timm's `forward_features` and the model's last norm. An encoder
    without a class token has the mean of its patch tokens in its place, which is what linear probes of such encoders
    read. What timm would pool by (its head, an attention pooling) is left out.
    """

    def __init__(
        self, name: str, image_size: int | tuple[int, int] | None, num_classes: int, pool: str, drop_path: float
    ) -> None:
        import timm

        super().__init__()
        size: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
        net: Any = timm.create_model(name, num_classes=0, drop_path_rate=drop_path, **size)
        self.net, self.last_norm = net, last_norm(net)
        if hasattr(net, "attn_pool"):
            net.attn_pool = None
        self.has_class_token = getattr(net, "cls_token", None) is not None
        self.num_prefix_tokens = max(getattr(net, "num_prefix_tokens", 0), 1)
        self.embed_dim: int = net.num_features
        self.global_pool, self.num_classes = pool, num_classes
        self.head: nn.Module = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()

    @property
    def blocks(self) -> Any:
        return self.net.blocks

    def forward_features(self, images: Tensor) -> Tensor:
        return self.with_class_token(self.normed(self.net.forward_features(images).flatten(1, -2)))

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = tokens[:, 0] if self.global_pool == "token" else tokens[:, self.num_prefix_tokens :].mean(dim=1)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def forward_intermediates(
        self, images: Tensor, indices: int | list[int] = 1, norm: bool = False, **_: Any
    ) -> list[Any]:
        """(patch tokens [B, N, D], prefix tokens [B, P, D]) after each of the last `indices` blocks, or of those of the
        given numbers, as timm's models give them for output_fmt="NLC", return_prefix_tokens and intermediates_only."""
        if not hasattr(self.net, "num_prefix_tokens"):  # Hiera
            maps = self.net.forward_intermediates(
                images, indices=indices, output_fmt="NHWC", intermediates_only=True, coarse=False
            )
            if len({each.shape for each in maps}) > 1:
                raise UserError(
                    "the blocks that this task reads lie in several stages of this encoder, whose maps differ in size: "
                    "a task that reads fewer blocks can take it"
                )
            found = [each.flatten(1, 2) for each in maps]
        else:
            pairs = self.net.forward_intermediates(
                images,
                indices=indices,
                norm=norm and not self.last_norm,
                output_fmt="NLC",
                return_prefix_tokens=True,
                intermediates_only=True,
            )
            # Without prefix tokens timm returns the patches alone.
            found = [torch.cat([pair[1], pair[0]], dim=1) if isinstance(pair, tuple) else pair for pair in pairs]
        whole = [self.with_class_token(self.normed(tokens) if norm else tokens) for tokens in found]
        return [(tokens[:, self.num_prefix_tokens :], tokens[:, : self.num_prefix_tokens]) for tokens in whole]

    def normed(self, tokens: Tensor) -> Tensor:
        """By a norm that timm applies only when it pools."""
        return self.net.get_submodule(self.last_norm)(tokens) if self.last_norm else tokens

    def with_class_token(self, tokens: Tensor) -> Tensor:
        return tokens if self.has_class_token else torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)

    def no_weight_decay(self) -> set[str]:
        return {INNER + name for name in self.net.no_weight_decay()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.net.set_grad_checkpointing(enable)


def last_norm(net: nn.Module) -> str:
    """The path of the norm that timm applies to the pooled features, "" if it norms the tokens."""
    for path in ("fc_norm", "head.norm"):
        owner, _, name = path.rpartition(".")
        found = getattr(net.get_submodule(owner), name, None)
        if found is not None and not isinstance(found, nn.Identity):
            return path
    return ""


def has_one_grid(name: str) -> bool:
    """Whether all blocks of timm's model of that name attend over one grid of tokens, as a plain ViT's do. KeyError as
    `described`."""
    return described(name)["one_grid"]


def model_config(name: str) -> dict[str, Any]:
    """timm's default mean, std and so on of the architecture."""
    return dict(described(name)["config"])


@cache
def described(name: str) -> dict[str, Any]:
    """dim, depth, heads, patch and image_size of timm's model of that name, its config, and one_grid (`has_one_grid`).
    patch: px between the last block's tokens. KeyError if timm has none, or none that gives tokens."""
    import timm
    from timm.layers import Attention, AttentionRope
    from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
    from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer

    if not timm.is_model(name):
        raise KeyError(name)
    try:
        with torch.device("meta"):
            net: Any = TimmEncoder(name, None, 0, "token", 0.0).net
        attention = net.blocks[-1].attn
        return {
            "dim": net.num_features,
            "depth": len(net.blocks),
            "heads": getattr(attention, "num_heads", None) or attention.heads,
            "patch": net.feature_info[-1]["reduction"],
            "image_size": net.pretrained_cfg["input_size"][-1],
            # Of a subclass nobody knows which further tokens and positions it has.
            "one_grid": type(net) in (Eva, VisionTransformer)
            and type(net.blocks[-1]) in (EvaBlock, EvaBlockPostNorm, Block, ResPostBlock)
            and type(attention) in (EvaAttention, AttentionRope, Attention),
            "config": {key: net.pretrained_cfg[key] for key in ("mean", "std")},
        }
    except (AttributeError, TypeError, IndexError):  # a convolutional network
        raise KeyError(name) from None


def timm_names(name: str, state: dict[str, Tensor], model: TimmEncoder) -> dict[str, Tensor]:
    """A state dict in any form that timm reads for this architecture -> the names and shapes of `model`, position
    embeddings and patch projection resized to it, without what it leaves out. ValueError if timm cannot read it."""
    from timm.layers import resample_abs_pos_embed

    convert = getattr(sys.modules[type(model.net).__module__], "checkpoint_filter_fn", None)
    try:
        state = convert(dict(state), model.net) if convert else state
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"timm cannot read it as {name} ({error})") from None
    if (grid := getattr(model.net, "tokens_spatial_shape", None)) and "pos_embed" in state:  # Hiera's stay as they are
        state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], list(grid), num_prefix_tokens=0)
    return {INNER + name: tensor for name, tensor in state.items() if not is_left_out(name, model)}


def is_left_out(name: str, model: TimmEncoder) -> bool:
    """Whether a tensor of timm's belongs to a head, to its pooling or to masked training."""
    own_norm = bool(model.last_norm) and name.startswith(f"{model.last_norm}.")
    return not own_norm and name.startswith(("head.", "head_dist.", "attn_pool.", "mask_token"))
