"""The masked autoencoder of the paper (arXiv 2111.06377, section 3)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mae_core.errors import UserError
from mae_core.masking import kept_patches
from mae_core.patches import patchify, take
from mae_core.targets import PixelTarget, Target
from mae_core.vit import init_as_mae, norm_layer, sincos_position_embedding, vit_arguments

LOSS_ON = ("masked", "all")


class MAEOutput(NamedTuple):
    """loss: scalar, the mean of the target's error over the patches numbered predicted [B, M]: the hidden ones, or all
    of them with loss_on="all". prediction [B, M, W]: of those patches, in the space of the target."""

    loss: Tensor
    prediction: Tensor
    predicted: Tensor


class MaskedAutoencoder(VisionTransformer):
    """The encoder with a light decoder. The encoder is the ViT itself, so that the state dict has the names of the
    official full checkpoints: a plain ViT's, mask_token and decoder_*.

    norm_pix: reconstruct per-patch normalised pixels instead of pixels.
    activation_checkpointing: recompute each block in the backward pass instead of storing its activations.
    target: what to reconstruct instead of pixels (mae_core/targets.py).
    loss_on: "masked" patches (section 3), or "all" (its footnote 1).
    encoder_mask_tokens: the encoder sees a learned token in place of each hidden patch (Table 1c); mask_token then has
    the encoder's width, and the decoder gets the encoder's output for it.

    After the patch projection everything runs in the order of the noise, visible patches first: a Transformer ignores
    order, and what is hidden is then a slice.

    What the loss does not read is not computed, and what is alike in several images is computed once: whatever the
    image, a hidden patch enters the decoder as the mask token and its position.
    """

    pos_embed: nn.Parameter
    cls_token: nn.Parameter

    def __init__(
        self,
        arch: str,
        image_size: int | tuple[int, int] | None = None,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        norm_pix: bool = False,
        activation_checkpointing: bool = False,
        target: Target | None = None,
        loss_on: str = "masked",
        encoder_mask_tokens: bool = False,
    ) -> None:
        super().__init__(**vit_arguments(arch, image_size), num_classes=0, global_pool="token")
        if decoder_heads < 1 or decoder_dim % decoder_heads or decoder_dim % 4:
            raise UserError(f"decoder width {decoder_dim} must be divisible by 4 and by its {decoder_heads} heads")
        self.norm_pix = norm_pix
        self.activation_checkpointing = activation_checkpointing
        self.loss_on = loss_on
        self.encoder_mask_tokens = encoder_mask_tokens
        self.patch = self.patch_embed.patch_size[0]
        self.decoder_embed = nn.Linear(self.embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim if encoder_mask_tokens else decoder_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_position_embedding(decoder_dim, self.patch_embed.grid_size))
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_dim, decoder_heads, qkv_bias=True, norm_layer=norm_layer)  # type: ignore[arg-type]  # a partial
            for _ in range(decoder_depth)
        )
        self.decoder_norm = norm_layer(decoder_dim)
        target = PixelTarget(self.patch, norm_pix) if target is None else target
        self.decoder_pred = nn.Linear(decoder_dim, target.width)
        init_as_mae(self)
        self.decoder_target: Target = target  # after the initialisation: a frozen tokenizer keeps its weights
        self.pos_embed.requires_grad_(False)
        self.decoder_pos_embed.requires_grad_(False)

    def forward(  # type: ignore[override]  # of the ViT only names and blocks are used
        self, images: Tensor, noise: Tensor | None = None, mask_ratio: float = 0.75
    ) -> MAEOutput:
        """images [B, 3, H, W], normalised. noise [B, N]: the int(N * (1 - mask_ratio)) patches with the smallest noise
        stay visible, per sample; uniform by default. UserError if none or all would stay."""
        patches = patchify(images, self.patch)
        order, kept = self.order_of(patches, noise, mask_ratio)
        first = kept if self.loss_on == "masked" else 0
        prediction = self.decode(self.encode(patches, order, kept), order, first)
        predicted = order[:, first:]
        error = self.decoder_target(prediction.float(), images, patches, predicted)
        return MAEOutput(error.mean(), prediction, predicted)

    def predict(self, images: Tensor, noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor]:
        """The prediction of every patch in raster order [B, N, W], and the mask [B, N]: 1 where it was hidden."""
        patches = patchify(images, self.patch)
        order, kept = self.order_of(patches, noise, mask_ratio)
        prediction = self.decode(self.encode(patches, order, kept), order, 0)
        mask = torch.ones(order.shape, device=images.device).scatter_(1, order[:, :kept], 0.0)
        return take(prediction, order.argsort(dim=1)), mask

    def order_of(self, patches: Tensor, noise: Tensor | None, mask_ratio: float) -> tuple[Tensor, int]:
        """The patches' numbers in the order of their noise [B, N], and how many of these stay visible, from the first
        on."""
        kept = kept_patches(patches.shape[1], mask_ratio)
        if noise is None:
            noise = torch.rand(patches.shape[:2], device=patches.device)
        return noise.argsort(dim=1), kept

    def encode(self, patches: Tensor, order: Tensor, kept: int) -> Tensor:
        """Patches [B, N, P] and their order [B, N], in which the first `kept` are visible -> tokens [B, 1 + kept, D]
        after the last norm; [B, 1 + N, D] if the encoder gets mask tokens."""
        seen = take(patches, order[:, :kept])
        # The patch projection as a linear layer on the visible patches only: hidden ones cost nothing.
        projection = self.patch_embed.proj
        weight = projection.weight.permute(0, 2, 3, 1).flatten(1)  # (channel, row, column) -> (row, column, channel)
        x = nn.functional.linear(seen, weight, projection.bias)
        if self.encoder_mask_tokens:
            x = torch.cat([x, self.mask_token.to(x.dtype).expand(len(x), order.shape[1] - kept, -1)], dim=1)
        positions = self.pos_embed[:, 1:].expand(len(x), -1, -1)
        x = x + take(positions, order[:, : x.shape[1]])
        class_token = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([class_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = self.run(transformed, block, x)
        return self.norm(x)

    def decode(self, tokens: Tensor, order: Tensor, first: int) -> Tensor:
        """Encoded tokens [B, 1 + V, D] and the order of all patches [B, N], those V first -> predictions
        [B, N - first, W] of the patches from `first` on in that order."""
        x = self.decoder_embed(tokens)
        images, count = x.shape[:2]
        positions = self.decoder_pos_embed.expand(images, -1, -1)
        x = x + torch.cat([positions[:, :1], take(positions[:, 1:], order[:, : count - 1])], dim=1)
        index = None
        if hidden := order.shape[1] + 1 - count:
            # The tokens that differ: those seen of each image, and a mask token for each position.
            seen = torch.arange(images * count, device=x.device).view(images, count)
            index = torch.cat([seen, images * count + order[:, -hidden:]], dim=1)
            x = torch.cat([x.flatten(0, 1), self.mask_token[0] + self.decoder_pos_embed[0, 1:]])
            if not looks_up_late(x):
                x, index = look_up(x, index), None
        for number, block in enumerate(self.decoder_blocks, 1):
            # The last block attends to all tokens, but only what is predicted goes on from there.
            start = 1 + first if number == len(self.decoder_blocks) else 0
            x, index = self.run(transformed, block, x, index, start), None
        return self.decoder_pred(self.decoder_norm(x))

    def run(self, part: Callable[..., Tensor], *inputs: Any) -> Tensor:
        if self.activation_checkpointing and self.training:
            return checkpoint(part, *inputs, use_reentrant=False)
        return part(*inputs)


def looks_up_late(x: Tensor) -> bool:
    """On a CPU to compute the projections of a token once saves more than it costs to copy them to where it stands. On
    a GPU, whose products are fast beside its memory, it would cost more, by estimate."""
    return not x.is_cuda


def transformed(block: Any, x: Tensor, index: Tensor | None = None, first: int = 0) -> Tensor:
    """timm's pre-norm block without what MAE leaves out, on tokens x [B, T, D]: the output of those from `first` on.

    With index [B, T], x [R, D] are the tokens that differ, and index says which of them stands where: norm and
    projection to queries, keys and values are computed once for each."""
    attn = block.attn
    qkv = attn.qkv(block.norm1(x))
    if index is not None:
        x, qkv = look_up(x, index), look_up(qkv, index)
    # Unlike timm's permutation first, this order lets the gradients of the three be joined by one copy.
    q, k, v = (part.transpose(1, 2) for part in qkv.unflatten(2, (3, attn.num_heads, -1)).unbind(2))
    q = q[:, :, first:]
    if attn.fused_attn:
        y = nn.functional.scaled_dot_product_attention(q, k, v)
    else:
        y = ((q * attn.scale) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
    x = x[:, first:] + attn.proj(y.transpose(1, 2).flatten(2))
    return x + block.mlp(block.norm2(x))


def look_up(rows: Tensor, index: Tensor) -> Tensor:
    """Rows [R, D] at index [B, T] -> [B, T, D]. The gradients of a row that stands in several places are summed in
    float32 at least."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return nn.functional.embedding(index, wide).to(rows.dtype)
