"""ImageNet's classes by WNID, the reader of its folders, and what a classifier's images go through."""

import hashlib
import math
import os
import pkgutil
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import auto_augment, create_transform
from torchvision.transforms import InterpolationMode, v2

from mae_core.data import EXTENSIONS, MEAN, STD, seed_for
from mae_core.settings import choose
from transfer.data.findings import some

VAL_NAME = "ILSVRC2012_val_"  # begins the names of the official validation images
Pixels = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std of the channels, as Checkpoint.pixels has them
IMAGENET_PIXELS = (MEAN, STD)


@cache
def wnids(which: str = "imagenet") -> tuple[str, ...]:
    """The WordNet ids of "imagenet" (1000, in label order), "imagenet_a" or "imagenet_r" (200 each); timm's lists."""
    return tuple(pkgutil.get_data("timm.data", f"_info/{which}_synsets.txt").decode().split())


@cache
def columns(which: str) -> tuple[int, ...]:
    """Which of the 1000 logits the 200 classes of "imagenet_a" or "imagenet_r" are, in WNID order."""
    place = {wnid: i for i, wnid in enumerate(wnids())}
    return tuple(place[wnid] for wnid in sorted(wnids(which)))


@dataclass(frozen=True)
class Split:
    """Image files and their ImageNet-1k labels (0..999), sorted by WNID and file name."""

    files: tuple[Path, ...]
    labels: tuple[int, ...]

    @property
    def classes(self) -> frozenset[int]:
        return frozenset(self.labels)

    def of_classes(self, kept: Iterable[int]) -> "Split":
        """Only the images whose label is among `kept`."""
        kept = frozenset(kept)
        pairs = [(f, c) for f, c in zip(self.files, self.labels) if c in kept]
        return Split(tuple(f for f, _ in pairs), tuple(c for _, c in pairs))

    def share(self, fraction: float, seed: int) -> "Split":
        """That share of the images, balanced over the classes as the 1 % and 10 % subsets of ImageNet are
        (tensorflow_datasets imagenet2012_subset): as many of each class, one more of the larger ones where that does
        not come out even, all of a class that has fewer; at least one of each. The seed draws which."""
        if fraction == 1:
            return self
        members: dict[int, list[int]] = {}
        for i, label in enumerate(self.labels):
            members.setdefault(label, []).append(i)
        left, kept = max(int(len(self.files) * fraction + 1e-9), len(members)), []
        rng = np.random.default_rng(seed_for(seed))
        for number, label in enumerate(sorted(members, key=lambda c: (len(members[c]), c))):
            wanted = min(len(members[label]), left // (len(members) - number))
            kept += rng.permutation(members[label])[:wanted].tolist()
            left -= wanted
        kept.sort()
        return Split(tuple(self.files[i] for i in kept), tuple(self.labels[i] for i in kept))


def read_split(folder: Path) -> tuple[Split, list[str]]:
    """The images of folder/WNID/*, and what is wrong with the folder (empty: nothing). One listing a folder.

    The label comes from the folder's name, never from its rank: a folder of ten classes still means 1000 logits. All
    usual extensions in any case and names with spaces are found.
    """
    place = {wnid: i for i, wnid in enumerate(wnids())}
    files: list[Path] = []
    labels: list[int] = []
    strange, broken, empty, loose, forks = [], [], [], [], 0
    with os.scandir(folder) as entries:
        entries = sorted(entries, key=lambda entry: entry.name)
    for entry in entries:
        if not entry.is_dir():  # which asks the disk for links alone
            (broken if entry.is_symlink() and entry.name in place else loose).append(entry.name)
        elif entry.name not in place:
            strange.append(entry.name)
        else:
            # Names, not paths: of a million files they are sorted in a tenth of the time.
            names = sorted(name for name in os.listdir(entry.path) if is_image(name))
            forks += sum(name.startswith("._") for name in names)
            files += map((folder / entry.name).joinpath, names)
            labels += [place[entry.name]] * len(names)
            if not names:
                empty.append(entry.name)
    problems = misplaced(folder, loose)
    if strange:
        problems.append(
            f"{folder} has folders that are no ImageNet class: {some(strange)}; rename each to the WNID of its class "
            "(n01440764 is the tench; LOC_synset_mapping.txt of the Kaggle release lists all), or move it away"
        )
    if broken:
        problems.append(f"{folder} has broken links for class folders: {some(broken)}; link them to where they lie")
    if empty:
        problems.append(f"{folder} has class folders without an image: {some(empty)}; fill or remove them")
    if forks:
        problems.append(
            f"{folder} has {forks} files of macOS (._NAME) that are no images; in there: find . -name '._*' -delete"
        )
    if not files and not problems:
        problems.append(f"{folder} has no class folder with images in it: unpack the archive there")
    return Split(tuple(files), tuple(labels)), problems


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def misplaced(folder: Path, names: list[str]) -> list[str]:
    """What is wrong with files beside the class folders: as the official archives unpack, there are some."""
    images = [name for name in names if is_image(name)]
    archives = [name for name in names if re.fullmatch(r"n\d{8}\.tar", name)]
    problems = []
    if images:
        how = "move each into the folder of its class"
        if images[0].startswith(VAL_NAME):
            how = (
                "the official archive is flat; valprep.sh of soumith/imagenetloader.torch, run in there, moves each "
                "image into its class and holds the mapping; or torchvision.datasets.ImageNet unpacks it again, with "
                "the mapping from ILSVRC2012_devkit_t12.tar.gz"
            )
        problems.append(f"{len(images)} images lie in {folder} itself, not in class folders named by WNID: {how}")
    if archives:
        how = "for f in n*.tar; do mkdir -p ${f%.tar} && tar -xf $f -C ${f%.tar} && rm $f; done"
        problems.append(f"{folder} has {len(archives)} archives of classes, packed still; in there: {how}")
    return problems


def fingerprint(root: Path, *splits: Split) -> str:
    """SHA-256 over the listing (paths below root and labels) of the splits."""
    digest = hashlib.sha256()
    above = os.path.join(root, "")  # cut off as text: of a million files, relative_to takes a third of the whole look
    for split in splits:
        for file, label in zip(split.files, split.labels):
            digest.update(f"{str(file).removeprefix(above)} {label}\n".encode(errors="surrogateescape"))
        digest.update(b"\n")
    return digest.hexdigest()


def posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """Keep that many bits of each channel; none leaves black.

    RandAugment asks for 0 bits where its random magnitude reaches 10. Pillow made that black when MAE was fine-tuned
    and refuses it since version 13.
    """
    return ImageOps.posterize(image, bits) if bits >= 1 else Image.new(image.mode, image.size)


auto_augment.NAME_TO_OP["PosterizeIncreasing"] = posterize


def train_transform(
    image_size: int, min_scale: float, rand_augment: str, pixels: Pixels = IMAGENET_PIXELS
) -> v2.Compose:
    """What fine-tuning augments with, on uint8 tensors: random resized crop (bicubic), flip, and timm's RandAugment,
    whose operations are Pillow's, on the crop. Random erasing follows normalisation, in train.py. rand_augment: timm's
    string, or "" for none. pixels: the mean fills what RandAugment shifts in."""
    crop = v2.RandomResizedCrop(image_size, scale=(min_scale, 1.0), interpolation=InterpolationMode.BICUBIC)
    steps: list[Callable] = [crop, v2.RandomHorizontalFlip()]
    if rand_augment:
        _, augment, _ = create_transform(
            image_size,
            is_training=True,
            color_jitter=None,
            auto_augment=rand_augment,
            interpolation="bicubic",
            mean=pixels[0],
            separate=True,
        )
        steps += [v2.ToPILImage(), augment, v2.PILToTensor()]
    return v2.Compose(steps)


class LoopFreeCrop(v2.RandomResizedCrop):
    """Random resized crop that takes its first draw, cut to the image where it is too large, instead of drawing again:
    what MAE's probe trains with, to match its TensorFlow original (official code, util/crop.py)."""

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


def probe_transform(image_size: int, min_scale: float) -> v2.Compose:
    """What the linear probe augments with, on uint8 tensors: loop-free random resized crop (bicubic) and flip."""
    crop = LoopFreeCrop(image_size, scale=(min_scale, 1.0), interpolation=InterpolationMode.BICUBIC)
    return v2.Compose([crop, v2.RandomHorizontalFlip()])


def eval_transform(image_size: int, how: str = "resize_crop") -> v2.Compose:
    """One view of an image for evaluation: a PIL image -> uint8 [3, image_size, image_size]. By Pillow, as the
    published numbers were made: torchvision's resize of tensors would change up to 0.4 % of the pixels, by 1 or 2.

    "resize_crop": short side to 256/224 of the size (to the size itself above 224 px), bicubic, then centre crop, as
    the official evaluation does. "center_crop": centre crop alone. "resize": short side to the size, bicubic, then
    centre crop; nothing at all for an image of that size. UserError for another name.
    """
    # int, not round: the official evaluation truncates (48 px: 54.86 -> 54).
    resized = {
        "resize_crop": int(image_size * 256 / 224) if image_size <= 224 else image_size,
        "center_crop": None,
        "resize": image_size,
    }
    short_side = choose("transform", how, resized)
    steps: list = [v2.CenterCrop(image_size), v2.PILToTensor()]
    if short_side is not None:
        steps.insert(0, v2.Resize(short_side, interpolation=InterpolationMode.BICUBIC))
    return v2.Compose(steps)
