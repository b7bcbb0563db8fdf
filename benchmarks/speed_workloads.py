"""The workloads that speed.py times: ours, and the same with the official code."""

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

from benchmarks.flops import build_autoencoder, training_flops
from benchmarks.originals import mae as official
from mae_core.data import (
    Images,
    normalize,
)
from mae_core.loop import train_step
from mae_core.machine import Machine, suit_attention
from mae_core.optim import adamw, layer_decay_groups, pretraining_groups
from mae_core.pretrain import preparation
from mae_core.recipe import PretrainRecipe, recipe
from mae_core.training import State, Training
from mae_core.vit import build_vit
from transfer.classification.cost import CLASSES, classifier_flops
from transfer.classification.recipes import finetune_recipe

Workload = Callable[[], object]
Scaler = torch.amp.GradScaler | None
SAME, SHIPPED = "official, same precision", "official, as shipped"


def make_workloads(
    what: str, arch: str, batch: int, machine: Machine, folder: Path | None
) -> tuple[dict[str, Workload], int]:
    """{arm: workload} with "ours" first, and the FLOPs of one image (0: none are counted).

    folder: the official code, if it is to be timed too: at our precision and, where that differs, as it ships, in fp32
    on a CPU and in fp16 with a loss scaler on a GPU.
    """
    name = "mini" if arch == "vit_mini_patch8" else "paper"
    ours, official_at, flops = {"pretrain": pretraining, "finetune": finetuning, "eval": evaluation}[what](
        arch, name, batch, machine
    )
    workloads = {"ours": ours}
    if folder is not None:
        workloads[SAME] = official_at(folder, machine.autocast, None)
        if machine.device == "cuda":
            half = partial(torch.autocast, "cuda", torch.float16)
            workloads[SHIPPED] = official_at(folder, half, torch.amp.GradScaler("cuda"))
        elif machine.precision == "bf16":
            workloads[SHIPPED] = official_at(folder, contextlib.nullcontext, None)
    return workloads, flops


# Ours; the official code from a folder, at an autocast and with or without a loss scaler; FLOPs of one image.
Arms = tuple[Workload, Callable[[Path, Callable, Scaler], Workload], int]


def training_step(
    loss_of: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer,
    autocast: Callable,
    scaler: Scaler = None,
    read_loss: bool = False,
) -> Workload:
    """One optimizer step. read_loss: copy the loss to the host at every step, as the official loop does."""

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            loss = loss_of()
        if read_loss:
            loss.item()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    return step


def loop_step(
    forward: nn.Module,
    optimizer: torch.optim.Optimizer,
    machine: Machine,
    batch: tuple[Tensor, Tensor],
    prepare: Callable[..., tuple[Tensor, ...]],
    loss_of: Callable[..., Tensor],
) -> Workload:
    """One step of the loop that trains (mae_core/loop.py), from a batch (uint8 images, labels) in the host's memory."""
    images = len(batch[0])
    training = Training(
        label="", work=Path(), dataset=Images([], nn.Identity()), epochs=1, batch=images, micro_batch=images, seed=0,
        machine=machine, fixed={}, lr_at=lambda step: 0.0, prepare=prepare, loss_of=loss_of,
    )  # fmt: skip
    state, steps = State(micro_batch=images), itertools.count()
    chunks = [(on_host(batch[0], machine), on_host(batch[1], machine))]
    return lambda: train_step(forward, optimizer, chunks, next(steps), training, state, careful=False)


def on_host(tensor: Tensor, machine: Machine) -> Tensor:
    """As a DataLoader leaves it: in pinned memory if it is to go to a GPU."""
    return tensor.pin_memory() if machine.device.startswith("cuda") else tensor


def prepared(model: nn.Module, machine: Machine) -> Any:
    """Put our model on the device as the training loop would; returns the forward pass, compiled if asked for."""
    model.to(machine.device).train()
    suit_attention(model, machine)
    return torch.compile(model, dynamic=False) if machine.compile else model


