"""What was parsed of a large file, kept in the user's cache by the file's SHA-256: parsing COCO's annotations takes a
quarter of a minute, in each process that reads them, and finding their hash half a second."""

from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from types import ModuleType

import numpy as np

from mae_core.errors import UserError
from mae_core.remembered import cache_folder
from mae_core.writing import replacing

LARGE = 1 << 24  # bytes; what is smaller takes less than half a second, and is not kept
CODE = "code"


def code_of(*parsers: ModuleType) -> bytes:
    """What identifies the code that parses. To be called when that is imported: the files may change while it runs."""
    return sha256(b"".join(Path(str(module.__file__)).read_bytes() for module in parsers)).digest()


def recall(digest: str, code: bytes) -> dict[str, np.ndarray] | None:
    """What `keep` has kept of the file with that SHA-256; None if it is not there, damaged, or was parsed by other
    code."""
    if (folder := cache_folder()) is None:
        return None
    # A zip file has checksums; what a damaged one raises is of many kinds.
    with suppress(Exception), np.load(place(folder, digest), allow_pickle=False) as kept:
        if kept[CODE].tobytes() == code:
            return {name: kept[name] for name in kept.files}
    return None


def keep(digest: str, code: bytes, arrays: Mapping[str, np.ndarray]) -> None:
    """Keep these arrays. Nothing is said where that cannot be: the next process parses again, no more."""
    if (folder := cache_folder()) is None:
        return
    with suppress(OSError, UserError):
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(place(folder, digest)) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays, **{CODE: np.frombuffer(code, np.uint8)})  # type: ignore[arg-type]


def place(folder: Path, digest: str) -> Path:
    return folder / f"parsed-{digest}.npz"
