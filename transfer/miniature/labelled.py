"""The miniature of iNaturalist and Places in their official layouts, 48 px.

    DIR/inat2017/{train2017.json, val2017.json, train_val_images/SUPERCATEGORY/CATEGORY/*.jpg}
    DIR/inat20{18,19}/{train,val}YEAR.json, train_valYEAR/SUPERCATEGORY/ID/*.jpg
    DIR/inat2021/{train.json, val.json, {train,val}/SPECIES/*.jpg}
    DIR/places205/trainvalsplit_places205/{train,val}_places205.csv, .../images256/...
    DIR/places365/{places365_train_standard.txt, places365_val.txt, data_256_standard, val_256}

iNaturalist's classes are fine-grained and long-tailed: four shapes, each filled in four ways, with 100 to 20 images.
Places' classes are backgrounds, with an arbitrary object in front. A class's real meaning plays no part.
"""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from transfer.data.labelled import annotation_file
from transfer.miniature import scenes
from transfer.miniature.scenes import SIZE, SUPERSAMPLE
from transfer.miniature.writer import Files, jpeg, rng_of, write_set

SHAPES = {"Aves": "moon", "Fungi": "square", "Insecta": "star", "Plantae": "heart"}  # supercategory -> shape
FILLS = ("plain", "rows", "columns", "squares")
# Training images of the most and the least frequent class (long-tailed, as in iNaturalist); validation images of each.
MOST, LEAST, VAL = 100, 20, 20
# Ids with gaps, as in a subset of the official classes.
INAT_IDS = tuple(range(3, 3 + 16 * 60, 60))
PLACES = {
    "a/airfield": 0, "a/airport_terminal": 2, "b/boathouse": 59, "c/childs_room": 89, "f/field/wild": 141,
    "f/football_field": 149, "j/junkyard": 199, "k/kitchen": 203, "o/orchard": 249, "z/zen_garden": 364,
}  # fmt: skip
PLACES_205 = {name: rank * 20 for rank, name in enumerate(PLACES)}
PLACES_TRAIN, PLACES_VAL = 30, 16


def draw_filled(shape: str, fill: str, rng: np.random.Generator) -> np.ndarray:
    """A plain scene whose object is filled in one of FILLS: uint8 [SIZE, SIZE, 3]."""
    scene = scenes.plain_scene(shape, rng)
    thing = replace(scene.objects[0], rotation=scene.objects[0].rotation / 2)
    image = scenes.render(replace(scene, objects=(thing,)))
    inside = Image.new("L", (SIZE * SUPERSAMPLE,) * 2)
    ImageDraw.Draw(inside).polygon(scenes.corners(thing), fill=255)
    mask = scenes.shrunk(inside, SIZE)[:, :, None] / 255
    rows, columns = np.indices((SIZE, SIZE))
    period, start = 8, int(rng.integers(8))
    across, along = (rows + start) % period < 4, (columns + start) % period < 4
    drawn = {"plain": np.zeros_like(across), "rows": across, "columns": along, "squares": across ^ along}[fill]
    dark = np.where(drawn[:, :, None], 0.35, 1.0)
    return scenes.with_noise(image * (1 - mask) + image * dark * mask, rng)


def draw_place(kind: int, rng: np.random.Generator) -> np.ndarray:
    """Background number `kind` (0..9) with an arbitrary object in front: uint8 [SIZE, SIZE, 3]. Kinds differ by their
    layout; colours are arbitrary."""
    y, x = np.indices((SIZE, SIZE)) / SIZE
    shift = rng.uniform(-0.06, 0.06)
    layouts = (
        lambda: y > 0.3 + shift,  # low horizon
        lambda: y > 0.7 + shift,
        lambda: abs(x - 0.5) < 0.25 + shift,  # a door
        lambda: (y * 6 + shift) % 2 < 1,  # steps
        lambda: (x * 6 + shift) % 2 < 1,  # columns
        lambda: ((x * 4).astype(int) + (y * 4).astype(int)) % 2 == 0,  # tiles
        lambda: np.hypot(x - 0.5, y - 0.5) < 0.4 + shift,  # a dome
        lambda: y > 0.5 + 0.3 * abs(2 * x - 1) + shift,  # a valley
        lambda: y > 0.75 - 0.5 * (1 - abs(2 * x - 1)) + shift,  # a hill
        lambda: (abs(x - 0.5) > 0.3 + shift) | (abs(y - 0.5) > 0.3 + shift),  # a frame
    )
    first = scenes.contrasting_colour([], 0, rng)
    second = scenes.contrasting_colour([first], 240, rng)
    image = np.where(layouts[kind]()[:, :, None], np.array(first), np.array(second)).astype(np.uint8)
    thing = scenes.plain_scene(str(rng.choice(scenes.CLASSES)), rng).objects[0]
    centre = tuple(rng.uniform(0.25, 0.75, 2) * SIZE)
    thing = replace(thing, centre=centre, radius=thing.radius * 0.4)
    canvas = Image.fromarray(image).resize((SIZE * SUPERSAMPLE,) * 2, Image.Resampling.NEAREST)
    ImageDraw.Draw(canvas).polygon(scenes.corners(thing), fill=thing.colour)
    return scenes.with_noise(scenes.shrunk(canvas, SIZE), rng)


