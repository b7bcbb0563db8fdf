"""The miniature: small generated copies of the datasets in their official on-disk layouts, made in seconds.

    python -m transfer.miniature --out DIR [--seed 0] [--unlabelled 20000]

    DIR/imagenet/{train,val}/WNID/*.JPEG       DIR/imagenet-a/WNID/*.jpg       DIR/imagenet-sketch/WNID/*.JPEG
    DIR/imagenet-c/CORRUPTION/SEVERITY/WNID/*.JPEG       DIR/imagenet-r/WNID/*.jpg       DIR/unlabelled/*.JPEG
    DIR/coco/       DIR/ADEChallengeData2016/            (dense.py)

Images of ImageNet are 48 px; the 16 classes are shapes (scenes.py) that stand under real WNIDs, so that the
class lists of ImageNet-1K, -A and -R apply to them unchanged. A WNID's real meaning plays no part. It is a world for
trying things out: no number from it says anything about the real datasets.
"""

import argparse
import io
import json
import multiprocessing
import os
import shutil
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from importlib import resources
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image

from mae_core.errors import UserError
from transfer.miniature import scenes
from transfer.miniature.corruptions import CORRUPTIONS, SEVERITIES, corrupt

# Part of every marker file: to be raised by any change that alters an image or a file name.
VERSION = 1
MARKER = "miniature.json"

# Images per class.
TRAIN, VAL, HARD, RENDITION, SKETCH = 50, 100, 40, 40, 40
# ImageNet-C is made from the first images of each class of val.
CORRUPTED = 4

Files = Iterator[tuple[str, bytes]]


def class_wnids() -> dict[str, str]:
    """Shape class -> WNID: the classes in alphabetical order onto the first of the sorted WNIDs that ImageNet-A and
    ImageNet-R share (their lists are timm's), so that one set of classes serves every dataset."""

    def listed(name: str) -> set[str]:
        return set((resources.files("timm.data") / "_info" / name).read_text().split())

    shared = sorted(listed("imagenet_a_synsets.txt") & listed("imagenet_r_synsets.txt"))
    return dict(zip(scenes.CLASSES, shared))


def rng_of(seed: int, split: str, label: int, index: int) -> np.random.Generator:
    """The one source of randomness of an image. Different keys are different streams: no two splits share a scene."""
    return np.random.default_rng([seed, zlib.crc32(split.encode()), label, index])


def jpeg(image: np.ndarray, quality: int = 95) -> bytes:
    file = io.BytesIO()
    # Full colour resolution: at 48 px the usual halving of the colour channels blurs the outlines visibly.
    Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling=0)
    return file.getvalue()


def _photograph(seed: int, split: str, label: int, index: int) -> np.ndarray:
    rng = rng_of(seed, split, label, index)
    return scenes.photograph(scenes.plain_scene(scenes.CLASSES[label], rng), rng)


def _labelled(per_class: int) -> Iterator[tuple[str, int, int]]:
    """(wnid, label 0..15, index 0..per_class-1) of every image of a split."""
    for label, wnid in enumerate(class_wnids().values()):
        for index in range(per_class):
            yield wnid, label, index


def _val_name(label: int, index: int) -> str:
    return f"ILSVRC2012_val_{label * VAL + index + 1:08d}.JPEG"


def _imagenet_files(seed: int) -> Files:
    for wnid, label, index in _labelled(TRAIN):
        yield f"train/{wnid}/{wnid}_{index}.JPEG", jpeg(_photograph(seed, "train", label, index))
    for wnid, label, index in _labelled(VAL):
        yield f"val/{wnid}/{_val_name(label, index)}", jpeg(_photograph(seed, "val", label, index))


def _imagenet_a_files(seed: int) -> Files:
    for wnid, label, index in _labelled(HARD):
        rng = rng_of(seed, "imagenet-a", label, index)
        scene = scenes.hard_scene(scenes.CLASSES[label], rng)
        yield f"{wnid}/{wnid}_{index}.jpg", jpeg(scenes.photograph(scene, rng))


def _imagenet_r_files(seed: int) -> Files:
    for wnid, label, index in _labelled(RENDITION):
        rng = rng_of(seed, "imagenet-r", label, index)
        style = scenes.STYLES[index % len(scenes.STYLES)]
        image = scenes.rendition(scenes.plain_scene(scenes.CLASSES[label], rng), style, rng)
        yield f"{wnid}/{style}_{index}.jpg", jpeg(image)


def _imagenet_sketch_files(seed: int) -> Files:
    for wnid, label, index in _labelled(SKETCH):
        rng = rng_of(seed, "imagenet-sketch", label, index)
        drawing = scenes.line_drawing(scenes.plain_scene(scenes.CLASSES[label], rng), rng)
        yield f"{wnid}/sketch_{index}.JPEG", jpeg(drawing)


def _imagenet_c_files(seed: int) -> Files:
    for wnid, label, index in _labelled(CORRUPTED):
        # As published: the corruption is laid on the val image as it reads from its file, then saved at quality 85.
        clean = np.asarray(Image.open(io.BytesIO(jpeg(_photograph(seed, "val", label, index)))))
        for name in CORRUPTIONS:
            for severity in SEVERITIES:
                rng = rng_of(seed, f"imagenet-c/{name}", label, index)
                image = corrupt(clean, name, severity, rng)
                yield f"{name}/{severity}/{wnid}/{_val_name(label, index)}", jpeg(image, quality=85)