def pretraining(arch: str, name: str, batch: int, machine: Machine) -> Arms:
    r: PretrainRecipe = recipe(arch, name)
    torch.manual_seed(0)
    model = build_autoencoder(arch, r, "cpu", machine.activation_checkpointing)
    forward = prepared(model, machine)
    r = replace(r, batch=batch)
    optimizer = adamw(pretraining_groups(model, r.weight_decay), r.betas, machine.fused_adamw)
    images = random_images(batch, r.image_size)
    ours = loop_step(
        forward,
        optimizer,
        machine,
        (images, torch.zeros(batch)),
        preparation(r, 0, model.patch_embed.grid_size),
        lambda m, images, noise: m(images, noise, r.mask_ratio).loss,
    )
    normalised = on_host(normalize(images), machine)

    def theirs(folder: Path, autocast: Callable, scaler: Scaler) -> Workload:
        other = official.autoencoder(folder, arch, r).to(machine.device).train()
        # The official script takes these groups from timm, as ours does.
        own = torch.optim.AdamW(pretraining_groups(other, r.weight_decay), lr=0.0, betas=r.betas)

        def loss_of() -> Tensor:
            return other(normalised.to(machine.device, non_blocking=True), mask_ratio=r.mask_ratio)[0]

        return training_step(loss_of, own, autocast, scaler, read_loss=True)

    return ours, theirs, training_flops(arch, r, batch)


def finetuning(arch: str, name: str, batch: int, machine: Machine) -> Arms:
    r = finetune_recipe(arch, name)
    torch.manual_seed(0)
    model = build_vit(arch, r.image_size, CLASSES, r.pool, r.drop_path)
    forward = prepared(model, machine)
    model.set_grad_checkpointing(machine.activation_checkpointing)
    images, targets = random_images(batch, r.image_size), torch.rand(batch, CLASSES).softmax(dim=1)
    loss = SoftTargetCrossEntropy()
    optimizer = adamw(layer_decay_groups(model, r.weight_decay, r.layer_decay), r.betas)
    ours = loop_step(
        forward,
        optimizer,
        machine,
        (images, targets),
        lambda images, labels, step, first: (normalize(images), labels),
        lambda m, images, labels: loss(m(images).float(), labels),
    )
    normalised, targets = (on_host(tensor, machine) for tensor in (normalize(images), targets))

    def theirs(folder: Path, autocast: Callable, scaler: Scaler) -> Workload:
        other = official.classifier(folder, arch, r.image_size, CLASSES, r.drop_path).to(machine.device).train()
        own = torch.optim.AdamW(official.finetuning_groups(folder, other, r.weight_decay, r.layer_decay), lr=0.0)

        def loss_of() -> Tensor:
            samples, labels = (one.to(machine.device, non_blocking=True) for one in (normalised, targets))
            return loss(other(samples), labels)

        return training_step(loss_of, own, autocast, scaler, read_loss=True)

    return ours, theirs, classifier_flops(arch, r.image_size, train=True)


def random_images(count: int, size: int) -> Tensor:
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def evaluation(arch: str, name: str, batch: int, machine: Machine) -> Arms:
    size = finetune_recipe(arch, name).image_size
    torch.manual_seed(0)
    model = build_vit(arch, size, CLASSES, "avg")
    forward = prepared(model, machine)
    images = torch.randn(batch, 3, size, size, device=machine.device)

    def inference(network: nn.Module, call: Callable, autocast: Callable) -> Workload:
        network.eval()

        @torch.inference_mode()
        def work() -> Tensor:
            with autocast():
                return call(images)

        return work

    def theirs(folder: Path, autocast: Callable, scaler: Scaler) -> Workload:
        other = official.classifier(folder, arch, size, CLASSES, 0.0).to(machine.device)
        return inference(other, other, autocast)

    return inference(model, forward, machine.autocast), theirs, classifier_flops(arch, size, train=False)
