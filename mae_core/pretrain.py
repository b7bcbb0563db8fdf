"""Pre-train a masked autoencoder: one run, command line. The recipe is in mae_core/recipe.py.

python -m mae_core.pretrain --data DIR --arch vit_base_patch16 --recipe paper --out DIR
torchrun --nproc-per-node 8 -m mae_core.pretrain ...
"""

import argparse
import dataclasses
import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import nn

from mae_core import distributed
from mae_core.autoencoder import MaskedAutoencoder
from mae_core.checkpoint import save_weights
from mae_core.command_line import answered
from mae_core.data import Images, normalize, pretraining_transform, seed_for
from mae_core.errors import UserError
from mae_core.files import printable
from mae_core.fitted_target import make_target, tokenizer_sha256
from mae_core.flags import add_machine_flags, add_tracker_flag, named_path, non_negative_int, program, seed
from mae_core.follow import Labelled, knn_top1, labelled_folder
from mae_core.listing import images_or_shards
from mae_core.loop import check_batch, fit, micro_batch_for
from mae_core.machine import Machine, can_compile, hardware, machine_from, peak_memory_gib
from mae_core.masking import mask_noise
from mae_core.optim import adamw, half_cosine, learning_rate, pretraining_groups
from mae_core.progress import duration
from mae_core.recipe import PretrainRecipe, recipe
from mae_core.settings import choose, override
from mae_core.space import FLOAT, Space, check_free, training_space
from mae_core.stopping import stop_on_signals
from mae_core.training import CHECKPOINT_FILE, State, Training, unreadable_metadata
from mae_core.vit import ARCHS, get_arch

WEIGHTS_FILE = "mae.safetensors"


@dataclass(frozen=True)
class Following:
    """What a long run does between epochs: every `eval_every` epochs the k-NN accuracy on `labelled` (None: never),
    every `keep_every` epochs a copy of the weights as epoch-NNNN.safetensors (0: never)."""

    eval_every: int = 0
    labelled: Labelled | None = None
    keep_every: int = 0


def training_images(data: Path) -> list[str]:
    """The images to pre-train on, loose or in tar files: those in DATA/train (never the validation split beside it) if
    there is one, else those in DATA."""
    return images_or_shards(data / "train" if (data / "train").is_dir() else data)


@lru_cache(maxsize=1)  # every micro-batch of a step takes its part of the same noise
def step_noise(seed: int, step: int, batch: int, grid: tuple[int, int], masking: str, ratio: float) -> torch.Tensor:
    """The noise [batch, patches] that decides one step's masks, the same whatever the number of processes."""
    generator = torch.Generator().manual_seed(seed_for(seed, step, 1) % 2**63)
    noise = mask_noise(masking, batch, grid, ratio, generator)
    return noise.pin_memory() if torch.cuda.is_available() else noise  # or each copy of it would wait for the GPU


def preparation(r: PretrainRecipe, seed: int, grid: tuple[int, int]) -> Callable[..., tuple[torch.Tensor, ...]]:
    """`Training.prepare` of pre-training: images, normalised, and the noise of their masks."""

    def prepare(images: torch.Tensor, labels: torch.Tensor, step: int, first: int) -> tuple[torch.Tensor, ...]:
        noise = step_noise(seed, step, r.batch, grid, r.masking, r.mask_ratio)[first : first + len(images)]
        return normalize(images), noise.to(images.device, non_blocking=True)

    return prepare


