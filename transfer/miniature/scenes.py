"""Scenes of the miniature: flat shapes on nearly flat backgrounds, so that the objects explain the pixels.

A `Scene` says what is where; `outline` gives each object's polygon in pixels, from which masks and boxes follow;
`render`, `photograph`, `rendition` and `line_drawing` draw it. Images are uint8 [size, size, 3].
"""

import colorsys
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE = 48
SUPERSAMPLE = 4

RGB = tuple[int, int, int]
Points = list[tuple[float, float]]


def rgb(values: Iterable[float]) -> RGB:
    red, green, blue = (int(value) for value in values)
    return red, green, blue


def _spokes(count: int, inner: float = 1.0) -> Points:
    """Corners on the unit circle, the first at the top; with inner < 1 a star whose odd corners lie on that radius."""
    angles = [2 * math.pi * i / count - math.pi / 2 for i in range(count)]
    radii = [1.0 if i % 2 == 0 else inner for i in range(count)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles)]


def _arc(radius: float, start: float, stop: float, centre_x: float = 0.0) -> Points:
    return [(centre_x + radius * math.cos(a), radius * math.sin(a)) for a in np.linspace(start, stop, 24)]


def _turned(points: Points, radians: float) -> Points:
    c, s = math.cos(radians), math.sin(radians)
    return [(c * x - s * y, s * x + c * y) for x, y in points]


_BAR: Points = [(-1, -0.24), (1, -0.24), (1, 0.24), (-1, 0.24)]
_HEART: Points = [
    (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16)
    for t in np.linspace(0, 2 * math.pi, 40, endpoint=False)
]

# Outlines in units of the object's radius, x to the right, y down. None is the mirror image of another, because
# training flips images. Discs differ by colour and bars by direction, which a network learns first, even from random
# weights; the other eleven differ only by shape.
OUTLINES: dict[str, Points] = {
    "arrow": [(-1, -0.28), (0.1, -0.28), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.28), (-1, 0.28)],
    "bar_lying": _BAR,
    "bar_slanted": _turned(_BAR, math.pi / 4),
    "bar_standing": _turned(_BAR, math.pi / 2),
    "cross": [
        (-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3),
        (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3),
    ],
    "disc_blue": _spokes(32),
    "disc_red": _spokes(32),
    "ell": [(-0.7, -1), (-0.1, -1), (-0.1, 0.4), (0.8, 0.4), (0.8, 1), (-0.7, 1)],
    "heart": _HEART,
    "hourglass": [(-0.8, -1), (0.8, -1), (0.15, 0), (0.8, 1), (-0.8, 1), (-0.15, 0)],
    # The inner circle of the moon meets the outer one: 0.678 (cos, sin)(0.985) + (0.45, 0) = (cos, sin)(0.6).
    "moon": _arc(1, 0.6, 2 * math.pi - 0.6) + _arc(0.678, 2 * math.pi - 0.985, 0.985, centre_x=0.45),
    "pentagon": _spokes(5),
    "sparkle": _spokes(8, inner=0.36),
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "star": _spokes(10, inner=0.42),
    "triangle": _spokes(3),
}  # fmt: skip
CLASSES = tuple(sorted(OUTLINES))
# Things that belong to no class: clutter in the hard scenes.
CLUTTER: dict[str, Points] = {
    "pebble": _spokes(7, inner=0.8),
    "stick": [(-1, -0.12), (1, -0.12), (1, 0.12), (-1, 0.12)],
}

# (lowest, highest) hue in degrees. Only the two disc classes use red and blue; every other object keeps clear of them.
_HUES = {"disc_red": [(-14, 14)], "disc_blue": [(212, 240)]}
_OTHER_HUES = [(40, 185), (265, 320)]


@dataclass(frozen=True)
class PlacedObject:
    """One object: kind (a class or a kind of clutter), centre and radius in px, rotation in radians, fill colour."""

    kind: str
    centre: tuple[float, float]
    radius: float
    rotation: float
    colour: RGB


@dataclass(frozen=True)
class Scene:
    """A square picture of `size` px: colours of the four corners (row by row) and objects in painting order."""

    background: tuple[RGB, RGB, RGB, RGB]
    objects: tuple[PlacedObject, ...]
    size: int = SIZE


