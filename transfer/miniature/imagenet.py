"""The miniature of ImageNet and its shifted test sets, in their official layouts.

    DIR/imagenet/{train,val}/WNID/*.JPEG       DIR/imagenet-a/WNID/*.jpg       DIR/imagenet-sketch/WNID/*.JPEG
    DIR/imagenet-c/CORRUPTION/SEVERITY/WNID/*.JPEG       DIR/imagenet-r/WNID/*.jpg
    DIR/imagenetv2-matched-frequency-format-val/CLASS/*.jpeg       DIR/imagenet-real/real.json
    DIR/imagenet_subsets/*percent.txt       DIR/imagenet_subsets{1,2,3}/*imgs_class.txt

Images are 48 px. The 16 classes are shapes (scenes.py) under real WNIDs, so that the class lists of ImageNet-1K, -A and
-R apply unchanged; a WNID's real meaning plays no part.
"""

import io
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from mae_core.vit import get_arch
from transfer.data.imagenet import wnids
from transfer.data.imagenet_shifts import CORRUPTIONS, SEVERITIES
from transfer.data.objectnet import BORDER
from transfer.data.objectnet import OBJECTS as OBJECTNET
from transfer.miniature import scenes
from transfer.miniature.writer import Files, jpeg, rng_of, write_set

# Images per class.
TRAIN, VAL, HARD, RENDITION, SKETCH, V2, OBJECTS = 50, 100, 40, 40, 40, 10, 10
# ImageNet-C has the first images of each class of val.
CORRUPTED = 4


def class_wnids() -> dict[str, str]:
    """Shape class -> WNID. The sorted classes get the first of the sorted WNIDs that ImageNet-A and ImageNet-R share
    (timm has their lists), so that one set of classes serves every dataset."""

    def listed(name: str) -> set[str]:
        return set((resources.files("timm.data") / "_info" / name).read_text().split())

    shared = sorted(listed("imagenet_a_synsets.txt") & listed("imagenet_r_synsets.txt"))
    return dict(zip(scenes.CLASSES, shared))


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


def _sketch_files(seed: int) -> Files:
    for wnid, label, index in _labelled(SKETCH):
        rng = rng_of(seed, "imagenet-sketch", label, index)
        drawing = scenes.line_drawing(scenes.plain_scene(scenes.CLASSES[label], rng), rng)
        yield f"{wnid}/sketch_{index}.JPEG", jpeg(drawing)


def _imagenet_c_files(seed: int) -> Files:
    from transfer.miniature.corruptions import corrupt  # late: it imports scipy

    for wnid, label, index in _labelled(CORRUPTED):
        # As published: the decoded val image is corrupted, then saved at quality 85.
        clean = np.asarray(Image.open(io.BytesIO(jpeg(_photograph(seed, "val", label, index)))))
        for name in CORRUPTIONS:
            for severity in SEVERITIES:
                rng = rng_of(seed, f"imagenet-c/{name}", label, index)
                image = corrupt(clean, name, severity, rng)
                yield f"{name}/{severity}/{wnid}/{_val_name(label, index)}", jpeg(image, quality=85)


def _v2_files(seed: int) -> Files:
    for wnid, label, index in _labelled(V2):
        yield f"{wnids().index(wnid)}/{label:02d}{index:06d}.jpeg", jpeg(_photograph(seed, "v2", label, index))


def _real_files() -> Files:
    """Of every ten validation images, one has no label and two have that of another class too."""
    classes = [wnids().index(wnid) for wnid in class_wnids().values()]
    labels = []
    for _, label, index in _labelled(VAL):
        other = classes[(label + 1) % len(classes)]
        labels.append([] if index % 10 == 0 else [other, classes[label]] if index % 5 == 1 else [classes[label]])
    yield "real.json", json.dumps(labels).encode()


def _list_files(seed: int, split: int, names: dict[str, int]) -> Files:
    """Lists of so many images of each class: the first of an order that the split draws."""
    order = {
        wnid: rng_of(seed, f"lists/{split}", label, 0).permutation(TRAIN)
        for label, wnid in enumerate(class_wnids().values())
    }
    for name, count in names.items():
        lines = [f"{wnid}_{index}.JPEG\n" for wnid, indices in order.items() for index in indices[:count]]
        yield f"{name}.txt", "".join(lines).encode()


