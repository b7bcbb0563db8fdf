"""The crop of MAE's linear probe, apart from transforms.py, which can be imported without torchvision."""

import math

import torch
from torchvision.transforms import v2


class LoopFreeCrop(v2.RandomResizedCrop):
    """Random resized crop that keeps its first draw, clipped to the image if too large, instead of drawing again: MAE's
    probe trains with it to match its TensorFlow original (official code, util/crop.py)."""

    def make_params(self, flat_inputs: list) -> dict[str, int]:
        height, width = v2.functional.get_size(flat_inputs[0])
        area = height * width * torch.empty(()).uniform_(*self.scale).item()
        low, high = (math.log(r) for r in self.ratio)
        aspect = math.exp(torch.empty(()).uniform_(low, high).item())
        w = min(round(math.sqrt(area * aspect)), width)
        h = min(round(math.sqrt(area / aspect)), height)
        top = int(torch.randint(0, height - h + 1, ()))
        left = int(torch.randint(0, width - w + 1, ()))
        return {"top": top, "left": left, "height": h, "width": w}
