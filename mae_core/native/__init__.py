"""The compiled reader of training images (sample.c), where `python -m mae_core.native` has built it: faster than
torchvision, and the same pixels to the bit. Where it is not there, or would not give the same, only the time differs.
"""

import contextlib
import ctypes
import hashlib
import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mae_core.batch import Batch
from mae_core.seeds import seed_all, seed_for
from mae_core.shards import bytes_of

if TYPE_CHECKING:
    from mae_core.crops import Crop

SOURCES = sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".c", ".h"))
WORDS = 4  # of 32 bits: as many as numpy's SeedSequence mixes alike


def library_path() -> Path:
    """Where the library of these sources lies, if it has been built."""
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in SOURCES)).hexdigest()
    return Path(__file__).with_name(f"sample-{digest[:12]}.so")


@cache
def library() -> ctypes.CDLL | None:
    """The library; None where it is not built, cannot be loaded or does not give torchvision's results."""
    return load(library_path())


def load(path: Path) -> ctypes.CDLL | None:
    try:
        found = ctypes.CDLL(str(path))
    except OSError:  # not there, or without the libjpeg that it was built with
        return None
    address, size, whole = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    long = ctypes.c_int64
    listed = (address, long, address, address, whole, address, whole)
    found.mae_samples.argtypes = (*listed, address, long, whole, address, address)
    found.mae_samples.restype = None
    found.mae_crop.argtypes = (ctypes.c_char_p, size, *[whole] * 6, address)
    found.mae_size.argtypes = found.mae_decode.argtypes = (ctypes.c_char_p, size, address)
    found.mae_draw.argtypes = (address, whole, whole, whole, address, address)
    return found if same_pixels(found) and same_draws(found) else None


def same_pixels(found: ctypes.CDLL) -> bool:
    """Whether crops of a small image come out as from torchvision, with its version on this machine: it resizes bytes
    as bytes only where torch uses AVX2."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return False
    from torchvision.transforms import InterpolationMode, v2

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8))
    file = io.BytesIO()
    noise.resize((61, 47), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    whole = v2.functional.pil_to_tensor(Image.open(file))
    for left, top, width, height, side in ((3, 5, 50, 30, 24), (17, 2, 20, 41, 33)):
        ours = torch.zeros(3, side, side, dtype=torch.uint8)
        data = file.getvalue()
        found.mae_crop(data, len(data), left, top, width, height, side, 0, ours.data_ptr())
        part = whole[:, top : top + height, left : left + width]
        if not torch.equal(ours, v2.functional.resize(part, [side, side], InterpolationMode.BICUBIC)):
            return False
    return True


def same_draws(found: ctypes.CDLL) -> bool:
    """Whether crops are drawn as by torchvision. Leaves torch's generator as it was."""
    from torchvision.transforms import v2

    from mae_core.crops import Crop

    crop, before, box = Crop(v2.RandomResizedCrop(24, scale=(0.2, 1.0))), torch.get_rng_state(), (ctypes.c_int * 5)()
    assert crop.range is not None
    try:
        for position in range(8):
            words = entropy(3, position)
            torch.default_generator.manual_seed(seed_for(3, position) % 2**63)
            drawn = found.mae_draw(words, len(words), 61, 47, crop.range.data_ptr(), box)
            if drawn and tuple(box) != crop.draw(61, 47):
                return False
    finally:
        torch.set_rng_state(before)
    return True


def entropy(*parts: int) -> ctypes.Array:
    """The integers as words of 32 bits, as numpy's SeedSequence splits them."""
    words = [part >> shift & 0xFFFFFFFF for part in parts for shift in range(0, max(part.bit_length(), 1), 32)]
    return (ctypes.c_uint32 * len(words))(*words)


def write_crops(
    transform: object, seed: int, files: np.ndarray, indices: Sequence[int], positions: Sequence[int], batch: Batch
) -> np.ndarray:
    """Whether each image of the batch has been written to its place: that of file `index`, with the draws of its
    position. files: bytes, of files or of entries of shards.py. Negative indices are left out, and so is a file that is
    no JPEG or of which anything is not as it should be; all without the library, and with transforms other than a Crop.
    """
    done = np.zeros(len(indices), np.uint8)
    from mae_core.crops import Crop

    found = library() if isinstance(transform, Crop) else None
    if found is None:
        return done
    assert isinstance(transform, Crop)
    batch.begin((3, transform.side, transform.side), torch.uint8)
    most = Image.MAX_IMAGE_PIXELS or 2**62  # of more pixels Pillow warns, or refuses them
    words = entropy(seed, 0)
    if transform.range is None or len(words) > WORDS - 1 or max(positions, default=0) >> 32:
        for place, (index, position) in enumerate(zip(indices, positions)):
            with contextlib.suppress(Exception):  # a step that fails does so again in Python, which names the file
                into = batch.images[place]
                done[place] = index >= 0 and read_crop(found, transform, seed, into, most, files[index], position)
        return done
    which, ends = np.array(indices, np.int64), np.array(positions, np.uint32)
    places = (files.ctypes.data, files.itemsize, which.ctypes.data, words, len(words), ends.ctypes.data, len(done))
    found.mae_samples(
        *places, transform.range.data_ptr(), most, transform.side, batch.images.data_ptr(), done.ctypes.data
    )
    return done


def read_crop(
    found: ctypes.CDLL, crop: "Crop", seed: int, place: Tensor, most: int, path: bytes, position: int
) -> bool:
    """Whether one has been written where only the decoding is compiled: for a Crop that draws otherwise, or that
    something follows."""
    size = (ctypes.c_int * 3)()
    try:
        data = bytes_of(path)
    except OSError:
        return False
    # Without its mark of the end, a file may be cut short: it is decoded to its last row, which tells.
    if not data.endswith(b"\xff\xd9") or not found.mae_size(data, len(data), size):
        return False
    if size[2] not in (1, 3) or size[0] * size[1] > most:
        return False
    seed_all(seed, position)
    left, top, width, height, flip = crop.draw(size[0], size[1])
    if not found.mae_crop(data, len(data), left, top, width, height, crop.side, flip, place.data_ptr()):
        return False
    view = place
    for step in crop.rest:
        view = step(view)
    if view is not place:
        place.copy_(view)
    return True
