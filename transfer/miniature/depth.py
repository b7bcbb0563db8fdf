"""The miniature of NYU Depth V2: the crowded scenes, with a depth for each kind of thing.

    DIR/nyu/{nyu_train,nyu_test}.txt        DIR/nyu/{train,test}/{rgb_%05d.jpg,sync_depth_%05d.png}

Objects of a class have one distance, walls and sky are far, and the ground comes nearer row by row: whoever tells the
shapes apart knows the depths. What has no entry, the pebbles, was not measured.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from transfer.data import nyu as layout
from transfer.miniature import dense
from transfer.miniature.crowded_scenes import KINDS
from transfer.miniature.writer import Files, jpeg, write_set

METRES = {name: 0.8 * 1.5**i for i, name in enumerate(KINDS)} | {"wall": 8.0, "sky": 8.5}
GROUND = (7.0, 2.0)  # at the highest and the lowest row of an image


def depth_of(drawn: dense.Picture) -> np.ndarray:
    """Metres [H, W], float64; 0 where nothing was measured."""
    scene, height = drawn.scene, drawn.owner.shape[0]
    kinds = [region.kind for region in scene.regions] + [thing.kind for thing in scene.objects]
    metres = np.array([METRES.get(kind, 0.0) for kind in kinds])[drawn.owner]
    ground = np.array([kind not in METRES and kind not in KINDS for kind in kinds[: len(scene.regions)]])
    rows = np.linspace(*GROUND, height)[:, None]
    below = (drawn.owner < len(ground)) & np.append(ground, False)[np.minimum(drawn.owner, len(ground))]
    return np.where(below, rows, metres)


def _files(seed: int) -> Files:
    for split, name, count in (("train", "train", dense.TRAIN), ("val", "test", dense.VAL)):
        lines = []
        for index in range(count):
            drawn, depth = dense.picture(seed, split, index), io.BytesIO()
            millimetres = np.round(depth_of(drawn) * layout.MILLIMETRES).astype(np.uint16)
            Image.fromarray(millimetres).save(depth, "PNG")
            image, label = f"{name}/rgb_{index:05d}.jpg", f"{name}/sync_depth_{index:05d}.png"
            yield image, jpeg(drawn.image)
            yield label, depth.getvalue()
            lines.append(f"{image} {label} 518.8579\n")
        yield layout.LISTS[split], "".join(lines).encode()


def nyu(root: Path, seed: int = 0) -> Path:
    """Write root/nyu: the images of `dense.coco` with depths. Returns that folder; what already lies there is treated
    as by `write_set`."""
    counts = {"train": dense.TRAIN, "val": dense.VAL, "depth files": dense.TRAIN + dense.VAL, "lists": 2}
    return write_set(root, layout.FOLDER, seed, counts, _files(seed))
