"""Data sets that someone has damaged, one kind each: no number comes out, a sentence does."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.campaign.cases import Case, refused, require
from tests.campaign.files import DEEP
from tests.campaign.starts import call
from tests.campaign.tiny import DETECTOR, SEGMENTER, SUITE, TRAINING, World, pretraining
from transfer.data.imagenet import wnids

Change = Callable[[Path], None]  # of the data root


def change_js(file: str, change: Callable[[dict], object]) -> Change:
    def apply(root: Path) -> None:
        path = root / file
        content = json.loads(path.read_text())
        changed = change(content)
        path.write_text(json.dumps(content if changed is None else changed))

    return apply


def damage_all(pattern: str, content: bytes) -> Change:
    def apply(root: Path) -> None:
        for path in root.glob(pattern):
            path.write_bytes(content)

    return apply


def remove(pattern: str) -> Change:
    def apply(root: Path) -> None:
        for path in root.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return apply


def rename(old: str, new: str) -> Change:
    return lambda root: (root / old).rename(root / new) and None


def both(*changes: Change) -> Change:
    def apply(root: Path) -> None:
        for change in changes:
            change(root)

    return apply


def pipe(pattern: str) -> Change:
    def apply(root: Path) -> None:
        path = next(root.glob(pattern))
        path.unlink()
        os.mkfifo(path)

    return apply


def write(file: str, content: str) -> Change:
    return lambda root: (root / file).write_text(content) and None


def make(file: str, content: str) -> Change:
    """Write a file of a set that the world does not have."""

    def apply(root: Path) -> None:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(content)

    return apply


def write_bytes(file: str, content: bytes) -> Change:
    return lambda root: (root / file).write_bytes(content)


def stranger(root: Path) -> None:
    """A class of imagenet/val that is none of ImageNet's."""
    (root / "imagenet" / "val" / wnids()[6]).rename(root / "imagenet" / "val" / "n99999999")


