"""Crowded scenes of the miniature: several objects on a background of two or three regions, for dense tasks.

`crowded_scene` says what is where; `paint` draws it and says what every pixel shows, which gives masks and boxes.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from transfer.miniature.scenes import (
    CLUTTER,
    RGB,
    SUPERSAMPLE,
    PlacedObject,
    contrasting_colour,
    object_colour,
    outline,
    rgb,
)

# (width, height) in px, in turn.
SIZES = ((52, 52), (56, 42), (42, 56), (60, 48), (48, 60), (64, 48), (48, 64), (56, 56))
# The classes of scenes.py that only their shape tells apart.
KINDS = ("cross", "heart", "moon", "square", "star", "triangle")
# Kinds of background: a wall fills the picture, or the sky is above the ground. Only that tells them apart: colours are
# arbitrary.
STUFF = ("ground", "sky", "wall")


@dataclass(frozen=True)
class Region:
    """A part of the background: kind (of STUFF), colour, corners (x, y) in px."""

    kind: str
    colour: RGB
    corners: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class CrowdedScene:
    """A picture of width x height px: regions, then objects, in painting order.

    crowd: how many of the first objects are small, alike and close together, which COCO annotates as one crowd.
    """

    width: int
    height: int
    regions: tuple[Region, ...]
    objects: tuple[PlacedObject, ...] = ()
    crowd: int = 0

    @property
    def parts(self) -> tuple[Region | PlacedObject, ...]:
        return (*self.regions, *self.objects)


def crowded_scene(width: int, height: int, rng: np.random.Generator) -> CrowdedScene:
    """A wall, or sky over ground; one object or two of radius 12 to 21 px,
    and pebbles; sometimes a crowd.

    At least 60 % of every object outside the crowd is visible, and the visible part has no hole: polygons describe it.
    """
    regions = _regions(width, height, rng)
    crowd = _crowd(width, height, regions, rng) if rng.random() < 0.1 else ()
    scene = CrowdedScene(width, height, regions, crowd, len(crowd))
    wanted = len(crowd) + 1 + int(rng.random() < 0.15)
    for _ in range(20):
        radius = min(12 * 1.75 ** rng.random(), 0.45 * min(width, height))
        scene = _with_object(scene, str(rng.choice(KINDS)), radius, rng)
        if len(scene.objects) == wanted:
            break
    for _ in range(int(rng.integers(0, 4))):
        scene = _with_object(scene, "pebble", rng.uniform(2, 4), rng)
    return scene


def _with_object(scene: CrowdedScene, kind: str, radius: float, rng: np.random.Generator) -> CrowdedScene:
    """The scene with one more object on top, or unchanged if that would hide too much."""
    from scipy.ndimage import binary_fill_holes  # late: who only looks whether the data are there needs none of it

    larger = replace(scene, objects=(*scene.objects, _random_object(kind, radius, scene, rng)))
    first = len(scene.regions)
    before, after = owners(scene), owners(larger)
    # Only what the new object covers a part of can have changed.
    for index in (*np.unique(before[after != before]).tolist(), first + len(scene.objects)):
        if index < first + scene.crowd:
            continue
        alone = _covered(larger.objects[index - first], scene.width, scene.height)
        seen = after == index
        if seen.sum() < 0.6 * alone.sum() or (binary_fill_holes(seen) != seen).any():
            return scene
    return larger


def _regions(width: int, height: int, rng: np.random.Generator) -> tuple[Region, ...]:
    colour = contrasting_colour([], 0, rng)
    whole = (0, 0), (width, 0), (width, height), (0, height)
    if rng.random() < 0.6:
        return (Region("wall", colour, whole),)
    left, right = (height * rng.uniform(0.3, 0.7, 2)).tolist()
    below = (0, left), (width, right), (width, height), (0, height)
    return Region("sky", colour, whole), Region("ground", contrasting_colour([colour], 180, rng), below)


def _random_object(kind: str, radius: float, scene: CrowdedScene, rng: np.random.Generator) -> PlacedObject:
    """An object anywhere, at most slightly cut by the border, in a colour unlike all others if one is found."""
    low = 0.8 * radius
    centre = (float(rng.uniform(low, scene.width - low)), float(rng.uniform(low, scene.height - low)))
    others = [region.colour for region in scene.regions] + [thing.colour for thing in scene.objects]
    for _ in range(50):
        colour = rgb(rng.integers(60, 130, 3)) if kind in CLUTTER else object_colour(kind, rng)
        if all(np.abs(np.subtract(colour, other)).sum() >= 150 for other in others):
            break
    return PlacedObject(kind, centre, float(radius), float(rng.uniform(-0.3, 0.3)), colour)


def _crowd(width: int, height: int, regions: tuple[Region, ...], rng: np.random.Generator) -> tuple[PlacedObject, ...]:
    """Two rows of small objects of one class and colour."""
    kind, radius, columns = str(rng.choice(KINDS)), float(rng.uniform(3.5, 4.5)), int(rng.integers(3, 5))
    space = CrowdedScene(width - round(2.2 * radius * (columns - 1)), height - round(2.2 * radius), regions)
    corner = _random_object(kind, radius, space, rng)
    steps = [2.2 * radius * np.array((column, row)) for row in range(2) for column in range(columns)]
    places = [corner.centre + step + rng.uniform(-0.8, 0.8, 2) for step in steps]
    return tuple(replace(corner, centre=(float(x), float(y))) for x, y in places)


def paint(scene: CrowdedScene) -> tuple[np.ndarray, np.ndarray]:
    """The picture without noise, uint8 [height, width, 3], and its `owners`."""
    canvas = Image.new("RGB", (scene.width * SUPERSAMPLE, scene.height * SUPERSAMPLE))
    for part in scene.parts:
        ImageDraw.Draw(canvas).polygon(_polygon(part), fill=part.colour)
    picture = canvas.resize((scene.width, scene.height), Image.Resampling.BOX)
    return np.asarray(picture), owners(scene)


def owners(scene: CrowdedScene) -> np.ndarray:
    """What each pixel shows, uint8 [height, width]: an index into regions followed by objects."""
    owner = np.zeros((scene.height, scene.width), np.uint8)
    for index, part in enumerate(scene.parts):
        owner[_covered(part, scene.width, scene.height)] = index
    return owner


@lru_cache(64)  # while a scene grows, what is there is asked for again and again
def _covered(part: Region | PlacedObject, width: int, height: int) -> np.ndarray:
    """The pixels [height, width] whose centre the region or the object covers."""
    canvas = Image.new("1", (width * SUPERSAMPLE, height * SUPERSAMPLE))
    ImageDraw.Draw(canvas).polygon(_polygon(part), fill=1)
    centres = slice(SUPERSAMPLE // 2, None, SUPERSAMPLE)
    return np.asarray(canvas)[centres, centres]


def _polygon(part: Region | PlacedObject) -> list[tuple[float, float]]:
    """Corners (x, y) on the supersampled canvas."""
    corners = np.array(part.corners) if isinstance(part, Region) else outline(part)
    return [(float(x), float(y)) for x, y in corners * SUPERSAMPLE]
