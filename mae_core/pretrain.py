"""Pre-train a masked autoencoder: recipe, command line.

python -m mae_core.pretrain --data DIR --arch vit_base_patch16 --recipe paper --out DIR
torchrun --nproc-per-node 8 -m mae_core.pretrain ...
"""

import argparse
import dataclasses
import hashlib
import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from mae_core import distributed
from mae_core.autoencoder import MaskedAutoencoder
from mae_core.checkpoint import save_weights
from mae_core.data import Images, list_images, pretraining_transform, seed_for
from mae_core.errors import UserError
from mae_core.loop import check_batch, fit, micro_batch_for
from mae_core.machine import Machine, add_machine_flags, hardware, machine_from, natural, peak_memory_gib
from mae_core.optim import adamw, half_cosine, learning_rate, pretraining_groups
from mae_core.progress import duration
from mae_core.settings import check_ranges, did_you_mean, override
from mae_core.training import CHECKPOINT_FILE, State, Training
from mae_core.vit import get_arch

WEIGHTS_FILE = "mae.safetensors"


@dataclass(frozen=True)
class PretrainRecipe:
    """Every number of one pre-training. Defaults: MAE paper, Table 8, section 3 and A.1; where the paper is silent the
    official code (min_scale, betas' use, zero decay on 1-D parameters, decoder heads)."""

    image_size: int = 224
    mask_ratio: float = 0.75
    norm_pix: bool = True  # the released encoders; section 4's baseline reconstructs plain pixels
    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    epochs: int = 1600  # Table 3 and all transfer results; the ablations take 800
    warmup_epochs: int = 40
    batch: int = 4096
    base_lr: float = 1.5e-4
    min_lr: float = 0.0
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    min_scale: float = 0.2  # random resized crop, smallest share of the area

    def __post_init__(self) -> None:
        check_ranges(self)


MINI_FIELDS = ("image_size", "norm_pix", "decoder_dim", "decoder_depth", "decoder_heads", "epochs", "warmup_epochs")
MINI_FIELDS += ("batch", "base_lr")


def recipe(arch: str, name: str) -> PretrainRecipe:
    """The recipe of that name: "paper", or "mini" for the generated 48 px images and vit_mini_patch8."""
    a = get_arch(arch)
    paper = PretrainRecipe(image_size=a.image_size)
    recipes = {
        "paper": paper,
        "mini": replace(
            paper,
            image_size=48 - 48 % a.patch,
            norm_pix=False,
            decoder_dim=96,
            decoder_depth=2,
            decoder_heads=4,
            epochs=40,
            warmup_epochs=2,
            batch=256,
            base_lr=1.5e-3,
        ),
    }
    if name not in recipes:
        raise UserError(f"unknown recipe '{name}'; {did_you_mean(name, list(recipes))}")
    return recipes[name]


def training_images(data: Path) -> list[Path]:
    """The images to pre-train on: DATA/train where there is one (never the validation split beside it), else DATA."""
    return list_images(data / "train" if (data / "train").is_dir() else data)


@lru_cache(maxsize=1)  # every micro-batch of a step takes its part of the same noise
def step_noise(seed: int, step: int, batch: int, patches: int) -> torch.Tensor:
    """The noise [batch, patches] that decides the masks of one step, the same however many processes share it."""
    generator = torch.Generator().manual_seed(seed_for(seed, step, 1) % 2**63)
    return torch.rand(batch, patches, generator=generator)


def pretrain(data: Path, arch: str, r: PretrainRecipe, out: Path, seed: int, machine: Machine) -> tuple[State, int]:
    """Pre-train to the end (resuming what lies in `out`) and write mae.safetensors: encoder and decoder under the
    official names. Returns the final state and the images per epoch."""
    files = training_images(data)
    check_batch(len(files), r.batch, str(data))
    share = r.batch // machine.processes
    torch.manual_seed(seed_for(seed) % 2**63)
    model = MaskedAutoencoder(
        arch,
        r.image_size,
        r.decoder_dim,
        r.decoder_depth,
        r.decoder_heads,
        r.norm_pix,
        machine.activation_checkpointing,
    ).to(machine.device)
    optimizer = adamw(pretraining_groups(model, r.weight_decay), r.betas)
    patches = model.patch_embed.num_patches
    steps_per_epoch = len(files) // r.batch
    lr = learning_rate(r.base_lr, r.batch)
    listing = hashlib.sha256("\n".join(str(f.relative_to(data)) for f in files).encode()).hexdigest()

    def prepare(images: torch.Tensor, labels: torch.Tensor, step: int, first: int) -> tuple[torch.Tensor, ...]:
        noise = step_noise(seed, step, r.batch, patches)[first : first + len(images)]
        return images, noise.to(images.device)

    state = fit(
        model,
        optimizer,
        Training(
            label=f"pre-train {arch}",
            work=out,
            dataset=Images(files, pretraining_transform(r.image_size, r.min_scale), seed=seed),
            epochs=r.epochs,
            batch=r.batch,
            micro_batch=micro_batch_for(share, machine.micro_batch or 256),
            seed=seed,
            machine=machine,
            fixed={"arch": arch, "recipe": dataclasses.asdict(r), "seed": seed, "data": listing},
            lr_at=lambda step: half_cosine(step, steps_per_epoch, lr, r.epochs, r.warmup_epochs, r.min_lr),
            prepare=prepare,
            loss_of=lambda m, images, noise: m(images, noise, r.mask_ratio).loss,
            tensorboard=True,
        ),
    )
    if distributed.is_main():
        metadata = {
            "format": "mae-transfer",
            "arch": arch,
            "epochs": str(r.epochs),
            "norm_pix": str(r.norm_pix).lower(),
            "image_size": str(r.image_size),
            "mask_ratio": str(r.mask_ratio),
            "decoder_heads": str(r.decoder_heads),  # which no shape tells
            "images": str(len(files)),
            "seed": str(seed),
        }
        save_weights(out / WEIGHTS_FILE, model.state_dict(), metadata)
    return state, len(files)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mae_core.pretrain", description="Pre-train a masked autoencoder.")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of images at any depth (its train/ if it has one)"
    )
    parser.add_argument("--arch", required=True)
    parser.add_argument("--recipe", default="paper", help="paper or mini")
    parser.add_argument("--out", type=Path, required=True, help="work folder; the same command resumes in it")
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KNOB=VALUE", help="override recipe knobs"
    )
    add_machine_flags(parser)
    args = parser.parse_args()
    try:
        get_arch(args.arch)
        r, changed = override(recipe(args.arch, args.recipe), args.set)
        machine = machine_from(args)
        args.out.mkdir(parents=True, exist_ok=True)
        with distributed.process_group(machine.device) as device:
            machine = replace(machine, device=device)
            state, images = pretrain(args.data, args.arch, r, args.out, args.seed, machine)
    except (UserError, OSError) as e:  # OSError: a full or read-only disk
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from {args.out / CHECKPOINT_FILE}", file=sys.stderr)
        return 130
    if distributed.is_main():
        seen = state.step * r.batch
        label = f"{args.recipe} recipe with {changed}" if changed else f"{args.recipe} recipe"
        print(
            f"{args.out / WEIGHTS_FILE}: {args.arch}, {label}, {r.epochs} epochs of {images} images in "
            f"{duration(state.seconds)} ({seen / max(state.seconds, 1e-9):.0f} images/s), {hardware(machine.device)}, "
            f"peak {peak_memory_gib(machine.device):.1f} GiB"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
