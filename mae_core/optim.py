"""Parameter groups, optimizers and the learning-rate schedule of MAE, made of timm's and torch's."""

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from mae_core.timm_encoder import TimmEncoder
from mae_core.vit import ViT

if TYPE_CHECKING:
    from timm.optim import Lars


def learning_rate(base_lr: float, batch: int) -> float:
    """The linear scaling rule: base_lr * batch / 256, for the effective batch."""
    return base_lr * batch / 256


def half_cosine(
    step: int, steps_per_epoch: int, lr: float, epochs: float, warmup_epochs: float, min_lr: float
) -> float:
    """The rate of one iteration: linear from 0 over warmup_epochs, then half a cosine from lr down to min_lr."""
    epoch = step / steps_per_epoch
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-12)
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Every group gets lr times its own lr_scale (1 where it has none)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def pretraining_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay on matrices only, none on 1-D parameters (MAE's official code, which uses timm's grouping).

    The mask and class tokens are 3-D and decay, as they do there.
    """
    from timm.optim import param_groups_weight_decay

    return param_groups_weight_decay(model, weight_decay)


def layer_decay_groups(model: ViT, weight_decay: float, layer_decay: float) -> list[dict]:
    """Groups with lr_scale = layer_decay ** (depth + 1 - layer): patch, position and class embeddings are layer 0,
    block i is layer i + 1, final norm, fc_norm and head are layer depth + 1 (BEiT's rule, as MAE fine-tunes).

    No weight decay on 1-D parameters, positions, class token and registers.
    """
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    if isinstance(model, TimmEncoder):  # timm's own order of its layers
        groups = param_groups_layer_decay(
            model.net, weight_decay, no_weight_decay_list=model.net.no_weight_decay(), layer_decay=layer_decay
        )
        return groups + param_groups_weight_decay(model.head, weight_decay)
    groups = param_groups_layer_decay(
        model, weight_decay, no_weight_decay_list=model.no_weight_decay(), layer_decay=layer_decay
    )
    # timm counts the final norm before a class-token head as part of the last block, MAE as part of the head.
    norm = [p for name, p in model.named_parameters() if name.startswith("norm.") and p.requires_grad]
    # timm before 1.0.28 counts the registers as part of the head, and lets them decay; they enter with the class token.
    registers = [p for name, p in model.named_parameters() if name == "reg_token" and p.requires_grad]
    moved = {id(p) for p in (*norm, *registers)}
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in moved]
    if norm:
        groups.append({"params": norm, "lr_scale": 1.0, "weight_decay": 0.0})
    if registers:
        scale = layer_decay ** (len(model.blocks) + 1)
        groups.append({"params": registers, "lr_scale": scale, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def adamw(groups: list[dict], betas: tuple[float, float], fused: bool = False) -> torch.optim.AdamW:
    # None, not False, leaves the choice of the multi-tensor implementation to torch.
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True if fused else None)


def lars(module: nn.Module, momentum: float, trust_coefficient: float, weight_decay: float) -> "Lars":
    """LARS as MAE's probe uses it: trust ratio and weight decay on tensors of two or more dimensions, plain momentum
    SGD on the rest. Without weight decay timm applies the ratio only where always_adapt says so; on 1-D tensors the
    official code applies none. With weight decay (MAE's probe has none) the ratio is the LARS paper's,
    |w| / (|g| + decay |w|), where the official code divides by |g + decay w|."""
    from timm.optim import Lars

    parameters = [p for p in module.parameters() if p.requires_grad]
    matrices = {"params": [p for p in parameters if p.ndim > 1], "always_adapt": True}
    vectors = {"params": [p for p in parameters if p.ndim <= 1], "always_adapt": False, "weight_decay": 0.0}
    return Lars(
        [matrices, vectors], lr=0.0, momentum=momentum, trust_coeff=trust_coefficient, weight_decay=weight_decay
    )