def pretrain(
    data: Path,
    arch: str,
    r: PretrainRecipe,
    out: Path,
    seed: int,
    machine: Machine,
    tokenizer: Path | None = None,
    following: Following = Following(),
    tracker: str = "",
) -> tuple[State, int]:
    """Pre-train to the end (resuming what lies in `out`) and write mae.safetensors: encoder and decoder under the
    official names, and the tensors of a fitted target. tokenizer: the state dict of DALL-E's encoder, if the recipe
    needs it. tracker: where its curves go besides TensorBoard. Returns the final state and the number of images."""
    files = training_images(data)
    check_batch(len(files), r.batch, str(data))
    local_batch = r.batch // machine.processes
    images = Images(files, pretraining_transform(r.image_size, r.min_scale, r.augmentation), seed=seed)
    target = make_target(r, get_arch(arch).patch, images, seed, out, tokenizer)
    torch.manual_seed(seed_for(seed) % 2**63)
    decoder = (r.decoder_dim, r.decoder_depth, r.decoder_heads)
    checkpointing = machine.activation_checkpointing
    model = MaskedAutoencoder(
        arch, r.image_size, *decoder, r.norm_pix, checkpointing, target, r.loss_on, r.encoder_mask_tokens
    ).to(machine.device)
    check_free(pretraining_space(out, model, r.epochs, following.keep_every), out)
    optimizer = adamw(pretraining_groups(model, r.weight_decay), r.betas, machine.fused_adamw)
    steps_per_epoch = len(files) // r.batch
    lr = learning_rate(r.base_lr, r.batch)
    listing = hashlib.sha256(
        "\n".join(f.removeprefix(f"{data}/") for f in files).encode(errors="surrogateescape")
    ).hexdigest()
    fixed = {"arch": arch, "recipe": dataclasses.asdict(r), "seed": seed, "data": listing}
    if tokenizer is not None:
        fixed["tokenizer"] = tokenizer_sha256(tokenizer)

    def write(name: str, epochs: int, state: State) -> None:
        if distributed.is_main():
            metadata = metadata_of(arch, r, epochs, len(files), seed) | unreadable_metadata(state)
            save_weights(out / name, model.state_dict(), metadata)

    def after_epoch(epochs: int, state: State) -> dict[str, float]:
        if following.keep_every and epochs % following.keep_every == 0:
            write(epoch_file(epochs), epochs, state)
        if following.labelled is None or epochs % following.eval_every:
            return {}
        top1, left_out = knn_top1(model, following.labelled, r.image_size, machine)
        without = f" without {len(left_out)} images that cannot be read: {', '.join(map(printable, left_out[:3]))}"
        if distributed.is_main():
            print(f"epoch {epochs}/{r.epochs}: k-NN top-1 {top1:.2f}" + without * bool(left_out), flush=True)
        return {"knn_top1": top1} | ({"knn_left_out": len(left_out)} if left_out else {})

    state = fit(
        model,
        optimizer,
        Training(
            label=f"pre-train {arch}",
            work=out,
            dataset=images,
            epochs=r.epochs,
            batch=r.batch,
            micro_batch=micro_batch_for(local_batch, machine.micro_batch or 256),
            seed=seed,
            machine=machine,
            fixed=fixed,
            lr_at=lambda step: half_cosine(step, steps_per_epoch, lr, r.epochs, r.warmup_epochs, r.min_lr),
            prepare=preparation(r, seed, model.patch_embed.grid_size),
            loss_of=lambda m, images, noise: m(images, noise, r.mask_ratio).loss,
            tracker=tracker,
            repeats=r.repeated_augmentation,
            after_epoch=after_epoch,
        ),
    )
    write(WEIGHTS_FILE, r.epochs, state)
    return state, len(files)


def pretraining_space(out: Path, model: nn.Module, epochs: int, keep_every: int) -> Space:
    """The space below `out`: for the training, whose last checkpoint stays, for its weights and their copies."""
    numbers = sum(tensor.numel() for tensor in model.state_dict().values())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    training, state = training_space(out, numbers, trained), FLOAT * (numbers + 2 * trained)
    kept = range(keep_every, epochs + 1, keep_every) if keep_every else ()
    copies = FLOAT * numbers * sum(not (out / epoch_file(epoch)).exists() for epoch in kept)
    return Space(training.peak + copies, state + FLOAT * numbers + copies)


def epoch_file(epochs: int) -> str:
    return f"epoch-{epochs:04}.safetensors"


