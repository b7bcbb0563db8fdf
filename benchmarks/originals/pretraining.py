"""Twin of pre-training: our whole run beside the official script's, on the same crops, weights and masks."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.originals import Call, Difference, mae
from benchmarks.originals.pictures import some_images
from benchmarks.originals.watch import Replay, Watched, apart, curves, watched
from mae_core import pretrain
from mae_core.machine import Machine
from mae_core.recipe import PretrainRecipe, recipe

ARCH = "vit_mini_patch8"
IMAGES = 400  # 25 steps of 16 in each of 8 epochs: 200 steps
RECIPE = replace(recipe(ARCH, "mini"), image_size=32, epochs=8, warmup_epochs=2, batch=16)


def pretraining(call: Call) -> list[Difference]:
    """Loss and rate at every step, with plain and with normalised pixels as the target."""
    mae.load(call.checkout, "models_mae")  # before our runs take minutes
    data = some_images(call.data, call.work / "images", IMAGES)
    found = []
    for norm_pix, name in ((False, "pixels"), (True, "normalised pixels")):
        r = replace(RECIPE, norm_pix=norm_pix)
        ours, again = (our_run(data, call.work / f"{name} {other}", r, other) for other in (False, True))
        losses, rates = their_run(call, ours, r)
        found += curves(name, ours, apart(again, ours), losses, rates)
    return found


def our_run(data: Path, work: Path, r: PretrainRecipe, other_order: bool) -> Watched:
    machine = Machine(fused_adamw=True, threads=torch.get_num_threads())
    work.mkdir()
    with watched(pretrain, other_order) as run:
        pretrain.pretrain(data, ARCH, r, work, seed=0, machine=machine)
    return run


def their_run(call: Call, ours: Watched, r: PretrainRecipe) -> tuple[list[float], list[float]]:
    """The official script from our start: its losses and rates."""
    start, replay = call.work / "start.pth", []
    torch.save({"model": ours.start}, start)

    def images(root: str, transform: Any) -> Replay:
        replay.append(Replay(ours.steps, r.epochs, transform))
        return replay[0]

    def noise(*size: int, **_: Any) -> Tensor:
        same = torch.cat(replay[0].current.more)
        assert same.shape == size
        return same

    flags: dict[str, Any] = {"epochs": r.epochs, "warmup_epochs": r.warmup_epochs, "batch_size": r.batch}
    flags |= {"blr": r.base_lr, "min_lr": r.min_lr, "weight_decay": r.weight_decay, "mask_ratio": r.mask_ratio}
    flags |= {"resume": start, "log_dir": call.work}
    with patch.object(torch, "rand", noise):
        curve = mae.run(
            call.checkout,
            "main_pretrain",
            lambda norm_pix_loss: mae.autoencoder(call.checkout, ARCH, replace(r, norm_pix=norm_pix_loss)),
            images,
            flags,
            ["--norm_pix_loss"] * r.norm_pix,
        )
    return curve.scalars["train_loss"], curve.scalars["lr"]
