"""The pieces of work that speed.py times: ours, and the same with the official code."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from benchmarks import official_mae as official
from benchmarks.flops import counted, inputs_of, model_of, training_flops
from mae_core.data import (
    MEAN,
    STD,
    Images,
    TrainingStream,
    images_or_shards,
    loader,
    normalize,
    pretraining_transform,
)
from mae_core.errors import UserError
from mae_core.machine import Machine, suit_attention
from mae_core.optim import adamw, layer_decay_groups, pretraining_groups
from mae_core.recipe import PretrainRecipe, recipe
from mae_core.shards import list_shards
from mae_core.vit import build_vit, get_arch
from transfer.classification.recipes import finetune_recipe

Work = Callable[[], object]
SAME, SHIPPED = "official, same precision", "official, as shipped"
IMAGE_FOLDER = "torchvision's ImageFolder, Pillow"
CLASSES = 1000


def works(
    what: str, arch: str, batch: int, machine: Machine, folder: Path | None, data: Path | None
) -> tuple[dict[str, Work], int]:
    """{arm: work} with "ours" first, and the FLOPs of one image (0: none are counted). With a folder of the official
    code also that, at our precision and, where it differs, as it ships: fp32 on a CPU, fp16 with a loss scaler on a
    GPU."""
    if what == "loader":
        return loader_works(get_arch(arch).image_size, batch, machine, data), 0
    name = "mini" if arch == "vit_mini_patch8" else "paper"
    ours, theirs, flops = {"pretrain": pretraining, "finetune": finetuning, "eval": evaluation}[what](
        arch, name, batch, machine, folder
    )
    found = {"ours": ours}
    if folder is not None:
        found[SAME] = theirs(machine.autocast, None)
        if machine.device == "cuda":
            half = partial(torch.autocast, "cuda", torch.float16)
            found[SHIPPED] = theirs(half, torch.amp.GradScaler("cuda"))
        elif machine.precision == "bf16":
            found[SHIPPED] = theirs(contextlib.nullcontext, None)
    return found, flops


def training(
    loss_of: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer,
    autocast: Callable,
    scaler: torch.amp.GradScaler | None = None,
    look: bool = False,
) -> Work:
    """One optimizer step. look: read the loss at every step, as the official loop does."""

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            loss = loss_of()
        if look:
            loss.item()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    return step


def prepared(model: nn.Module, machine: Machine) -> tuple[nn.Module, nn.Module]:
    """Our model on the device as the training loop would run it: (the module, what is called)."""
    model = model.to(machine.device).train()
    suit_attention(model, machine)
    return model, torch.compile(model) if machine.compile else model


def pretraining(arch: str, name: str, batch: int, machine: Machine, folder: Path | None):
    r: PretrainRecipe = recipe(arch, name)
    torch.manual_seed(0)
    model, forward = prepared(model_of(arch, r, "cpu", machine.activation_checkpointing), machine)
    images, noise = inputs_of(arch, r, batch, machine.device)
    optimizer = adamw(pretraining_groups(model, r.weight_decay), r.betas, machine.fused_adamw)
    ours = training(lambda: forward(images, noise, r.mask_ratio).loss, optimizer, machine.autocast)

    def theirs(autocast: Callable, scaler: torch.amp.GradScaler | None) -> Work:
        other = official.autoencoder(folder, arch, r).to(machine.device).train()
        # Its script takes these groups from timm, as ours does.
        own = torch.optim.AdamW(pretraining_groups(other, r.weight_decay), lr=0.0, betas=r.betas)
        return training(lambda: other(images, mask_ratio=r.mask_ratio)[0], own, autocast, scaler, look=True)

    return ours, theirs, training_flops(arch, r)


def finetuning(arch: str, name: str, batch: int, machine: Machine, folder: Path | None):
    r = finetune_recipe(arch, name)
    torch.manual_seed(0)
    model, forward = prepared(build_vit(arch, r.image_size, CLASSES, r.pool, r.drop_path), machine)
    model.set_grad_checkpointing(machine.activation_checkpointing)
    images = torch.randn(batch, 3, r.image_size, r.image_size, device=machine.device)
    targets = torch.rand(batch, CLASSES, device=machine.device).softmax(dim=1)
    loss = SoftTargetCrossEntropy()
    optimizer = adamw(layer_decay_groups(model, r.weight_decay, r.layer_decay), r.betas)
    ours = training(lambda: loss(forward(images).float(), targets), optimizer, machine.autocast)

    def theirs(autocast: Callable, scaler: torch.amp.GradScaler | None) -> Work:
        other = official.classifier(folder, arch, r.image_size, CLASSES, r.drop_path).to(machine.device).train()
        own = torch.optim.AdamW(official.finetuning_groups(folder, other, r.weight_decay, r.layer_decay), lr=0.0)
        return training(lambda: loss(other(images), targets), own, autocast, scaler, look=True)

    return ours, theirs, classifier_flops(arch, r.image_size, train=True)


def evaluation(arch: str, name: str, batch: int, machine: Machine, folder: Path | None):
    size = finetune_recipe(arch, name).image_size
    torch.manual_seed(0)
    model, forward = prepared(build_vit(arch, size, CLASSES, "avg"), machine)
    images = torch.randn(batch, 3, size, size, device=machine.device)

    def inference(network: nn.Module, call: nn.Module, autocast: Callable) -> Work:
        network.eval()

        @torch.inference_mode()
        def work() -> Tensor:
            with autocast():
                return call(images)

        return work

    def theirs(autocast: Callable, scaler: torch.amp.GradScaler | None) -> Work:
        other = official.classifier(folder, arch, size, CLASSES, 0.0).to(machine.device)
        return inference(other, other, autocast)

    return inference(model, forward, machine.autocast), theirs, classifier_flops(arch, size, train=False)


def classifier_flops(arch: str, image_size: int, train: bool) -> int:
    """FLOPs of one image through the classifier, forward alone or with the backward pass."""
    with torch.device("meta"):
        model = build_vit(arch, image_size, CLASSES, "avg")
        image = torch.empty(1, 3, image_size, image_size)
    return counted(lambda: model(image).sum().backward() if train else model(image), model)


def loader_works(size: int, batch: int, machine: Machine, data: Path) -> dict[str, Work]:
    """The next batch of pre-training images, decoded, cropped, flipped and normalised on the device; beside it the same
    of the same files by torchvision's ImageFolder and the transforms of the official script, all of them Pillow's."""
    files, folder = images_or_shards(data), None
    if not list_shards(data):
        crop = transforms.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=3)
        steps = [crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        try:
            folder = datasets.ImageFolder(str(data), transforms.Compose(steps))
        except FileNotFoundError:
            raise UserError(
                f"{data} has no class folders with images, as torchvision's ImageFolder reads them"
            ) from None
        files = [file for file, _ in folder.samples]
    if len(files) < batch:
        raise UserError(f"{data} has {len(files)} images, less than one batch of {batch}: give a smaller --batch")
    dataset = Images(files, pretraining_transform(size))

    def ours() -> Iterator[Tensor]:
        stream = TrainingStream(len(files), batch, batch, 0, 0, 10**6)
        for images, _, _ in loader(dataset, stream, machine.workers, machine.device):
            yield normalize(images.to(machine.device, non_blocking=True))

    def theirs() -> Iterator[Tensor]:
        pinned = machine.device == "cuda"
        while True:
            for images, _ in DataLoader(folder, batch, shuffle=True, pin_memory=pinned, drop_last=True):
                yield images.to(machine.device, non_blocking=True)

    found = {"ours": partial(next, ours())}
    return found | {IMAGE_FOLDER: partial(next, theirs())} if folder is not None else found
