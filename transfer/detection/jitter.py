"""Large-scale jitter (Ghiasi et al. 2021, arXiv 2012.07177): what a training sees of an image, and of its objects."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as mask_util

from transfer.data.coco_json import FAR, runs

SMALLEST = 1e-5  # px: a box with a shorter side holds no object, as in detectron2
TOUCH = 1e-7  # px: what reaches less far into a view only touches it


@dataclass(frozen=True)
class View:
    """An image of `size`, mirrored or not, scaled to `scaled`, of which the rectangle `box` is cut out. All in px,
    width before height; the box is left, top, right, bottom."""

    size: tuple[int, int]
    flipped: bool
    scaled: tuple[int, int]
    box: tuple[int, int, int, int]

    @property
    def width(self) -> int:
        return self.box[2] - self.box[0]

    @property
    def height(self) -> int:
        return self.box[3] - self.box[1]

    def of(self, image: Image.Image) -> Image.Image:
        """Its pixels."""
        if self.flipped:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image.resize(self.scaled, Image.Resampling.BILINEAR).crop(self.box)

    def object(self, outline: list[np.ndarray] | dict) -> tuple[np.ndarray, np.ndarray] | None:
        """What is seen of an object with that outline (`Example.outlines`): its box, float32 x0, y0, x1, y1, and its
        mask, uint8 [height, width]. None if it lies outside."""
        return self.of_runs(outline) if isinstance(outline, dict) else self.of_polygons(outline)

    def of_polygons(self, outline: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray] | None:
        """Polygons keep their corners, so that the box of a small object is exact."""
        limits = np.array([self.width, self.height], float)
        polygons = [self.corners(polygon) for polygon in outline]
        starts, ends = (np.concatenate(e) for e in zip(*(edges_within(polygon, limits) for polygon in polygons)))
        points = np.concatenate([starts, ends, *(corners_within(polygon, limits) for polygon in polygons)])
        if not len(points):
            return None
        box = np.concatenate([points.min(axis=0), points.max(axis=0)]).astype(np.float32)
        if (box[2:] - box[:2] <= SMALLEST).any():
            return None
        rles = mask_util.frPyObjects([polygon.ravel() for polygon in polygons], self.height, self.width)
        mask = np.ascontiguousarray(mask_util.decode(mask_util.merge(rles)))
        if not mask.any():  # it is thinner than a pixel. An empty mask would be a wrong target: its outline is drawn
            for start, end in zip(starts, ends):
                steps = np.linspace(0, 1, int(2 * np.abs(end - start).max()) + 2)[:, None]
                columns, rows = (start + steps * (end - start)).astype(int).clip(0, limits.astype(int) - 1).T
                mask[rows, columns] = 1
        return box, mask

    def corners(self, polygon: np.ndarray) -> np.ndarray:
        """x0, y0, x1, y1, ... in the image -> [n, 2] in the view."""
        points = polygon.reshape(-1, 2).copy()
        if self.flipped:
            points[:, 0] = self.size[0] - points[:, 0]
        return (points * np.divide(self.scaled, self.size) - self.box[:2]).clip(-FAR, FAR)

    def of_runs(self, outline: dict) -> tuple[np.ndarray, np.ndarray] | None:
        """By nearest neighbour, which picks rows and columns: no more than the view is computed."""
        mask = mask_util.decode(runs(outline, self.size[1], self.size[0]))
        if self.flipped:
            mask = mask[:, ::-1]
        columns, rows = (
            ((np.arange(self.box[axis], self.box[axis + 2]) + 0.5) * self.size[axis] / self.scaled[axis]).astype(int)
            for axis in (0, 1)
        )
        mask = np.ascontiguousarray(mask[rows][:, columns])
        if not mask.any():
            return None
        across, down = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        # To the border after the last pixel inside.
        return np.array([across[0], down[0], across[-1] + 1, down[-1] + 1], np.float32), mask


def draw_view(image_size: tuple[int, int], size: int, scales: tuple[float, float]) -> View:
    """Mirror with probability 1/2, scale the image to fit a square of `size` times a random factor from `scales`, and
    cut it at random to at most size x size. Random numbers come from torch's global generator."""
    flipped = bool(torch.rand(()) < 0.5)
    factor = scales[0] + (scales[1] - scales[0]) * torch.rand(()).item()
    ratio = min(size * factor / side for side in image_size)
    width, height = (max(1, round(side * ratio)) for side in image_size)
    left, top = (int(max(side - size, 0) * torch.rand(()).item()) for side in (width, height))
    return View(image_size, flipped, (width, height), (left, top, left + min(width, size), top + min(height, size)))


def edges_within(polygon: np.ndarray, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the parts of a polygon's edges that lie in the rectangle from 0 to `limits` start and end, [m, 2] each
    (Liang and Barsky 1984). What only touches the rectangle from outside is not in it.

    Of the part of the polygon in the rectangle, these points and those of `corners_within` have the bounding box."""
    low, high = np.full(2, TOUCH), limits - TOUCH
    step = np.roll(polygon, -1, axis=0) - polygon
    with np.errstate(divide="ignore", invalid="ignore"):  # an edge may be parallel to a side
        enter, leave = (low - polygon) / step, (high - polygon) / step
    parallel = step == 0
    outside = parallel & ((polygon < low) | (polygon > high))
    enter, leave = np.minimum(enter, leave), np.maximum(enter, leave)
    first = np.where(parallel, 0, enter).max(axis=1, initial=0)
    last = np.where(parallel, 1, leave).min(axis=1, initial=1)
    seen = (first <= last) & ~outside.any(axis=1)
    starts, ends = (polygon[seen] + at[seen, None] * step[seen] for at in (first, last))
    return to_the_border(starts, limits), to_the_border(ends, limits)


def corners_within(polygon: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """The corners [m, 2] of the rectangle from 0 to `limits` that lie in the polygon."""
    low, high = np.full(2, TOUCH), limits - TOUCH
    corners = np.array([low, [high[0], low[1]], [low[0], high[1]], high])
    return to_the_border(corners[[inside(polygon, corner) for corner in corners]], limits)


def to_the_border(points: np.ndarray, limits: np.ndarray) -> np.ndarray:
    points = np.where(points < 2 * TOUCH, 0.0, points)
    return np.where(points > limits - 2 * TOUCH, limits, points)


def inside(polygon: np.ndarray, point: np.ndarray) -> bool:
    """Whether a ray from the point to the right crosses the polygon's edges an odd number of times."""
    start, end = polygon, np.roll(polygon, -1, axis=0)
    crossed = (start[:, 1] > point[1]) != (end[:, 1] > point[1])
    start, end = start[crossed], end[crossed]
    at = start[:, 0] + (point[1] - start[:, 1]) * (end[:, 0] - start[:, 0]) / (end[:, 1] - start[:, 1])
    return int((at > point[0]).sum()) % 2 == 1
