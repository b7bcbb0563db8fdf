"""Encoders that timm builds, as a feature pyramid: rotary positions (DINOv3, EVA-02, PE), a norm before the blocks
(CLIP), no class token (SigLIP, AIMv2, I-JEPA). What comes before the blocks and what is in them is left to timm."""

from typing import Any

import torch
from torch import Tensor, nn

from mae_core.errors import UserError
from mae_core.timm_encoder import PREFIX, has_one_grid, is_timm
from transfer.pyramid.model import ViTPyramid, attended


def refusal(arch: str) -> str:
    """Why there is no pyramid of an encoder, to be read after a task's name; "" if there is one."""
    if not is_timm(arch) or has_one_grid(name := arch.removeprefix(PREFIX)):
        return ""
    return (
        f"takes encoders whose blocks all attend over one grid of tokens, as a ViT's do, not timm's {name}: "
        "see docs/checkpoints.md"
    )


def pyramid_class(arch: str) -> type[ViTPyramid]:
    return TimmPyramid if is_timm(arch) else ViTPyramid


class TimmPyramid(ViTPyramid):
    """Parameters are those of timm's model, net.*, and new ones as in the plain ViT's pyramid: bias tables that start
    at zero, added to the logits of the rotated queries and keys, and with upernet layer scales of one where the model
    has none.

    Absolute positions are interpolated and rotary angles computed for each input's own grid, as timm does for dynamic
    sizes. With upernet the tokens before the patches stay, which have no angles; without it they are left out.
    """

    net: Any

    def add_encoder(self, drop_path: float) -> None:
        import timm

        if why := refusal(self.arch):
            raise UserError(f"the pyramid {why}")
        self.net = timm.create_model(
            self.arch.removeprefix(PREFIX),
            num_classes=0,
            img_size=(self.grid[0] * self.side, self.grid[1] * self.side),
            dynamic_img_size=True,
            drop_path_rate=drop_path,
        )
        # No map passes through them: DistributedDataParallel wants a gradient for every parameter.
        self.net.norm, self.net.fc_norm, self.net.attn_pool = nn.Identity(), nn.Identity(), None
        if not self.upernet:
            leave_out_prefix(self.net)

    @property
    def blocks(self) -> Any:  # type: ignore[override]  # the plain ViT's pyramid holds them itself
        return self.net.blocks

    @property
    def prefix(self) -> int:
        return self.net.num_prefix_tokens

    def maps_of(self, images: Tensor) -> list[Tensor]:
        x = self.net.patch_embed(images)  # [B, H, W, D]
        grid = (x.shape[1], x.shape[2])
        found = self.net._pos_embed(x)
        tokens, angles = found if isinstance(found, tuple) else (found, None)
        tokens = self.net.norm_pre(tokens)
        angles_of = (
            {0: angles, self.window: angles_in_window(angles, grid, self.window)} if self.window else {0: angles}
        )
        shared = {} if self.upernet else self.shared_biases(grid, x.device)
        maps: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            window = self.window if self.windowed(number) else 0
            rope = angles_of[window]
            if rope is not None and self.net.rope_mixed:  # a table for each block
                rope = rope[number]
            bias = shared.get(window)
            if bias is None:
                bias = self.attention_bias(block.bias, grid, x.device, getattr(block, "bias_class", None), self.prefix)
            tokens = self.through(run_timm_block, block, tokens, grid, window, rope, bias)
            maps += [tokens[:, self.prefix :].transpose(1, 2).unflatten(2, grid)] * self.taps.count(number)
        return maps


def leave_out_prefix(net: Any) -> None:
    """Take the class token and registers, and their positions, out of timm's model."""
    if net.pos_embed is not None and not net.no_embed_class:
        net.pos_embed = nn.Parameter(net.pos_embed.detach()[:, net.num_prefix_tokens :].clone())
    net.cls_token = net.reg_token = None
    net.num_prefix_tokens, net.no_embed_class = 0, True
    for block in net.blocks:
        if hasattr(block.attn, "num_prefix_tokens"):  # they are not rotated
            block.attn.num_prefix_tokens = 0


def angles_in_window(angles: Tensor | None, grid: tuple[int, int], window: int) -> Tensor | None:
    """[..., H * W, C] -> [..., window * window, C]: the rotary angles of the first window's tokens, for those of all.

    Attention depends only on the differences between angles. These are proportional to the distances between tokens in
    each of timm's rotary embeddings, and so the same in every window. Padding beyond the map has its last angles."""
    if angles is None:
        return None
    rows, columns = (torch.arange(window, device=angles.device).clamp(max=side - 1) for side in grid)
    return angles.unflatten(-2, grid)[..., rows[:, None], columns, :].flatten(-3, -2)


def run_timm_block(
    block: Any, x: Tensor, grid: tuple[int, int], window: int, angles: Tensor | None, bias: Tensor
) -> Tensor:
    """One of timm's blocks on tokens [B, P + H*W, D], with attention within windows of that side (0: over all tokens),
    rotary angles and what is added to its logits. P must be 0 with a window."""
    from timm.models.eva import EvaBlockPostNorm
    from timm.models.vision_transformer import ResPostBlock

    options = {"attn_mask": bias} if angles is None else {"attn_mask": bias, "rope": angles}
    if not window:
        return block(x, **options)

    def attend(y: Tensor) -> Tensor:
        return attended(y.unflatten(1, grid), window, lambda part, side: block.attn(part, **options)).flatten(1, 2)

    if isinstance(block, EvaBlockPostNorm | ResPostBlock):
        x = x + block.drop_path1(block.norm1(attend(x)))
        return x + block.drop_path2(block.norm2(block.mlp(x)))
    x = x + block.drop_path1(scaled(block, 1, attend(block.norm1(x))))
    return x + block.drop_path2(scaled(block, 2, block.mlp(block.norm2(x))))


def scaled(block: Any, number: int, y: Tensor) -> Tensor:
    """By the layer scale, which EVA's blocks hold as gamma_1 and gamma_2 or not at all."""
    if hasattr(block, f"ls{number}"):
        return getattr(block, f"ls{number}")(y)
    gamma = getattr(block, f"gamma_{number}")
    return y if gamma is None else gamma * y
