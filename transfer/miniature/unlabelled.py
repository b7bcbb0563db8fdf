"""Images without labels for pre-training on the miniature: of the kinds that its tasks show, and none of theirs.

    DIR/unlabelled/*.JPEG

Rather more than half show one object, as ImageNet, its shifted sets and iNaturalist do; the others show the crowded
scenes of COCO and ADE20K, or places. An encoder that saw single objects alone knew no more of crowded scenes than
random weights.
"""

import multiprocessing
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from mae_core.errors import UserError
from transfer.miniature import labelled, scenes
from transfer.miniature.crowded_scenes import SIZES, crowded_scene, paint
from transfer.miniature.writer import Files, jpeg, rng_of, write_set


def _class(rng: np.random.Generator) -> str:
    return str(rng.choice(scenes.CLASSES))


def _plain(rng: np.random.Generator) -> np.ndarray:
    return scenes.photograph(scenes.plain_scene(_class(rng), rng), rng)


def _hard(rng: np.random.Generator) -> np.ndarray:
    return scenes.photograph(scenes.hard_scene(_class(rng), rng), rng)


def _rendition(rng: np.random.Generator) -> np.ndarray:
    return scenes.rendition(scenes.plain_scene(_class(rng), rng), str(rng.choice(scenes.STYLES)), rng)


def _drawing(rng: np.random.Generator) -> np.ndarray:
    return scenes.line_drawing(scenes.plain_scene(_class(rng), rng), rng)


def _filled(rng: np.random.Generator) -> np.ndarray:
    return labelled.draw_filled(str(rng.choice(list(labelled.SHAPES.values()))), str(rng.choice(labelled.FILLS)), rng)


def _place(rng: np.random.Generator) -> np.ndarray:
    return labelled.draw_place(int(rng.integers(len(labelled.PLACES))), rng)


def _crowded(rng: np.random.Generator) -> np.ndarray:
    picture, _ = paint(crowded_scene(*SIZES[rng.integers(len(SIZES))], rng))
    return scenes.with_noise(picture, rng)


# What is drawn, and its share of the images.
MIX: dict[Callable[[np.random.Generator], np.ndarray], float] = {
    _plain: 0.25, _hard: 0.1, _rendition: 0.05, _drawing: 0.05, _filled: 0.1, _crowded: 0.4, _place: 0.05,
}  # fmt: skip


def _file(seed: int, index: int) -> tuple[str, bytes]:
    rng = rng_of(seed, "unlabelled", 0, index)
    draw = list(MIX)[rng.choice(len(MIX), p=list(MIX.values()))]
    return f"{index:07d}.JPEG", jpeg(draw(rng))


def _files(seed: int, count: int) -> Files:
    if count < 2000:
        yield from (_file(seed, index) for index in range(count))
        return
    # "spawn": a fork of a process in which torch runs threads may hang.
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        yield from pool.imap(partial(_file, seed), range(count), chunksize=250)


def unlabelled(root: Path, count: int = 20000, seed: int = 0) -> Path:
    """Write root/unlabelled: `count` images for pre-training, kinds by MIX, as many processes as CPUs. Returns that
    folder; what already lies there is treated as by `write_set`."""
    if count < 1:
        raise UserError(f"{count} unlabelled images were asked for: ask for at least 1")
    return write_set(root, "unlabelled", seed, {"train": count}, _files(seed, count))