def _objectnet_files(seed: int) -> Files:
    for label, name in enumerate(list(OBJECTNET)[:: len(OBJECTNET) // 4]):
        for index in range(OBJECTS):
            image = Image.fromarray(_photograph(seed, "objectnet", label, index))
            file = io.BytesIO()
            ImageOps.expand(image, BORDER, (255, 0, 0)).save(file, "PNG")
            yield f"images/{name}/{index:08d}.png", file.getvalue()


def imagenet(root: Path, seed: int = 0) -> Path:
    """Write root/imagenet with train (50 images per class) and val (100 per class). Returns that folder; what already
    lies there is treated as by `write_set`."""
    counts = {"train": TRAIN * len(scenes.CLASSES), "val": VAL * len(scenes.CLASSES)}
    return write_set(root, "imagenet", seed, counts, _imagenet_files(seed))


def imagenet_a(root: Path, seed: int = 0) -> Path:
    """Write root/imagenet-a: smaller, partly covered objects among clutter, 40 per class."""
    return write_set(root, "imagenet-a", seed, {"test": HARD * len(scenes.CLASSES)}, _imagenet_a_files(seed))


def imagenet_r(root: Path, seed: int = 0) -> Path:
    """Write root/imagenet-r: renditions in the five `scenes.STYLES`, 40 per class."""
    return write_set(root, "imagenet-r", seed, {"test": RENDITION * len(scenes.CLASSES)}, _imagenet_r_files(seed))


def imagenet_sketch(root: Path, seed: int = 0) -> Path:
    """Write root/imagenet-sketch: shaded drawings without colour, 40 per class. The two disc classes look the same
    here: they differ only by colour."""
    return write_set(root, "imagenet-sketch", seed, {"test": SKETCH * len(scenes.CLASSES)}, _sketch_files(seed))


def imagenet_c(root: Path, seed: int = 0) -> Path:
    """Write root/imagenet-c: the first 4 val images of each class under 15 corruptions at severities 1 to 5."""
    count = CORRUPTED * len(scenes.CLASSES) * len(CORRUPTIONS) * len(SEVERITIES)
    return write_set(root, "imagenet-c", seed, {"test": count}, _imagenet_c_files(seed))


def imagenet_v2(root: Path, seed: int = 0) -> Path:
    """Write root/imagenetv2-matched-frequency-format-val: more images as those of val, 10 per class."""
    count = V2 * len(scenes.CLASSES)
    return write_set(root, "imagenetv2-matched-frequency-format-val", seed, {"test": count}, _v2_files(seed))


def imagenet_real(root: Path, seed: int = 0) -> Path:
    """Write root/imagenet-real/real.json, other labels of the validation images, and those."""
    imagenet(root, seed)
    return write_set(root, "imagenet-real", seed, {"lists": 1}, _real_files())


def objectnet(root: Path, seed: int = 0) -> Path:
    """Write root/objectnet-1.0: five of its objects, 10 images of each with its red border. None of them is among the
    miniature's classes: it shows that the set is read, and no classifier can be right."""
    return write_set(root, "objectnet-1.0", seed, {"test": OBJECTS * 5}, _objectnet_files(seed))


def imagenet_lists(root: Path, seed: int = 0) -> Path:
    """Write root/imagenet_subsets and root/imagenet_subsets{1,2,3}, lists of a few of the training images, and those
    images: 16 and 80 (2 and 10 %), and three times 1, 2 and 5 of each class."""
    folder = imagenet(root, seed)
    write_set(root, "imagenet_subsets", seed, {"lists": 2}, _list_files(seed, 0, {"1percent": 1, "10percent": 5}))
    for split in (1, 2, 3):
        names = {f"{count}imgs_class": count for count in (1, 2, 5)}
        write_set(root, f"imagenet_subsets{split}", seed, {"lists": 3}, _list_files(seed, split, names))
    return folder


def miniature_size(arch: str) -> dict[str, Any]:
    """The miniature's 48 px, rounded down to a multiple of the patch size: even a ViT-L runs on two cores."""
    return {"image_size": 48 - 48 % get_arch(arch).patch}
