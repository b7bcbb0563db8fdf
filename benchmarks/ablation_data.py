"""Which images the cells of an ablation are pre-trained on: all of one table must be on the same."""

import hashlib
import json
import os
from functools import cache
from pathlib import Path

from mae_core.errors import UserError
from mae_core.listing import images_or_shards
from mae_core.pretrain import WEIGHTS_FILE
from mae_core.training import CHECKPOINT_FILE
from mae_core.writing import read_object, write_json
from transfer.data.findings import spread

IMAGES_FILE = "images.json"  # in a cell's folder
MEASURED = 1000  # images, spread over the list, whose sizes are looked at: a million would take minutes on NFS


def note_images(work: Path, data: Path) -> None:
    """Note in a cell's folder, before it is begun, which images it will be pre-trained on: as they are now, since
    earlier cells may have taken days."""
    if not begun(work):
        write_json(work / IMAGES_FILE, images_of.__wrapped__(data))


def begun(work: Path) -> bool:
    return any((work / name).exists() for name in (WEIGHTS_FILE, CHECKPOINT_FILE))


def check_images(work: Path, data: Path) -> None:
    """UserError if the cell was begun on other images than lie at the same path now: they may have been made again, or
    only now be complete. Earlier versions noted nothing."""
    marker = work / IMAGES_FILE
    try:
        noted = read_object(marker) if marker.exists() and begun(work) else None
    except (OSError, ValueError) as e:
        raise UserError(f"{marker} is damaged ({e}): delete it") from None
    if noted is not None and noted != images_of(data):
        what = f"{work} was pre-trained on other images than {data} holds now"
        raise UserError(f"{what}: move it away to pre-train it again, or choose another --out")


@cache
def images_of(data: Path) -> dict[str, str | int]:
    """How many images there are, and hashes of their names and of some of their sizes."""
    files = images_or_shards(data)
    names = "\n".join(file.removeprefix(str(data)) for file in files)
    looked_at = (files[i] for i in spread(len(files), at_most=MEASURED))
    sizes = [os.path.getsize(file) for file in looked_at if os.path.exists(file)]  # not those in tar files
    return {
        "images": len(files),
        "names": hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest(),
        "sizes": hashlib.sha256(json.dumps(sizes).encode()).hexdigest(),
    }
