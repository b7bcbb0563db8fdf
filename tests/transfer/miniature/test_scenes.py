"""Scenes: outlines against drawn pixels, colours, clutter, styles."""

from itertools import combinations

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from transfer.miniature import scenes


def drawn(*where: object) -> np.ndarray:
    """A white PlacedObject on black, 0..1."""
    thing = scenes.PlacedObject(*where, (255, 255, 255))
    return scenes.render(scenes.Scene(((0, 0, 0),) * 4, (thing,)))[..., 0] / 255


@pytest.mark.parametrize("kind", scenes.CLASSES)
def test_outline_and_drawn_pixels_agree(kind):
    """The brightness of a white object on black is its polygon's area, and its centre of mass the polygon's (shoelace
    formulas)."""
    where = kind, (22.0, 26.5), 17.0, 0.2
    picture = drawn(*where)
    x, y = scenes.outline(scenes.PlacedObject(*where, (255, 255, 255))).T
    nx, ny = np.roll(x, -1), np.roll(y, -1)
    cross = x * ny - nx * y
    # The filled outline's border pixels count as inside, hence a little more than the exact area.
    assert picture.sum() == pytest.approx(abs(cross.sum()) / 2, rel=0.08)
    centroid = np.array([((x + nx) * cross).sum(), ((y + ny) * cross).sum()]) / (3 * cross.sum())
    row, column = ndimage.center_of_mass(picture)
    assert (column + 0.5, row + 0.5) == pytest.approx(tuple(centroid), abs=0.25)


def test_no_two_classes_share_an_outline_even_mirrored_except_the_discs():
    """Training flips images: were two classes mirror images, no classifier could tell them apart."""
    pictures = {kind: drawn(kind, (24.0, 24.0), 18.0, 0.0) for kind in scenes.CLASSES}
    for (one, a), (other, b) in combinations(pictures.items(), 2):
        difference = min(np.abs(a - b).sum(), np.abs(a - b[:, ::-1]).sum())
        if {one, other} == {"disc_blue", "disc_red"}:
            assert difference == 0
        else:
            assert difference > 60, (one, other)


def test_object_stands_out_from_its_background():
    for index in range(50):
        for make in (scenes.plain_scene, scenes.hard_scene):
            scene = make(scenes.CLASSES[index % 16], np.random.default_rng(index))
            thing = next(o for o in scene.objects if o.kind in scenes.CLASSES)
            ground = np.mean(scene.background, axis=0)
            assert np.abs(ground - thing.colour).sum() > 80


def test_only_the_disc_classes_are_red_or_blue():
    def hue(kind: str, index: int) -> float:
        thing = scenes.plain_scene(kind, np.random.default_rng(index)).objects[0]
        return Image.new("RGB", (1, 1), thing.colour).convert("HSV").getpixel((0, 0))[0] * 360 / 256

    for index in range(100):
        assert min(hue("disc_red", index), 360 - hue("disc_red", index)) < 20
        assert 205 < hue("disc_blue", index) < 247
        assert 35 < hue("star", index) < 190 or 260 < hue("star", index) < 325


def test_hard_images_are_smaller_and_cluttered():
    rng = np.random.default_rng(0)
    plain = [scenes.plain_scene("star", rng) for _ in range(40)]
    hard = [scenes.hard_scene("star", rng) for _ in range(40)]
    assert all([o.kind for o in s.objects] == ["star"] for s in plain)
    for scene in hard:
        kinds = [o.kind for o in scene.objects]
        assert kinds.count("star") == 1
        assert kinds[-1] in scenes.CLUTTER
        assert len(kinds) == 5
    assert np.mean([s.objects[3].radius for s in hard]) < 0.9 * np.mean([s.objects[0].radius for s in plain])


def test_renditions_have_no_noise():
    rng = np.random.default_rng(0)
    scene = scenes.plain_scene("square", rng)
    for style in scenes.STYLES:
        image = scenes.rendition(scene, style, rng)
        flat = (image[:, 1:] == image[:, :-1]).all(axis=2).mean()
        assert flat > 0.6, style
    noisy = scenes.photograph(scene, rng)
    assert (noisy[:, 1:] == noisy[:, :-1]).all(axis=2).mean() < 0.05
    with pytest.raises(ValueError, match="unknown style"):
        scenes.rendition(scene, "fresco", rng)