def long_tail() -> list[int]:
    """Numbers of training images of the 16 classes: geometric from MOST to LEAST."""
    ranks = np.linspace(0, 1, len(INAT_IDS))
    return [round(MOST * math.exp(rank * math.log(LEAST / MOST))) for rank in ranks]


def inat_classes() -> list[tuple[int, str, str, str]]:
    """(id, supercategory, shape, fill), most frequent first; neighbours have different shapes."""
    pairs = [(group, shape, fill) for fill in FILLS for group, shape in SHAPES.items()]
    return [(i, *pair) for i, pair in zip(INAT_IDS, pairs)]


def _inat_files(seed: int, year: int) -> Files:
    images_folder = "train_val_images" if year == 2017 else f"train_val{year}"
    number = 0
    for split, per_class in (("train", long_tail()), ("val", [VAL] * len(INAT_IDS))):
        images, annotations, categories = [], [], []
        for (class_id, group, shape, fill), count in zip(inat_classes(), per_class):
            name = f"{shape.capitalize()} {fill}" if year == 2017 else str(class_id)
            place = f"{images_folder}/{group}/{name}"
            if year == 2021:  # a number and the seven ranks
                name = f"{shape.capitalize()} {fill}"
                place = f"{split}/{class_id:05d}_Animalia_Chordata_{group}_Ordo_Familia_{name.replace(' ', '_')}"
            categories.append({"id": class_id, "name": name, "supercategory": group})
            if year == 2019:
                del categories[-1]["supercategory"]
            for index in range(count):
                number += 1
                file = f"{place}/{number:08x}.jpg"
                images.append({"id": number, "file_name": file, "width": SIZE, "height": SIZE})
                annotations.append({"id": number, "image_id": number, "category_id": class_id})
                yield file, jpeg(draw_filled(shape, fill, rng_of(seed, f"inat{year}/{split}", class_id, index)))
        content = {"info": {}, "images": images, "categories": categories, "annotations": annotations, "licenses": []}
        yield annotation_file(split, year), json.dumps(content).encode()


def _places_files(seed: int, which: int) -> Files:
    root = "data/vision/torralba/deeplearning/images256" if which == 205 else "data_256_standard"
    labels = PLACES_205 if which == 205 else PLACES
    lists: dict[str, list[str]] = {"train": [], "val": []}
    for split, per_class in (("train", PLACES_TRAIN), ("val", PLACES_VAL)):
        for kind, (name, label) in enumerate(labels.items()):
            for index in range(per_class):
                file = f"{name}/{split}_{index:08d}.jpg" if which == 205 else f"/{name}/{index:08d}.jpg"
                where = root
                if which == 365 and split == "val":  # flat, in an order unrelated to the classes
                    file, where = f"Places365_val_{index * len(labels) + kind + 1:08d}.jpg", "val_256"
                lists[split].append(f"{file} {label}")
                image = draw_place(kind, rng_of(seed, f"places{which}/{split}", label, index))
                yield f"{where}/{file.lstrip('/')}", jpeg(image)
    names = {"train": "places365_train_standard.txt", "val": "places365_val.txt"}
    if which == 205:
        names = {split: f"trainvalsplit_places205/{split}_places205.csv" for split in lists}
    for split, lines in lists.items():
        yield names[split], ("\n".join(sorted(lines)) + "\n").encode()


def inaturalist(root: Path, seed: int = 0, year: int = 2018) -> Path:
    """Write root/inatYEAR. Returns that folder; what already lies there is treated as by `write_set`."""
    counts = {"train": sum(long_tail()), "val": VAL * len(INAT_IDS), "annotation files": 2}
    return write_set(root, f"inat{year}", seed, counts, _inat_files(seed, year))


def places(root: Path, seed: int = 0, which: int = 365) -> Path:
    """Write root/places205 or root/places365; otherwise as `inaturalist`."""
    counts = {"train": PLACES_TRAIN * len(PLACES), "val": PLACES_VAL * len(PLACES), "lists": 2}
    return write_set(root, f"places{which}", seed, counts, _places_files(seed, which))


MAKERS = {f"inat{year}": partial(inaturalist, year=year) for year in (2017, 2018, 2019, 2021)}
MAKERS |= {f"places{which}": partial(places, which=which) for which in (205, 365)}