def huge_image(pattern: str) -> Change:
    """A PNG that says it is 60,000 x 60,000."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return damage_all(pattern, b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header + bytes(200))


TRAIN_JSON, VAL_JSON = (f"coco/annotations/instances_{split}2017.json" for split in ("train", "val"))
INAT = "inat2018/train2018.json"
PLACES = "places365/places365_train_standard.txt"
ADE = "ADEChallengeData2016"
V2, VTAB_LISTS = "imagenetv2-matched-frequency-format-val", ("train800", "val200", "train800val200", "test")
VOC, VOC_LIST = "VOCdevkit/VOC2012", "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"
DATA: dict[str, tuple[str, Change]] = {
    "no training images": ("imagenet_finetune", remove("imagenet/train/*")),
    "no validation split": ("imagenet_finetune", remove("imagenet/val")),
    "a class that is none of ImageNet's": ("imagenet_finetune", stranger),
    "validation images that are none": ("imagenet_finetune", damage_all("imagenet/val/*/*", b"<html>")),
    "training images that are none": ("imagenet_finetune", damage_all("imagenet/train/*/*", b"<html>")),
    "training images of no bytes": ("imagenet_knn", damage_all("imagenet/train/*/*", b"")),
    "a pipe among validation images": ("imagenet_finetune", pipe("imagenet/val/*/*")),
    "images of 60,000 x 60,000": ("imagenet_finetune", huge_image("imagenet/val/*/*")),
    "a corruption of ImageNet-C that is absent": ("imagenet_c", remove("imagenet-c/fog")),
    "COCO: no annotations": ("coco", remove(TRAIN_JSON)),
    "COCO: annotations cut": ("coco", write(TRAIN_JSON, '{"images": [{"id": 1')),
    "COCO: a nested json": ("coco", write(VAL_JSON, DEEP)),
    "COCO: a list": ("coco", write(VAL_JSON, "[]")),
    "COCO: no categories": ("coco", change_js(VAL_JSON, lambda c: c.update(categories=[]))),
    "COCO: ids that are text": (
        "coco",
        change_js(VAL_JSON, lambda c: [i.update(id=str(i["id"])) for i in c["images"]] and None),
    ),
    "COCO: ids that are lists": ("coco", change_js(TRAIN_JSON, lambda c: c["annotations"][0].update(category_id=[1]))),
    "COCO: a polygon that ends at infinity": (
        "coco",
        change_js(VAL_JSON, lambda c: c["annotations"][0].update(segmentation=[[0, 0, 9e99, 0, 5, 5]])),
    ),
    "COCO: run lengths below 0": (
        "coco",
        change_js(
            VAL_JSON, lambda c: c["annotations"][0].update(iscrowd=1, segmentation={"counts": [-1], "size": [48, 64]})
        ),
    ),
    "COCO: images that are absent": ("coco", remove("coco/val2017/*.jpg")),
    "COCO: a pipe": ("coco", pipe("coco/val2017/*.jpg")),
    "ADE20K: no labels": ("ade20k", remove(f"{ADE}/annotations/training/*")),
    "ADE20K: labels of another size": ("ade20k", damage_all(f"{ADE}/annotations/validation/*", b"\x89PNG")),
    "ADE20K: a pipe": ("ade20k", pipe(f"{ADE}/images/validation/*")),
    "iNaturalist: json cut": ("inat2018", write(INAT, "{")),
    "iNaturalist: a label of 2.7": ("inat2018", change_js(INAT, lambda c: c["annotations"][0].update(category_id=2.7))),
    "iNaturalist: images outside": (
        "inat2018",
        change_js(INAT, lambda c: c["images"][0].update(file_name="../../x.jpg")),
    ),
    "iNaturalist: a label of 10^6": (
        "inat2018",
        change_js(INAT, lambda c: c["annotations"][0].update(category_id=10**6)),
    ),
    "iNaturalist: an image twice": (
        "inat2018",
        change_js(INAT, lambda c: c["annotations"].append(c["annotations"][0])),
    ),
    "Places: a list that leads outside": ("places365", write(PLACES, "/../../../etc/passwd 3\n")),
    "Places: a label of 5,000 digits": ("places365", write(PLACES, f"/a/airfield/1.jpg {'9' * 5000}\n")),
    "Places: a line without a label": ("places365", write(PLACES, "/a/airfield/1.jpg\n")),
    "Places: an empty list": ("places365", write(PLACES, "")),
    "VOC: a list of images that are absent": ("voc_linear", write(VOC_LIST, "2012_000001\n")),
    "VOC: a list of bytes": ("voc_linear", write_bytes(VOC_LIST, b"\xff\xfe\x00")),
    "VOC: a list that leads outside": ("voc_linear", write(VOC_LIST, "../../../x\n")),
    "VOC: an empty list": ("voc_linear", write(VOC_LIST, "")),
    "VOC: a pipe": ("voc_linear", pipe(f"{VOC}/SegmentationClass/*val*")),
    "VOC: labels that are none": ("voc_linear", damage_all(f"{VOC}/SegmentationClass/*", b"\x89PNG")),
    "NYU: a list that leads outside": ("nyu_linear", write("nyu/nyu_train.txt", "../../x.jpg y.png 518.8579\n")),
    "NYU: a line of one word": ("nyu_linear", write("nyu/nyu_test.txt", "x.jpg\n")),
    "NYU: depths that are none": ("nyu_linear", damage_all("nyu/test/*.png", b"<html>")),
    "NYU: a pipe": ("nyu_linear", pipe("nyu/test/*.png")),
    "NYU: images of 60,000 x 60,000": ("nyu_linear", huge_image("nyu/test/*.jpg")),
    "few labels: a list of images that are absent": (
        "imagenet_logreg_1pct",
        make("imagenet_subsets/1percent.txt", "n01440764_99999.JPEG\n"),
    ),
    "few labels: a list of bytes": ("imagenet_logreg_1pct", make("imagenet_subsets/1percent.txt", "\0\n")),
    "few labels: an empty list": ("imagenet_logreg_1pct", make("imagenet_subsets/1percent.txt", "")),
    "VTAB: lists that lead outside": (
        "vtab_dtd",
        both(*(make(f"vtab-1k/dtd/{name}.txt", "../../../x.jpg 0\n") for name in VTAB_LISTS)),
    ),
    "VTAB: a label of 10^6": (
        "vtab_dtd",
        both(*(make(f"vtab-1k/dtd/{name}.txt", "images/x.jpg 1000000\n") for name in VTAB_LISTS)),
    ),
    "ImageNet-V2: a class that is none": ("imagenet_v2", make(f"{V2}/1000/x.jpeg", "x")),
    "ObjectNet: a class that is none": ("objectnet", make("objectnet-1.0/images/x/x.png", "x")),
    "ReaL: a nested json": ("imagenet_real", make("imagenet-real/real.json", DEEP)),
    "iNaturalist 2021: json cut": (
        "inat2021",
        both(make("inat2021/train.json", "{"), make("inat2021/val.json", "{")),
    ),
    "a folder: no classes": ("folder", remove("flowers/*/*")),
    "a folder: no val": ("folder", remove("flowers/val")),
}
FAMILY = {
    "coco": ("detection", DETECTOR),
    "ade20k": ("segmentation", SEGMENTER),
    "imagenet_knn": ("frozen", ()),
    "imagenet_logreg_1pct": ("frozen", ()),
    "voc_linear": ("frozen", ("batch=2", "iterations=2", "warmup_iterations=1")),
    "nyu_linear": ("frozen", ("batch=2", "iterations=2", "warmup_iterations=1")),
}


def copy_of(world: World, work: Path, wanted: str) -> Path:
    """The data in a folder that may be changed: links, but for the sets whose name begins so."""
    root = work / "data"
    root.mkdir()
    for path in world.data.iterdir():
        if path.name.startswith(wanted):
            shutil.copytree(path, root / path.name, symlinks=True)
        else:
            (root / path.name).symlink_to(path)
    return root


EVALUATED = ("imagenet_c", "imagenet_v2", "imagenet_real", "objectnet")
SETS = {
    "coco": "coco",
    "ade20k": ADE,
    "inat2018": "inat",
    "places365": "places",
    "folder": "flowers",
    "imagenet_c": "imagenet",
    "voc_linear": "VOCdevkit",
    "nyu_linear": "nyu",
}


def try_data(world: World, task: str, change: Change, work: Path) -> None:
    """By the script of the task itself; the numbers that it has made must be gone or failed."""
    root = copy_of(world, work, SETS.get(task, "imagenet"))
    change(root)
    family, knobs = FAMILY.get(task, ("classification", TRAINING))
    name = f"folder:{root}/flowers" if task == "folder" else task
    command = ["-m", f"transfer.{family}", "--task", name, "--ckpt", world.ckpt, "--data", root, *SUITE]
    command += ["--engine", "torchvision"] if task == "coco" else []
    command += ["--set", *knobs] if knobs and task not in EVALUATED else []
    done = call(command, work, 100)
    refused(done, work)
    records = [json.loads(path.read_text()) for path in work.glob("out/runs/**/record.json")]
    require(all(record["status"] != "ok" and record["reason"] for record in records), "a number came out", done)


def unlabelled(change: Change) -> Callable[[World, Path], None]:
    """Pre-training on changed images."""

    def run(world: World, work: Path) -> None:
        root = copy_of(world, work, "unlabelled")
        change(root)
        command = pretraining(World(root, world.ckpt, world.work), epochs=2)
        refused(call(command, work, 100), work)

    return run


PRETRAINING = {
    "pre-training: no images": unlabelled(remove("unlabelled/*")),
    "pre-training: images that are none": unlabelled(damage_all("unlabelled/*", b"<html>")),
    "pre-training: a tar cut": unlabelled(both(remove("unlabelled/*"), write("unlabelled/a.tar", "x" * 700))),
    "pre-training: fewer than a batch": unlabelled(remove("unlabelled/0[0-4]*")),
}


def cases(world: World) -> list[Case]:
    found = [
        Case("bad input: data", name, partial(try_data, world, task, change), small=number % 8 == 0)
        for number, (name, (task, change)) in enumerate(DATA.items())
    ]
    return found + [Case("bad input: data", name, partial(run, world)) for name, run in PRETRAINING.items()]
