"""NYU Depth V2 on disk, in the layout of BTS's lists: what is there, and whether it is complete.

DIR/nyu/nyu_train.txt  nyu_test.txt        lines "RGB DEPTH FOCAL": paths below DIR/nyu, with or without a leading "/"
DIR/nyu/SCENE/rgb_00000.jpg  sync_depth_00000.png        depth: 16 bits, millimetres, 0 where nothing was measured
"""

from pathlib import Path

import numpy as np

from mae_core.decode import UNREADABLE, opened
from mae_core.errors import UserError
from transfer.data.findings import Data, found, incomplete, listed_pairs, missing

FOLDER = "nyu"
LISTS = {"train": "nyu_train.txt", "val": "nyu_test.txt"}
OFFICIAL_COUNTS = {"train": 24231, "val": 654}  # cleinc/bts, zhyever/Monocular-Depth-Estimation-Toolbox splits/
MILLIMETRES = 1000
DEPTH_MODES = ("I;16", "I;16B", "I")


def pairs(folder: Path, split: str) -> list[tuple[Path, Path]]:
    """(image, depth file) of every line of the split's list, in its order. UserError for a line that names none."""
    file, listed = folder / LISTS[split], []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        words = line.split()
        if not words:
            continue
        if len(words) not in (2, 3) or any(".." in Path(word).parts for word in words[:2]):
            raise UserError(f"{file}: line {number} is not an image, its depth and a focal length: take BTS's list")
        if words[1] == "None":  # as in KITTI's lists: no depth was measured
            continue
        image, depth = (folder / word.lstrip("/\\") for word in words[:2])
        listed.append((image, depth))
    return listed


def read_depth(file: Path) -> np.ndarray:
    """Metres [H, W], float32; 0 where nothing was measured. UserError for a file of another kind."""
    with opened(file) as picture:
        if picture.mode not in DEPTH_MODES:
            raise UserError(f"{file} is of mode {picture.mode}, not 16 bits of millimetres: take sync_depth_*.png")
        return np.asarray(picture).astype(np.float32) / MILLIMETRES


def check_pair(image: Path, depth: Path) -> None:
    """UserError unless both can be decoded, have one size, and some depth was measured."""
    try:
        with opened(image) as picture:
            picture.load()
            size = picture.size
        metres = read_depth(depth)
    except UNREADABLE as e:
        raise UserError(f"{image} or its depth {depth} cannot be read as an image ({e}): replace it") from None
    if metres.shape != size[::-1]:
        raise UserError(
            f"{depth} is {metres.shape[1]}x{metres.shape[0]} px, its image {size[0]}x{size[1]}: replace one"
        )
    if not metres.any():
        raise UserError(f"{depth} has no measured depth: replace it")


def inspect_nyu(root: Path) -> Data:
    """NYU Depth V2 below root/nyu, as this module's docstring shows it."""
    folder = root / FOLDER
    where = f"{folder}: {LISTS['train']}, {LISTS['val']}, and the scenes' folders that they name"
    if not folder.is_dir():
        return missing(root, f"NYU Depth V2 must lie at {where}")
    if absent := [name for name in LISTS.values() if not (folder / name).is_file()]:
        return incomplete(root, f"{folder} lacks {' and '.join(absent)}: NYU Depth V2 must lie at {where}")
    try:
        listed = {split: pairs(folder, split) for split in LISTS}
    except UnicodeDecodeError:
        return incomplete(root, f"a list in {folder} is no text: take BTS's")
    except UserError as e:
        return incomplete(root, str(e))
    lists = {split: folder / name for split, name in LISTS.items()}
    digest, problems = listed_pairs(root, folder, lists, listed, check_pair, "unpack NYU Depth V2 again")
    if problems:
        return incomplete(root, *problems)
    counts = {split: len(files) for split, files in listed.items()}
    detail = f"{counts['train']} train, {counts['val']} test"
    return found(root, folder, detail, digest, counts, OFFICIAL_COUNTS)