def outline(thing: PlacedObject) -> np.ndarray:
    """Polygon of the object in pixel coordinates (x, y), float [M, 2]; (0, 0) is the image's top left corner."""
    unit = OUTLINES.get(thing.kind) or CLUTTER[thing.kind]
    return np.asarray(thing.centre) + thing.radius * np.asarray(_turned(unit, thing.rotation))


def object_colour(kind: str, rng: np.random.Generator) -> RGB:
    ranges = _HUES.get(kind, _OTHER_HUES)
    spans = np.array([high - low for low, high in ranges], float)
    low, high = ranges[rng.choice(len(ranges), p=spans / spans.sum())]
    pure = kind in _HUES
    saturation, value = rng.uniform(0.75 if pure else 0.3, 1), rng.uniform(0.7 if pure else 0.25, 1)
    return rgb(255 * c for c in colorsys.hsv_to_rgb(rng.uniform(low, high) / 360 % 1, saturation, value))


def contrasting_colour(colours: list[RGB], distance: int, rng: np.random.Generator) -> RGB:
    """A colour whose summed absolute RGB difference to each of `colours` is at least `distance`."""
    while True:
        candidate = rng.integers(0, 256, 3)
        if all(np.abs(candidate - colour).sum() >= distance for colour in colours):
            return rgb(candidate)


def _placed_object(
    kind: str, size: int, radius: tuple[float, float], shift: float, rng: np.random.Generator
) -> PlacedObject:
    """An object near the middle; radius (lowest, highest) and the greatest shift are fractions of the image's side."""
    centre = size * (0.5 + rng.uniform(-shift, shift, 2))
    turn = rng.uniform(-0.3, 0.3)
    colour = object_colour(kind, rng)
    return PlacedObject(kind, (float(centre[0]), float(centre[1])), size * rng.uniform(*radius), turn, colour)


def _background(colour: RGB, spread: int, rng: np.random.Generator) -> tuple[RGB, RGB, RGB, RGB]:
    corners = np.clip(np.array(colour) + rng.integers(-spread, spread + 1, (4, 3)), 0, 255)
    first, second, third, fourth = map(rgb, corners)
    return first, second, third, fourth


def plain_scene(kind: str, rng: np.random.Generator, size: int = SIZE) -> Scene:
    """One large object of that class near the middle of a nearly flat background."""
    thing = _placed_object(kind, size, (0.27, 0.42), 0.1, rng)
    return Scene(_background(contrasting_colour([thing.colour], 180, rng), 25, rng), (thing,), size)


def hard_scene(kind: str, rng: np.random.Generator, size: int = SIZE) -> Scene:
    """A smaller object off the middle, among clutter, partly covered by a stick, on an uneven background."""
    thing = _placed_object(kind, size, (0.24, 0.36), 0.14, rng)
    ground = contrasting_colour([thing.colour], 180, rng)

    def clutter(what: str, centre: np.ndarray, radius: float) -> PlacedObject:
        colour = contrasting_colour([thing.colour, ground], 90, rng)
        return PlacedObject(what, (float(centre[0]), float(centre[1])), radius, rng.uniform(0, math.tau), colour)

    behind: list[PlacedObject] = []
    while len(behind) < 3:
        centre, radius = rng.uniform(0, size, 2), size * rng.uniform(0.04, 0.08)
        # Clutter behind the object, but not behind its middle: it disturbs the outline and stays visible.
        if np.hypot(*(centre - thing.centre)) > 0.8 * thing.radius:
            behind.append(clutter(str(rng.choice(sorted(CLUTTER))), centre, radius))
    angle = rng.uniform(0, math.tau)
    edge = np.array(thing.centre) + 0.8 * thing.radius * np.array([math.cos(angle), math.sin(angle)])
    cover = clutter("stick", edge, size * rng.uniform(0.12, 0.2))
    return Scene(_background(ground, 50, rng), (*behind, thing, cover), size)


def _canvas(scene: Scene) -> Image.Image:
    corners = np.array(scene.background, np.uint8).reshape(2, 2, 3)
    side = scene.size * SUPERSAMPLE
    return Image.fromarray(corners).resize((side, side), Image.Resampling.BILINEAR)


