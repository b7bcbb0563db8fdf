"""The twins of training, with a small script of this file's in the original's place: what is equal is found to be
equal, and what is not is found out. That it is the official code's work, only a checkout of it can show."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from timm.data import Mixup
from torchvision import transforms

from benchmarks.originals import Call, mae, pretraining
from benchmarks.originals.watch import Replay, watched
from mae_core import pretrain
from mae_core.optim import adamw, half_cosine
from tests.fixtures.transfer import make_job, write_imagenet, write_noise_image
from transfer.classification import train
from transfer.classification.job import finetune
from transfer.classification.tasks import FINETUNE

# A script as the official one is called and read: its own loop, AdamW, schedule and normalisation, and today's model.
MODELS = """
import torch
from mae_core.autoencoder import MaskedAutoencoder


class MaskedAutoencoderViT(MaskedAutoencoder):
    def __init__(self, img_size, decoder_embed_dim, decoder_depth, decoder_num_heads, norm_pix_loss, **rest):
        decoder = (decoder_embed_dim, decoder_depth, decoder_num_heads)
        super().__init__("vit_mini_patch8", img_size, *decoder, norm_pix_loss)

    def forward(self, images, mask_ratio):
        noise = torch.rand(len(images), self.patch_embed.num_patches, device=images.device)
        return super().forward(images, noise, mask_ratio).loss, None, None
"""
SCRIPT = """
import argparse
import math

import models_mae
import timm
import torch
import torchvision.datasets as datasets
import torchvision.transforms as transforms
from torch._six import inf
from torch.utils.tensorboard import SummaryWriter

assert timm.__version__ == "0.3.2"


def get_args_parser():
    parser = argparse.ArgumentParser()
    for name in ("model", "device", "output_dir", "resume", "log_dir"):
        parser.add_argument("--" + name)
    for name in ("epochs", "warmup_epochs", "batch_size", "num_workers"):
        parser.add_argument("--" + name, type=int)
    for name in ("blr", "min_lr", "weight_decay", "mask_ratio"):
        parser.add_argument("--" + name, type=float)
    parser.add_argument("--no_pin_mem", action="store_true")
    parser.add_argument("--norm_pix_loss", action="store_true")
    return parser


def main(args):
    print("never seen")
    numbers = [transforms.ToTensor(), transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    images = datasets.ImageFolder("data/train", transform=transforms.Compose([transforms.Resize(4), *numbers]))
    loader = torch.utils.data.DataLoader(images, args.batch_size, shuffle=True)
    model = models_mae.__dict__[args.model](norm_pix_loss=args.norm_pix_loss)
    model.load_state_dict(torch.load(args.resume)["model"])
    learned = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = ([p for p in learned if (p.ndim > 1) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    writer = SummaryWriter(log_dir=args.log_dir)
    for step in range(args.epochs * len(loader)):
        if step % len(loader) == 0:
            batches = iter(loader)
        epoch, lr = step / len(loader), args.blr * args.batch_size / 256
        if epoch < args.warmup_epochs:
            lr *= epoch / args.warmup_epochs
        else:
            lr *= 0.5 + 0.5 * math.cos(math.pi * (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs))
        for group in groups:
            group["lr"] = lr
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = lr
        loss, _, _ = model(next(batches)[0].to(args.device), mask_ratio=args.mask_ratio)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.cuda.synchronize()
        writer.add_scalar("train_loss", loss.item(), step)
        writer.add_scalar("lr", lr, step)
"""


@pytest.fixture
def call(tmp_path, monkeypatch):
    """A call with that script in its checkout, and a short recipe: 6 steps of 8 images of 16 px."""
    folder = tmp_path / "mae"
    for name in (*mae.FILES, "main_pretrain.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text({"models_mae.py": MODELS, "main_pretrain.py": SCRIPT}.get(name, ""))
    for number in range(16):
        write_noise_image(tmp_path / "data" / f"class{number % 2}" / f"{number}.png", (16 * number, 90, 20), number)
    short = replace(
        pretraining.RECIPE, image_size=16, batch=8, epochs=3, warmup_epochs=1, base_lr=0.05, decoder_depth=1
    )
    monkeypatch.setattr(pretraining, "IMAGES", 16)
    monkeypatch.setattr(pretraining, "RECIPE", short)
    (tmp_path / "work").mkdir()
    yield Call(tmp_path / "data", folder, tmp_path / "work")
    for name in ("models_mae", "main_pretrain"):
        sys.modules.pop(name, None)
    vars(np).pop("float", None)


def verdicts(call) -> list[bool]:
    """Of each target: the first loss, the last, the largest gap of the losses, the rates."""
    return [difference.held for difference in pretraining.pretraining(call)]


@pytest.mark.slow
def test_equal_trainings_are_found_equal(call, capsys):
    synchronize = torch.cuda.synchronize
    assert verdicts(call) == [True] * 8
    assert "never seen" not in capsys.readouterr().out
    assert torch.cuda.synchronize is synchronize


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "wrong", "found"),
    [
        ("half_cosine", lambda *a: 1.001 * half_cosine(*a), [True, False, False, False]),
        ("adamw", lambda groups, betas, fused: adamw(groups, (0.8, 0.95), fused), [True, False, False, True]),
        ("pretraining_groups", lambda m, decay: [{"params": [*m.parameters()]}], [True, False, False, True]),
        ("normalize", lambda images: images / 255 - 0.5, [False, False, False, True]),
    ],
)
def test_what_is_wrong_in_ours_is_found(call, monkeypatch, part, wrong, found):
    monkeypatch.setattr(pretrain, part, wrong)
    assert verdicts(call) == found * 2


@pytest.mark.slow
def test_a_replay_gives_the_images_and_draws_of_every_step(tmp_path):
    """So timm's mixup, called on what a replay gives, makes the targets and images that ours trained on."""
    data = write_imagenet(tmp_path / "data", train=4)
    job = make_job(FINETUNE, data, tmp_path / "run", batch=8, mixup=0.8, cutmix=1.0, drop_path=0.5, label_smoothing=0.1)
    job.work.mkdir()
    with watched(train) as run:
        finetune(job)
    assert len(run.steps) == 4
    normalized = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    replay = Replay(run.steps, 2, transforms.Compose([transforms.ToTensor(), normalized]))
    assert len(replay) == 16
    mixup = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=1000)
    for step in run.steps:
        images, labels = zip(*(replay[0] for _ in range(8)))
        assert replay.current is step
        _, targets = mixup(torch.stack(images), torch.tensor(labels))
        torch.testing.assert_close(targets, step.more[0], rtol=0, atol=0)
    assert len({step.loss for step in run.steps}) == 4
