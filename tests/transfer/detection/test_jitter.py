"""Large-scale jitter: which part of an image is seen, and what is seen of its objects."""

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_util

from transfer.detection.jitter import View, draw_view


def encoded(mask: np.ndarray) -> dict:
    return mask_util.encode(np.asfortranarray(mask))


def jittered(seed: int, image: Image.Image, masks: np.ndarray, size: int, scales: tuple[float, float]):
    """The image seen, and the masks, which are given as runs."""
    torch.manual_seed(seed)
    view = draw_view(image.size, size, scales)
    found = [view.object(encoded(mask)) for mask in masks]
    nothing = np.zeros((view.height, view.width), np.uint8)
    return view.of(image), np.stack([nothing if each is None else each[1] for each in found])


def coordinates(width: int, height: int) -> Image.Image:
    """Red says the column, green the row."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("size", [(96, 72), (60, 120)])
def test_scaling_by_1_fits_the_image_into_the_square_and_half_are_flipped(size):
    image, mask = coordinates(*size), np.zeros((1, *size[::-1]), np.uint8)
    mask[0, 10:30, : size[0] // 3] = 1
    ratio = 48 / max(size)
    target = tuple(round(side * ratio) for side in size)
    straight = np.asarray(image.resize(target, Image.Resampling.BILINEAR))
    flipped = np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize(target, Image.Resampling.BILINEAR))
    flips = 0
    for seed in range(60):
        found, masks = jittered(seed, image, mask, 48, (1.0, 1.0))
        pixels = np.asarray(found)
        is_flipped = np.array_equal(pixels, flipped)
        assert is_flipped or np.array_equal(pixels, straight)
        assert masks.shape == (1, target[1], target[0])
        # The mask covers the left third, or the right one of a flipped image.
        columns, third = np.flatnonzero(masks[0].any(axis=0)), target[0] // 3
        assert (len(columns), columns[0]) == (third, target[0] - third if is_flipped else 0)
        flips += is_flipped
    assert 18 <= flips <= 42


def test_scales_cover_their_range():
    """Below 1 the image is smaller than the square, from 1 on it is cut to it."""
    image, mask = coordinates(96, 72), np.ones((1, 72, 96), np.uint8)
    widths = [jittered(seed, image, mask, 64, (0.25, 2.0))[0].width for seed in range(100)]
    assert 16 <= min(widths) <= 19
    assert max(widths) == 64
    assert 40 <= sum(width == 64 for width in widths) <= 75  # 1 / 1.75 of them
    assert {jittered(seed, image, mask, 64, (0.5, 0.5))[0].size for seed in range(5)} == {(32, 24)}


def test_crops_lie_anywhere_and_masks_move_with_their_pixels():
    """Scaled by 2, the pixels say which part of the image the crop is: the mask must be that part of the mask."""
    image, size = coordinates(120, 120), 60
    mask = np.zeros((2, 120, 120), np.uint8)
    mask[0, 20:70, 50:110] = 1
    mask[1] = 1
    corners = []
    for seed in range(80):
        found, masks = jittered(seed, image, mask, size, (2.0, 2.0))
        pixels = np.asarray(found).astype(int)
        assert found.size == (60, 60)
        assert masks[1].all()
        inside = (pixels[..., 1] >= 20) & (pixels[..., 1] < 70) & (pixels[..., 0] >= 50) & (pixels[..., 0] < 110)
        assert np.array_equal(masks[0].astype(bool), inside)
        if pixels[0, 0, 0] < pixels[0, -1, 0]:  # not flipped
            corners.append(pixels[0, 0, :2])
    assert len(corners) > 25
    assert (np.min(corners, axis=0) <= 5).all()
    assert (np.max(corners, axis=0) >= 54).all()
    assert (np.std(corners, axis=0) > 12).all()
    assert abs(np.corrcoef(np.transpose(corners))[0, 1]) < 0.3


def test_masks_cover_the_painted_objects_at_any_scale():
    """A blue ellipse on grey: after the jitter, the mask holds the blue pixels, except those mixed at its edge."""
    rows, columns = np.mgrid[:90, :70]
    mask = (((rows - 50) / 25) ** 2 + ((columns - 30) / 18) ** 2 < 1).astype(np.uint8)
    pixels = np.full((90, 70, 3), 128, np.uint8)
    pixels[mask == 1] = (0, 0, 255)
    seen = 0
    for seed in range(40):
        found, masks = jittered(seed, Image.fromarray(pixels), mask[None], 64, (0.3, 2.0))
        found = np.asarray(found).astype(int)
        kept = masks[0].astype(bool)
        pure, plain = found[..., 2] > 240, found[..., 2] < 140
        assert kept[pure].all()
        assert not kept[plain].any()
        seen += pure.any() and plain.any()
    assert seen > 25


# Objects


def view_of(size=(100, 80), flipped=False, scaled=(100, 80), box=(0, 0, 100, 80)) -> View:
    return View(size, flipped, scaled, box)


SQUARE = np.array([20.0, 10, 60, 10, 60, 50, 20, 50])
# Two arms, down from a bar: cut below the bar, two pieces are left.
ARMS = np.array([10.0, 10, 70, 10, 70, 60, 60, 60, 60, 20, 20, 20, 20, 60, 10, 60])


@pytest.mark.parametrize(
    ("view", "polygon", "box"),
    [
        (view_of(), SQUARE, (20, 10, 60, 50)),
        (view_of(flipped=True), SQUARE, (40, 10, 80, 50)),
        (view_of(scaled=(150, 120), box=(0, 0, 150, 120)), SQUARE, (30, 15, 90, 75)),
        (view_of(scaled=(10, 8), box=(0, 0, 10, 8)), SQUARE, (2, 1, 6, 5)),
        (view_of(flipped=True, scaled=(25, 20), box=(0, 0, 25, 20)), SQUARE + 0.5, (9.875, 2.625, 19.875, 12.625)),
        (view_of(box=(30, 20, 100, 80)), SQUARE, (0, 0, 30, 30)),  # its lower right part
        (view_of(box=(0, 0, 30, 20)), SQUARE, (20, 10, 30, 20)),
        (view_of(box=(30, 20, 50, 40)), SQUARE, (0, 0, 20, 20)),  # all of the view lies in it
        (view_of(box=(60, 50, 100, 80)), SQUARE, None),  # beside it
        (view_of(box=(0, 30, 40, 80)), ARMS, (10, 0, 20, 30)),
        (view_of(box=(0, 30, 100, 80)), ARMS, (10, 0, 70, 30)),
        (view_of(box=(25, 30, 55, 80)), ARMS, None),  # between the arms
        (view_of(), np.array([10.0, 10, 30, 50, 80, 70]), (10, 10, 80, 70)),
        # Cut on the right of x = 20: the edges of this triangle cross at y = 30 and at 10 + 10 * 60 / 70.
        (view_of(box=(0, 0, 20, 80)), np.array([10.0, 10, 30, 50, 80, 70]), (10, 10, 20, 30)),
    ],
)  # fmt: skip
def test_the_box_of_an_object_is_exact(view, polygon, box):
    found = view.object([polygon])
    if box is None:
        assert found is None
        return
    assert found[0].dtype == np.float32
    assert found[0] == pytest.approx(box, abs=1e-5)
    assert found[1].shape == (view.height, view.width)


def test_an_object_of_several_parts_has_one_box():
    found, mask = view_of().object([SQUARE, np.array([80.0, 60, 90, 60, 90, 70])])
    assert found.tolist() == [20, 10, 90, 70]
    assert mask[30, 40] == mask[62, 88] == 1
    assert mask[30, 85] == mask[62, 40] == 0
    found, mask = view_of(box=(70, 0, 100, 80)).object([SQUARE, np.array([80.0, 60, 90, 60, 90, 70])])
    assert found.tolist() == [10, 60, 20, 70]
    assert mask.sum() == pytest.approx(50, abs=8)


def test_boxes_and_masks_are_those_of_finer_masks():
    """Of random polygons without thin ends, drawn sixteen times as large and cut there."""
    generator, seen, fine = np.random.default_rng(0), 0, 16
    for seed in range(150):
        angles = np.arange(8) * np.pi / 4 + generator.uniform(-0.2, 0.2, 8)
        reach = generator.uniform(0.7, 1, 8) * generator.uniform(10, 40)
        corners = (
            generator.uniform(40, [60, 40.1]) + np.stack([np.cos(angles), np.sin(angles)], axis=1) * reach[:, None]
        )
        torch.manual_seed(seed)
        view = draw_view((100, 80), 48, (0.2, 2.0))
        large = corners.copy()
        if view.flipped:
            large[:, 0] = 100 - large[:, 0]
        large *= fine * np.divide(view.scaled, (100, 80))
        height, width = (fine * side for side in view.scaled[::-1])
        drawn = mask_util.decode(mask_util.merge(mask_util.frPyObjects([large.ravel()], height, width)))
        left, top, right, bottom = (fine * edge for edge in view.box)
        drawn = drawn[top:bottom, left:right]
        found = view.object([corners.ravel()])
        if drawn.sum() < 4 * fine**2:  # too little to compare
            continue
        rows, columns = np.nonzero(drawn)
        expected = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / fine
        assert found[0] == pytest.approx(expected, abs=2 / fine)
        share = drawn.reshape(view.height, fine, view.width, fine).mean(axis=(1, 3))
        kept = found[1].astype(bool)
        assert kept[share > 0.95].mean() > 0.98
        assert not kept[share < 0.05].mean() > 0.02
        seen += 1
    assert seen > 80


def test_boxes_are_those_of_shapely():
    """Of random polygons of all shapes that do not cross themselves."""
    geometry = pytest.importorskip("shapely.geometry", reason="shapely comes with detectron2")
    generator, compared = np.random.default_rng(1), 0
    for seed in range(2000):
        corners = generator.uniform(0, [100, 80], (generator.integers(3, 9), 2))
        torch.manual_seed(seed)
        view = draw_view((100, 80), 48, (0.2, 2.0))
        polygon = geometry.Polygon(view.corners(corners.ravel()))
        if not polygon.is_valid:
            continue
        rest = polygon.intersection(geometry.box(0, 0, view.width, view.height))
        found = view.object([corners.ravel()])
        assert (found is None) == (rest.area == 0)
        if found is not None:
            assert found[0] == pytest.approx(rest.bounds, abs=1e-3)
        compared += 1
    assert compared > 500


# An L around the lower right of an image of 100 x 80, which touches the rectangle from (30, 20) on.
L = np.array([0.0, 0, 90, 0, 90, 20, 30, 20, 30, 70, 0, 70])


def test_what_only_touches_the_view_is_outside():
    assert view_of(box=(30, 20, 100, 80)).object([L]) is None
    found, mask = view_of(box=(29, 19, 100, 80)).object([L])
    assert found.tolist() == [0, 0, 61, 51]
    assert mask.sum() == 61 + 50
    # One part reaches in, another touches the border elsewhere.
    parts = [np.array([25.0, 20, 50, 20, 50, 40, 25, 40]), np.array([10.0, 60, 30, 60, 30, 75, 10, 75])]
    assert view_of(box=(30, 20, 100, 80)).object(parts)[0].tolist() == [0, 0, 20, 20]


def test_a_box_that_float32_makes_flat_holds_no_object():
    """1023.99998 is 1024 there, and a box without width has no overlap with itself: the loss would be NaN."""
    view = view_of((2000, 100), scaled=(2000, 100), box=(0, 0, 1024, 100))
    for reach in (2e-5, 2e-4, 1e-3, 0.1):
        found = view.object([np.array([1024 - reach, 10, 1100, 10, 1100, 50, 1024 - reach, 50])])
        assert found is None or found[0][2] > found[0][0]
    assert found is not None


def test_a_strip_thinner_than_a_pixel_keeps_its_shape():
    strip = np.array([10.0, 10, 12, 10, 302, 300, 300, 300])
    for scale in (0.1, 0.2, 0.4):
        side = round(310 * scale)
        view = view_of((310, 310), scaled=(side, side), box=(0, 0, side, side))
        box, mask = view.object([strip])
        assert box == pytest.approx(np.array([10, 10, 302, 300]) * side / 310, abs=1e-3)
        rows, columns = np.nonzero(mask)
        assert np.abs(rows - columns).max() <= 1
        assert 0.9 * 290 * scale < mask.sum() < 3.2 * 290 * scale


def test_what_is_thinner_than_a_pixel_keeps_its_box_and_the_pixels_that_it_touches():
    found, mask = view_of(scaled=(10, 8), box=(0, 0, 10, 8)).object([np.array([41.0, 31, 44, 31, 44, 33, 41, 33])])
    assert found == pytest.approx([4.1, 3.1, 4.4, 3.3])
    assert np.argwhere(mask).tolist() == [[3, 4]]
    assert view_of().object([np.array([20.0, 20, 60, 20, 40, 20])]) is None  # no area at all


def test_runs_are_seen_as_their_pixels():
    mask = np.zeros((80, 100), np.uint8)
    mask[10:50, 20:60] = 1
    view = view_of(flipped=True, scaled=(50, 40), box=(0, 0, 50, 40))
    found, seen = view.object(encoded(mask))
    assert found.tolist() == [20, 5, 40, 25]
    assert np.array_equal(seen, mask[::2, ::-1][:, ::2])
    assert view_of(box=(60, 50, 100, 80)).object(encoded(mask)) is None