def corners(thing: PlacedObject) -> Points:
    """`outline` on the supersampled canvas."""
    return [(float(x), float(y)) for x, y in outline(thing) * SUPERSAMPLE]


def shrunk(canvas: Image.Image, size: int) -> np.ndarray:
    """The canvas at `size` px, anti-aliased."""
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX))


def render(scene: Scene) -> np.ndarray:
    """The scene with filled, anti-aliased objects and nothing else: uint8 [size, size, 3]."""
    canvas = _canvas(scene)
    for thing in scene.objects:
        ImageDraw.Draw(canvas).polygon(corners(thing), fill=thing.colour)
    return shrunk(canvas, scene.size)


def with_noise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8: an image of 0..255 with a little sensor noise (standard deviation 3)."""
    return np.clip(np.rint(image + rng.normal(0, 3, image.shape)), 0, 255).astype(np.uint8)


def photograph(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """`render` with noise."""
    return with_noise(render(scene), rng)


def _closed(points: Points) -> Points:
    """The polygon as a line that runs past its start, so that the joint there is rounded too."""
    return [*points, *points[:2]]


STYLES = ("cartoon", "pattern", "sticker", "tattoo", "videogame")


def rendition(scene: Scene, style: str, rng: np.random.Generator) -> np.ndarray:
    """The scene in one of STYLES: uint8 [size, size, 3]; the names are some of those in ImageNet-R.

    cartoon: flat colours and a dark contour; pattern: the shape filled with stripes; sticker: flat colours and a white
    rim; tattoo: a dark contour on skin; videogame: coarse pixels of few colours.
    """
    size, px = scene.size, SUPERSAMPLE
    if style == "videogame":
        coarse = render(scene) // 64 * 64 + 32
        small = Image.fromarray(coarse).resize((size // 3, size // 3), Image.Resampling.NEAREST)
        return np.asarray(small.resize((size, size), Image.Resampling.NEAREST))
    ground = scene.background[0]
    if style == "tattoo":
        ground = rgb(np.array([224, 172, 140]) + rng.integers(-30, 30))
    canvas = Image.new("RGB", (size * px, size * px), ground)
    draw = ImageDraw.Draw(canvas)
    for thing in scene.objects:
        points = corners(thing)
        if style == "cartoon":
            draw.polygon(points, fill=thing.colour)
            draw.line(_closed(points), fill=(20, 20, 20), width=2 * px, joint="curve")
        elif style == "sticker":
            draw.line(_closed(points), fill=(255, 255, 255), width=6 * px, joint="curve")
            draw.polygon(points, fill=thing.colour)
        elif style == "tattoo":
            draw.line(_closed(points), fill=(50, 60, 75), width=2 * px, joint="curve")
        elif style == "pattern":
            inside = Image.new("L", canvas.size)
            ImageDraw.Draw(inside).polygon(points, fill=255)
            rows, columns = np.indices((size * px, size * px))
            angle = rng.uniform(0, math.pi)
            stripes = (rows * math.sin(angle) + columns * math.cos(angle)) % (4 * px) < 2.6 * px
            inside = Image.fromarray(np.asarray(inside) * stripes)
            canvas.paste(thing.colour, mask=inside)
        else:
            raise ValueError(f"unknown style '{style}'; known: {', '.join(STYLES)}")
    return shrunk(canvas, size)


def line_drawing(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Dark, slightly trembling contours on white, each drawn twice as if by hand around an even grey: uint8
    [size, size, 3], with equal channels."""
    canvas = Image.new("RGB", (scene.size * SUPERSAMPLE,) * 2, (255, 255, 255))
    for thing in scene.objects:
        ImageDraw.Draw(canvas).polygon(corners(thing), fill=(int(rng.integers(130, 190)),) * 3)
        for _ in range(2):
            moved = outline(thing) * SUPERSAMPLE
            moved += rng.normal(0, 0.45 * SUPERSAMPLE, moved.shape)
            tremble = [(float(x), float(y)) for x, y in moved]
            shade = int(rng.integers(10, 90))
            ImageDraw.Draw(canvas).line(_closed(tremble), fill=(shade,) * 3, width=SUPERSAMPLE, joint="curve")
    return shrunk(canvas, scene.size)
