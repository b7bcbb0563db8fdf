"""Draw what a masked autoencoder sees and what it reconstructs: the paper's Figures 2 to 4.

python -m mae_core.reconstruct --ckpt FILE --images DIR --mask-ratio .75 .85 .95 --out picture.png

Several checkpoints stand side by side.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from mae_core.autoencoder import MaskedAutoencoder
from mae_core.checkpoint import Checkpoint, CheckpointError, check_shapes, printable, read_checkpoint
from mae_core.command_line import answered
from mae_core.data import MEAN, STD, normalize
from mae_core.decode import UNREADABLE, read_image
from mae_core.errors import UserError
from mae_core.flags import named_path, program, seed
from mae_core.listing import list_images
from mae_core.patches import patchify, unpatchify
from mae_core.targets import KMeansTokenizer, PCATarget, Target, TokenTarget
from mae_core.vit import ARCHS
from mae_core.writing import named_if_refused, replacing

OFFICIAL_HEADS = 16  # of every released decoder; no tensor's shape shows the number of heads
CELL_INCHES, DPI = 1.5, 160  # 240 px a picture: a 224 px image loses nothing
GAP, EDGE = 0.15, 0.1  # in cells: after each group of columns, around the picture
MOST_PIXELS = 2**16  # along one side, matplotlib's limit


class Reconstruction(NamedTuple):
    """Images [B, 3, H, W], normalised as the model's input. masked: hidden patches at 0, the mean colour. prediction:
    every patch as predicted. pasted: the predicted patches where hidden, the image where visible."""

    masked: Tensor
    prediction: Tensor
    pasted: Tensor


@torch.inference_mode()
def reconstruct(model: MaskedAutoencoder, images: Tensor, mask_ratio: float, seed: int = 0) -> Reconstruction:
    """The model's reconstruction of normalised images [B, 3, H, W] with mask_ratio of their patches hidden.

    A seed gives the same order of patches whatever the ratio: what is visible at 95 % is also visible at 75 %.
    Predictions of normalised pixels get back each patch's true mean and standard deviation. UserError for a model that
    predicts tokens without a picture.
    """
    patches = patchify(images, model.patch)
    noise = torch.rand(patches.shape[:2], generator=torch.Generator().manual_seed(seed))
    prediction, mask = model.predict(images, noise.to(images.device), mask_ratio)
    predicted = model.decoder_target.to_pixels(prediction.float(), patches)
    hidden = mask[:, :, None]
    pictures = (patches * (1 - hidden), predicted, patches * (1 - hidden) + predicted * hidden)
    return Reconstruction(*(unpatchify(p, model.patch, model.patch_embed.grid_size) for p in pictures))


def load_autoencoder(checkpoint: Checkpoint, norm_pix: bool = False) -> MaskedAutoencoder:
    """The autoencoder of a checkpoint that has a decoder. Width and depth come from the shapes; heads, target and mask
    tokens in the encoder from what the file says about itself, by default 16 heads, `norm_pix` and none.

    CheckpointError for a file without a decoder or with a missing tensor, for one that predicts the tokens of a
    tokenizer that is not in it, and if norm_pix contradicts the file.
    """
    decoder, path = checkpoint.decoder, checkpoint.path
    if "decoder_embed.weight" not in decoder:
        raise CheckpointError(
            f"{path} has no decoder: a picture needs a full checkpoint, such as mae_visualize_vit_large.pth "
            "or the mae.safetensors that mae_core.pretrain writes"
        )
    recorded = {"true": True, "false": False}.get(str(checkpoint.meta.get("norm_pix")).lower())
    if recorded is False and norm_pix:
        raise CheckpointError(f"{path} says that it predicts plain pixels: leave out --norm-pix")
    width = decoder["decoder_embed.weight"].shape[:1].numel()
    heads = int(checkpoint.meta.get("decoder_heads", OFFICIAL_HEADS))
    if not width or width % heads or width % 4:
        raise CheckpointError(
            f"{path}: its decoder is {width} wide, which must be divisible by 4 and by its {heads} heads"
        )
    build = partial(
        MaskedAutoencoder,
        checkpoint.arch,
        checkpoint.meta["image_size"],
        decoder_dim=width,
        decoder_depth=len({name.split(".")[1] for name in decoder if name.startswith("decoder_blocks.")}),
        decoder_heads=heads,
        norm_pix=norm_pix if recorded is None else recorded,
        target=saved_target(checkpoint),
        encoder_mask_tokens=checkpoint.meta.get("encoder_mask_tokens") is True,
    )
    state = {**checkpoint.encoder, **decoder}
    with torch.device("meta"):  # a width that the other tensors do not have must not cost memory
        wanted = {name: tensor.shape for name, tensor in build().state_dict().items()}
    check_shapes(path, state, wanted, "its decoder")
    model = build()
    model.load_state_dict(state)
    return model.eval()


def saved_target(checkpoint: Checkpoint) -> Target | None:
    """The target that is saved with the decoder; None for pixels."""
    tensors = {
        name.removeprefix("decoder_target."): tensor
        for name, tensor in checkpoint.decoder.items()
        if name.startswith("decoder_target.")
    }
    patch = ARCHS[checkpoint.arch].patch
    for rows in ("components", "tokenizer.centres"):
        if rows in tensors:
            count = tensors[rows].shape[:1].numel()
            wanted = {rows: (count, 3 * patch**2)} | ({"mean": (3 * patch**2,)} if rows == "components" else {})
            check_shapes(checkpoint.path, tensors, wanted, "its target")
            if rows == "components":
                return PCATarget(tensors["mean"], tensors["components"])
            return TokenTarget(KMeansTokenizer(patch, tensors[rows]), count)
    if checkpoint.meta.get("target") == "tokens":
        raise CheckpointError(f"{checkpoint.path} predicts tokens of a tokenizer without a decoder: no picture of them")
    return None


def load_images(files: Sequence[Path], size: int) -> Tensor:
    """Short side to `size` (bicubic), centre crop, normalised: [B, 3, size, size]. UserError for one unreadable."""
    transform = v2.Compose(
        [v2.Resize(size, interpolation=InterpolationMode.BICUBIC), v2.CenterCrop(size), v2.PILToTensor()]
    )
    images = []
    for file in files:
        if not file.is_file():  # a pipe would be waited for
            raise UserError(f"{file} is no regular file: take it out")
        try:
            images.append(transform(read_image(file)))
        except UNREADABLE as error:
            raise UserError(f"{file} cannot be read as an image ({error}): mend it or take it out") from None
    return normalize(torch.stack(images))


def cells(rows: int, columns: int, group: int) -> tuple[float, float]:
    """Width and height of a picture in cells, with 0.3 each for the titles and the note; UserError if it is too large
    for matplotlib."""
    wide, high = columns + GAP * ((columns - 1) // group) + 2 * EDGE, rows + 0.6 + 2 * EDGE
    if max(wide, high) * CELL_INCHES * DPI >= MOST_PIXELS:
        raise UserError(f"{rows} rows of {columns} pictures are too large for one: lower --limit or name fewer ratios")
    return wide, high


def draw(columns: Sequence[tuple[str, Tensor]], group: int, note: str, out: Path) -> None:
    """A picture file: one row an image, one titled column for each (title, normalised images), a gap after every
    `group` columns, the note below."""
    from matplotlib.figure import Figure  # late: the import takes a second, and reconstruct() needs none of it

    rows = len(columns[0][1])
    wide, high = cells(rows, len(columns), group)
    figure = Figure(figsize=(CELL_INCHES * wide, CELL_INCHES * high), dpi=DPI)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    for number, (title, images) in enumerate(columns):
        left = EDGE + number + GAP * (number // group)
        for row, image in enumerate(images.cpu()):
            bottom = EDGE + 0.3 + rows - 1 - row
            axes = figure.add_axes((left / wide, bottom / high, 0.97 / wide, 0.97 / high))
            pixels = ((image * std + mean).clamp(0, 1) * 255).round().byte()
            axes.imshow(pixels.permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set_axis_off()
            if row == 0:
                axes.set_title(title, fontsize=9, parse_math=False)  # a name may hold a $
    figure.text(0.5, (EDGE + 0.12) / high, note, ha="center", va="center", fontsize=8, wrap=True, parse_math=False)
    with named_if_refused(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary:
        figure.savefig(temporary, format="png")


def picture(
    models: Sequence[tuple[str, MaskedAutoencoder]],
    folder: Path,
    ratios: Sequence[float],
    out: Path,
    limit: int,
    seed: int,
) -> int:
    """Draw up to `limit` images, spread evenly over the folder's list, by every named model at every ratio, in three
    columns each; returns how many images. Models with the same patches get the same masks."""
    files = list_images(folder)
    count = min(limit, len(files))
    cells(count, 3 * len(models) * len(ratios) + 1, 3)  # before the work
    files = [files[i * len(files) // count] for i in range(count)]
    columns: list[tuple[str, Tensor]] = []
    for name, model in models:
        images = load_images(files, model.patch_embed.img_size[0])
        for ratio in ratios:
            titles = (f"{name}\n{100 * ratio:g} % masked", "reconstruction", "pasted on visible")
            columns += zip(titles, reconstruct(model, images, ratio, seed))
    columns.append(("original", images))
    note = "predictions of visible patches carry no loss"
    if normalised_pixels := [name for name, model in models if model.norm_pix]:
        note += f"; {', '.join(normalised_pixels)}: normalised pixels, shown with each patch's true mean and deviation"
    draw(columns, 3, note, out)
    return count


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=program("mae_core.reconstruct"), description="Draw images masked, reconstructed and as they are."
    )
    parser.add_argument("--ckpt", nargs="+", required=True, metavar="FILE", help="checkpoints with their decoders")
    parser.add_argument("--images", type=Path, required=True, help="folder of images at any depth")
    parser.add_argument("--mask-ratio", type=float, nargs="+", default=[0.75], metavar="R", help="default: 0.75")
    parser.add_argument("--out", type=named_path, required=True, help="the picture, a .png")
    parser.add_argument("--limit", type=int, default=8, help="images at most, spread over the folder (default: 8)")
    parser.add_argument("--seed", type=seed, default=0, help="decides the masks")
    parser.add_argument(
        "--norm-pix", action="store_true", help="they predict normalised pixels, where the file itself does not say so"
    )
    return answered(partial(run, parser.parse_args(argv)))


def run(args: argparse.Namespace) -> int:
    for ratio in args.mask_ratio:
        if not 0 < ratio < 1:
            raise UserError(f"--mask-ratio {ratio}: give the share of hidden patches, between 0 and 1")
    if args.limit < 1:
        raise UserError(f"--limit {args.limit}: give a positive number of images")
    if args.out.suffix.lower() != ".png":
        raise UserError(f"--out {args.out}: the picture is a PNG, name it so")
    if os.path.exists(args.out.parent) and not os.path.isdir(args.out.parent):
        raise UserError(f"--out {args.out}: {args.out.parent} is a file, give a folder")
    checkpoints = [read_checkpoint(path) for path in args.ckpt]
    models = [(printable(c.name, 40), load_autoencoder(c, args.norm_pix)) for c in checkpoints]
    count = picture(models, args.images, args.mask_ratio, args.out, args.limit, args.seed)
    print(f"{args.out}: {count} images at mask ratios {', '.join(map(str, args.mask_ratio))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
