"""The encoder of DALL-E's discrete VAE as a tokenizer, from a plain state dict.

Architecture and names of openai/DALL-E, dall_e/encoder.py and utils.py: a 7x7 convolution, four groups of two blocks of
width n_hid * 1, 2, 4, 8 with max pooling after the first three, a 1x1 convolution to 8192 tokens: one token for 8x8 px.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mae_core.checkpoint import check_shapes, read_file
from mae_core.data import MEAN, STD
from mae_core.errors import UserError

GROUPS, BLOCKS = 4, 2
STRIDE = 8  # px a token
LOGIT_LAPLACE_EPS = 0.1  # the encoder was trained on pixels squeezed into 0.1..0.9


class Convolution(nn.Module):
    """A same-size convolution with the names w and b. They are buffers, not part of the state dict: frozen, and in the
    user's own file."""

    w: Tensor
    b: Tensor

    def __init__(self, n_in: int, n_out: int, side: int) -> None:
        super().__init__()
        self.register_buffer("w", torch.zeros(n_out, n_in, side, side), persistent=False)
        self.register_buffer("b", torch.zeros(n_out), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class Block(nn.Module):
    """A bottleneck of four convolutions beside the identity, or beside a 1x1 convolution where the width changes."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        inner = n_out // 4
        convolutions = ((n_in, inner, 3), (inner, inner, 3), (inner, inner, 3), (inner, n_out, 1))
        self.id_path = Convolution(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        self.res_path = nn.ModuleDict({f"conv_{i}": Convolution(*shape) for i, shape in enumerate(convolutions, 1)})

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for convolution in self.res_path.values():
            y = convolution(y.relu())
        return self.id_path(x) + y / (GROUPS * BLOCKS) ** 2


class DalleTokenizer(nn.Module):
    """Normalised images [B, 3, H, W] -> token ids [B, N] for a grid of patches (rows, columns). The image is resized
    (bilinear, antialiased) so that a token covers a patch: to 112 px for the 14x14 patches of 224 px."""

    mean: Tensor
    std: Tensor

    def __init__(self, grid: tuple[int, int], n_hid: int = 256, vocabulary: int = 8192) -> None:
        super().__init__()
        self.size = (STRIDE * grid[0], STRIDE * grid[1])
        blocks: dict[str, nn.Module] = {"input": Convolution(3, n_hid, 7)}
        n_in = n_hid
        for group in range(GROUPS):
            n_out = n_hid * 2**group
            widths = [n_in] + [n_out] * (BLOCKS - 1)
            blocks[f"group_{group + 1}"] = nn.ModuleDict(
                {f"block_{i + 1}": Block(width, n_out) for i, width in enumerate(widths)}
            )
            n_in = n_out
        blocks["output"] = nn.ModuleDict({"conv": Convolution(n_in, vocabulary, 1)})
        self.blocks = nn.ModuleDict(blocks)
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        pixels = F.interpolate(images * self.std + self.mean, self.size, mode="bilinear", antialias=True)
        return self.logits(pixels.clamp(0, 1)).argmax(dim=1).flatten(1)

    def logits(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in 0..1 -> logits [B, vocabulary, H / 8, W / 8]."""
        x = (1 - 2 * LOGIT_LAPLACE_EPS) * pixels + LOGIT_LAPLACE_EPS
        for name, part in self.blocks.items():
            for block in part.values() if isinstance(part, nn.ModuleDict) else [part]:
                x = block(x.relu() if name == "output" else x)
            if name.startswith("group_") and name != f"group_{GROUPS}":
                x = F.max_pool2d(x, 2)
        return x


def read_dalle(path: Path, grid: tuple[int, int]) -> tuple[DalleTokenizer, int]:
    """The tokenizer with a file's weights, and its vocabulary. UserError unless the file is a plain state dict with
    every tensor in its shape; a pickled module is never loaded."""
    state, _ = read_file(path)
    for name in ("blocks.input.w", "blocks.output.conv.w"):
        if not isinstance(state.get(name), Tensor):
            raise UserError(f"{path} has no {name}: give the state dict of DALL-E's encoder (docs/pretraining.md)")
    vocabulary = len(state["blocks.output.conv.w"])
    tokenizer = DalleTokenizer(grid, len(state["blocks.input.w"]), vocabulary)
    wanted = {name: buffer for name, buffer in tokenizer.named_buffers() if name.startswith("blocks.")}
    check_shapes(str(path), state, {name: tensor.shape for name, tensor in wanted.items()}, "DALL-E's encoder")
    for name, tensor in wanted.items():
        tensor.copy_(state[name])
    return tokenizer, vocabulary