def _unlabelled_file(seed: int, index: int) -> tuple[str, bytes]:
    label = int(rng_of(seed, "unlabelled/class", 0, index).integers(len(scenes.CLASSES)))
    return f"{index:07d}.JPEG", jpeg(_photograph(seed, "unlabelled", label, index))


def _unlabelled_files(seed: int, count: int) -> Files:
    if count < 2000:
        yield from (_unlabelled_file(seed, index) for index in range(count))
        return
    # "spawn": a fork of a process in which torch runs threads may hang.
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        yield from pool.imap(partial(_unlabelled_file, seed), range(count), chunksize=250)


def _is_complete(folder: Path, marker: dict) -> bool:
    try:
        found = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return False
    files = sum(len(names) for _, _, names in os.walk(folder)) - 1
    return found == marker and files == sum(marker["counts"].values())


def write_set(root: Path, name: str, seed: int, counts: dict[str, int], files: Iterable[tuple[str, bytes]]) -> Path:
    """Write a dataset to root/name, whole or not at all; one that is already there, complete and the same, stays."""
    if seed < 0:
        raise UserError(f"the miniature's seed is {seed}; give one that is 0 or greater")
    root = Path(root)
    target, partial_copy, discarded = root / name, root / f".{name}.partial", root / f".{name}.discarded"
    marker = {"version": VERSION, "seed": seed, "counts": counts}
    # Asked before anything is written, so that a complete set may lie in a folder that cannot be written to.
    if _is_complete(target, marker):
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{name}.lock"):
            if _is_complete(target, marker):
                return target
            if target.exists() and not (target / MARKER).is_file():
                raise UserError(
                    f"{target} has no {MARKER}, so it is not a miniature and is left alone; choose another folder"
                )
            shutil.rmtree(partial_copy, ignore_errors=True)
            for path, content in files:
                file = partial_copy / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
            (partial_copy / MARKER).write_text(json.dumps(marker) + "\n")
            shutil.rmtree(discarded, ignore_errors=True)
            if target.exists():
                target.rename(discarded)
            partial_copy.rename(target)
            shutil.rmtree(discarded, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write the miniature {target} ({error.strerror}); choose another folder") from None
    return target


def imagenet(root: Path, seed: int = 0) -> Path:
    """Write root/imagenet with train (50 images a class) and val (100 a class); returns that folder.

    Like its siblings: a complete set of the same version and seed is left alone, any other miniature there is replaced,
    and UserError is raised if the folder holds something else or cannot be made.
    """
    counts = {"train": TRAIN * len(scenes.CLASSES), "val": VAL * len(scenes.CLASSES)}
    return write_set(root, "imagenet", seed, counts, _imagenet_files(seed))


def imagenet_a(root: Path, seed: int = 0) -> Path:
    """Write root/imagenet-a: objects that are small, partly covered and among clutter, 40 a class."""
    return write_set(root, "imagenet-a", seed, {"test": HARD * len(scenes.CLASSES)}, _imagenet_a_files(seed))


def imagenet_r(root: Path, seed: int = 0) -> Path:
    """Write root/imagenet-r: renditions in the five styles of transfer/miniature/scenes.py, 40 a class."""
    return write_set(root, "imagenet-r", seed, {"test": RENDITION * len(scenes.CLASSES)}, _imagenet_r_files(seed))


def imagenet_sketch(root: Path, seed: int = 0) -> Path:
    """Write root/imagenet-sketch: line drawings without colour, 40 a class. The two classes that differ by colour alone
    look the same here."""
    return write_set(
        root, "imagenet-sketch", seed, {"test": SKETCH * len(scenes.CLASSES)}, _imagenet_sketch_files(seed)
    )


def imagenet_c(root: Path, seed: int = 0) -> Path:
    """Write root/imagenet-c: the first 4 val images of each class under 15 corruptions at severities 1 to 5."""
    count = CORRUPTED * len(scenes.CLASSES) * len(CORRUPTIONS) * len(SEVERITIES)
    return write_set(root, "imagenet-c", seed, {"test": count}, _imagenet_c_files(seed))


def unlabelled(root: Path, count: int = 20000, seed: int = 0) -> Path:
    """Write root/unlabelled: `count` images for pre-training, classes at random, as many processes as CPUs."""
    if count < 1:
        raise UserError(f"{count} unlabelled images were asked for; ask for at least 1")
    return write_set(root, "unlabelled", seed, {"train": count}, _unlabelled_files(seed, count))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m transfer.miniature", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the datasets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--unlabelled", type=int, default=0, metavar="N", help="also N unlabelled images (20000 is usual)"
    )
    args = parser.parse_args(arguments)
    from transfer.miniature import dense as miniature_dense  # late: it is built on this module

    makers = [imagenet, imagenet_a, imagenet_r, imagenet_sketch, imagenet_c]
    makers += [miniature_dense.coco, miniature_dense.ade20k]
    if args.unlabelled:
        makers.append(partial(unlabelled, count=args.unlabelled))
    try:
        for make in makers:
            start = time.perf_counter()
            folder = make(args.out, seed=args.seed)
            counts = json.loads((folder / MARKER).read_text())["counts"]
            listed = ", ".join(f"{split} {count}" for split, count in counts.items())
            print(f"{folder}: {listed} images ({time.perf_counter() - start:.1f} s)", flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
