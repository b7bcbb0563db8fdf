"""What all sets of the miniature share: the one source of randomness, JPEGs, and writing a set whole or not at all."""

import io
import json
import os
import shutil
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from mae_core.claim import take_claim
from mae_core.errors import UserError, in_words
from transfer.data.findings import MINIATURE_MARKER

# Part of every marker file; raise it with any change that alters an image or a file name.
VERSION = 3

Files = Iterator[tuple[str, bytes]]


def rng_of(seed: int, split: str, label: int, index: int) -> np.random.Generator:
    """An image's only source of randomness. Different keys give different streams: no two splits share a scene."""
    return np.random.default_rng([seed, zlib.crc32(split.encode()), label, index])


def jpeg(image: np.ndarray, quality: int = 95) -> bytes:
    file = io.BytesIO()
    # Full colour resolution: at 48 px the usual halving of the colour channels blurs the outlines visibly.
    Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling=0)
    return file.getvalue()


def _is_complete(folder: Path, marker: dict) -> bool:
    try:
        found = json.loads((folder / MINIATURE_MARKER).read_text())
    except (OSError, ValueError):
        return False
    files = sum(len(names) for _, _, names in os.walk(folder)) - 1
    return found == marker and files == sum(marker["counts"].values())


def write_set(root: Path, name: str, seed: int, counts: dict[str, int], files: Iterable[tuple[str, bytes]]) -> Path:
    """Write a dataset to root/name, whole or not at all, and return that folder. A complete set of this version and
    seed is left alone; any other miniature there is replaced. UserError if the folder holds something else or cannot be
    made.

    files: (path below root/name, content) of each. counts: how many of each kind, for the marker file.
    """
    if seed < 0:
        raise UserError(f"the miniature's seed is {seed}: give 0 or more")
    root = Path(root)
    target, partial_copy, discarded = root / name, root / f".{name}.partial", root / f".{name}.discarded"
    marker = {"version": VERSION, "seed": seed, "counts": counts}
    # Checked before anything is written: a complete set may lie in a read-only folder.
    if _is_complete(target, marker):
        clear(discarded)  # which a killed run may have left
        return target
    claim = take_claim(root, wait=True)  # another process may be writing this very set
    try:
        if _is_complete(target, marker):
            return target
        if target.exists() and not (target / MINIATURE_MARKER).is_file():
            raise UserError(
                f"{target} has no {MINIATURE_MARKER}, so it is not a miniature and is left alone: choose another folder"
            )
        print(f"generating {target}", file=sys.stderr, flush=True)
        clear(partial_copy)
        for path, content in files:
            file = partial_copy / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        (partial_copy / MINIATURE_MARKER).write_text(json.dumps(marker) + "\n")
        clear(discarded)
        if target.exists():
            target.rename(discarded)
        partial_copy.rename(target)
        clear(discarded)
    except OSError as error:
        clear(partial_copy)
        raise UserError(f"cannot write the miniature {target}: {in_words(error)}") from None
    finally:
        claim.release()
    return target


def clear(folder: Path) -> None:
    """Remove a folder, or a link in its place: what it points to stays."""
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)