def metadata_of(arch: str, r: PretrainRecipe, epochs: int, images: int, seed: int) -> dict[str, str]:
    """What the weights' file says about itself; newer knobs only where they differ from the paper's."""
    metadata = {
        "arch": arch,
        "epochs": str(epochs),
        "norm_pix": str(r.norm_pix).lower(),
        "image_size": str(r.image_size),
        "mask_ratio": str(r.mask_ratio),
        "decoder_heads": str(r.decoder_heads),  # which no tensor's shape shows
        "images": str(images),
        "seed": str(seed),
    }
    if epochs != r.epochs:
        metadata["epochs_planned"] = str(r.epochs)
    newer = [f for f in dataclasses.fields(r) if isinstance(f.default, str | bool) or f.name == "repeated_augmentation"]
    changed = {f.name: getattr(r, f.name) for f in newer if getattr(r, f.name) != f.default}
    return {knob: str(value).lower() for knob, value in changed.items()} | metadata


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=program("mae_core.pretrain"), description="Pre-train a masked autoencoder.")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of images or of tar files at any depth (its train/ if any)"
    )
    parser.add_argument("--arch", required=True)
    parser.add_argument("--recipe", default="paper", help="paper or mini")
    parser.add_argument("--out", type=named_path, required=True, help="work folder; the same command resumes in it")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KNOB=VALUE", help="override recipe knobs"
    )
    parser.add_argument("--tokenizer", type=Path, help="state dict of DALL-E's encoder, for tokenizer=dall-e")
    parser.add_argument(
        "--eval-every", type=non_negative_int, default=0, metavar="N", help="k-NN accuracy every N epochs"
    )
    parser.add_argument("--eval-data", type=Path, help="labelled train/ and val/ for it (default: --data)")
    parser.add_argument(
        "--keep-every", type=non_negative_int, default=0, metavar="N", help="keep the weights of every Nth epoch"
    )
    add_tracker_flag(parser)
    add_machine_flags(parser)
    parser.add_argument("--no-compile", action="store_true", help="on GPU, where pre-training compiles by default")
    parser.add_argument(
        "--fused-adamw", action=argparse.BooleanOptionalAction, default=True, help="one kernel for AdamW (default: on)"
    )
    return parser.parse_args()


def machine_of(args: argparse.Namespace) -> Machine:
    """The machine, with fused AdamW by default, and compiled by default where that is worth its minutes: on a GPU."""
    if args.compile and args.no_compile:
        raise UserError("--compile and --no-compile: give one of them")
    machine = machine_from(args)
    compiled = machine.compile
    if machine.device == "cuda" and not args.compile and not args.no_compile:
        compiled = can_compile(machine.device)
    return replace(machine, compile=compiled, fused_adamw=args.fused_adamw)


def following_of(args: argparse.Namespace) -> Following:
    if args.eval_data is not None and not args.eval_every:
        raise UserError("--eval-data is used only with --eval-every N: give that too")
    labelled = labelled_folder(args.eval_data or args.data) if args.eval_every else None
    return Following(args.eval_every, labelled, args.keep_every)


@distributed.ends_alone
def main() -> int:
    args = parse()
    return answered(partial(run, args), f"stopped; the same command goes on from {args.out / CHECKPOINT_FILE}")


def run(args: argparse.Namespace) -> int:
    if distributed.world_size() == 1:  # torchrun ends its processes itself
        stop_on_signals()
    choose("arch", args.arch, ARCHS)
    r, changed = override(recipe(args.arch, args.recipe), args.set)
    machine, following = machine_of(args), following_of(args)
    with distributed.process_group(machine.device) as device, distributed.alone_in(args.out):
        machine = replace(machine, device=device)
        what = (args.data, args.arch, r, args.out, args.seed, machine, args.tokenizer, following, args.tracker)
        state, images = pretrain(*what)
    if distributed.is_main():
        seen = state.step * r.batch
        label = f"{args.recipe} recipe with {changed}" if changed else f"{args.recipe} recipe"
        print(
            f"{args.out / WEIGHTS_FILE}: {args.arch}, {label}, {r.epochs} epochs of {images} images in "
            f"{duration(state.seconds)} ({seen / max(state.seconds, 1e-9):.0f} images/s), {hardware(machine)}, "
            f"peak {peak_memory_gib(machine.device):.1f} GiB",
            *state.notes,
            sep="\n",
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
