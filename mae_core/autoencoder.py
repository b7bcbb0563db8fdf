"""The masked autoencoder of the paper (arXiv 2111.06377, section 3)."""

from typing import NamedTuple

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mae_core.errors import UserError
from mae_core.vit import init_as_mae, norm_layer, sincos_position_embedding, vit_arguments


class MAEOutput(NamedTuple):
    """loss: scalar, mean squared error over the masked patches. prediction [B, N, patch*patch*3]: pixels of each patch
    in the order (row, column, channel), in the space of the target. mask [B, N]: 1 where a patch was hidden."""

    loss: Tensor
    prediction: Tensor
    mask: Tensor


def patchify(images: Tensor, patch: int) -> Tensor:
    """Images [B, 3, H, W] -> patches [B, N, patch*patch*3], row by row, each as (row, column, channel)."""
    b, c, h, w = images.shape
    grid = images.reshape(b, c, h // patch, patch, w // patch, patch)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(patches: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of patchify: [B, N, patch*patch*3] -> [B, 3, H, W] for a grid of (rows, columns)."""
    b, (rows, columns) = patches.shape[0], grid
    pixels = patches.reshape(b, rows, columns, patch, patch, 3)
    return pixels.permute(0, 5, 1, 3, 2, 4).reshape(b, 3, rows * patch, columns * patch)


def normalise_patches(patches: Tensor) -> Tensor:
    """Each patch minus its mean, over its standard deviation (unbiased variance, eps 1e-6)."""
    mean = patches.mean(dim=-1, keepdim=True)
    return (patches - mean) / (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()


class MaskedAutoencoder(VisionTransformer):
    """The encoder with a light decoder. The encoder is the ViT itself, so that the state dict has the names of the
    official full checkpoints: a plain ViT's, and beside them mask_token and decoder_*.

    norm_pix: reconstruct per-patch normalised pixels instead of pixels.
    activation_checkpointing: recompute each block in the backward pass instead of storing its activations.
    """

    def __init__(
        self,
        arch: str,
        image_size: int | tuple[int, int] | None = None,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        norm_pix: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__(**vit_arguments(arch, image_size), num_classes=0, global_pool="token")
        if decoder_heads < 1 or decoder_dim % decoder_heads or decoder_dim % 4:
            raise UserError(f"decoder width {decoder_dim} must be divisible by 4 and by its {decoder_heads} heads")
        self.norm_pix = norm_pix
        self.activation_checkpointing = activation_checkpointing
        self.patch = self.patch_embed.patch_size[0]
        self.decoder_embed = nn.Linear(self.embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_position_embedding(decoder_dim, self.patch_embed.grid_size))
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_dim, decoder_heads, qkv_bias=True, norm_layer=norm_layer) for _ in range(decoder_depth)
        )
        self.decoder_norm = norm_layer(decoder_dim)
        self.decoder_pred = nn.Linear(decoder_dim, self.patch * self.patch * 3)
        init_as_mae(self)
        self.pos_embed.requires_grad_(False)
        self.decoder_pos_embed.requires_grad_(False)

    def forward(self, images: Tensor, noise: Tensor | None = None, mask_ratio: float = 0.75) -> MAEOutput:
        """images [B, 3, H, W], normalised. noise [B, N]: the int(N * (1 - mask_ratio)) patches with the smallest noise
        stay visible, per sample; uniform by default. UserError if none or all would stay."""
        patches = patchify(images, self.patch)
        kept = int(patches.shape[1] * (1 - mask_ratio))
        if not 0 < kept < patches.shape[1]:
            raise UserError(f"a mask ratio of {mask_ratio} leaves {kept} of {patches.shape[1]} patches visible")
        if noise is None:
            noise = torch.rand(patches.shape[:2], device=images.device)
        order = noise.argsort(dim=1)
        visible = order[:, :kept]
        mask = torch.ones(patches.shape[:2], device=images.device).scatter_(1, visible, 0.0)
        prediction = self.decode(self.encode(patches, visible), order)
        target = normalise_patches(patches) if self.norm_pix else patches
        error = (prediction.float() - target).square().mean(dim=-1)
        return MAEOutput((error * mask).sum() / mask.sum(), prediction, mask)

    def encode(self, patches: Tensor, visible: Tensor) -> Tensor:
        """Patches [B, N, P] and the indices of those that stay [B, V] -> tokens [B, 1 + V, D] after the last norm."""
        kept = take(patches, visible)
        # The patch projection as a linear layer on the kept patches alone: what is hidden costs nothing.
        projection = self.patch_embed.proj
        weight = projection.weight.permute(0, 2, 3, 1).flatten(1)  # (channel, row, column) -> (row, column, channel)
        positions = self.pos_embed[:, 1:].expand(len(kept), -1, -1)
        x = nn.functional.linear(kept, weight, projection.bias) + take(positions, visible)
        auxiliary = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([auxiliary.expand(len(x), -1, -1), x], dim=1)
        return self.norm(self.run(self.blocks, x))

    def decode(self, tokens: Tensor, order: Tensor) -> Tensor:
        """Encoded tokens [B, 1 + V, D] and the order of all patches (visible ones first) [B, N] -> [B, N, P]."""
        x = self.decoder_embed(tokens)
        hidden = self.mask_token.to(x.dtype).expand(len(x), order.shape[1] + 1 - x.shape[1], -1)
        in_place = take(torch.cat([x[:, 1:], hidden], dim=1), order.argsort(dim=1))
        x = torch.cat([x[:, :1], in_place], dim=1) + self.decoder_pos_embed
        x = self.decoder_norm(self.run(self.decoder_blocks, x))
        return self.decoder_pred(x)[:, 1:]

    def run(self, blocks: nn.Module, x: Tensor) -> Tensor:
        for block in blocks:
            x = (
                checkpoint(block, x, use_reentrant=False)
                if self.activation_checkpointing and self.training
                else block(x)
            )
        return x


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens [B, N, D] at the positions index [B, M] -> [B, M, D]."""
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[-1]))
