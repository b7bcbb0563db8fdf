"""Zip archives of weights: sizes and checksums are checked before torch or numpy unpacks anything."""

import math
import zipfile
from pathlib import Path
from typing import IO

import numpy as np

from mae_core.checkpoint.errors import CheckpointError

MOST_UNPACKED = 10  # times the archive: floating-point weights hardly compress


def members_of(path: Path) -> list[zipfile.ZipInfo]:
    """The archive's table of contents; CheckpointError if it is cut short, or its members overlap or share a name."""
    try:  # the table of contents is the last thing in a zip file
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception:  # a damaged table fails in any way: BadZipFile, UnicodeDecodeError, NotImplementedError...
        raise CheckpointError(f"{path} is cut short or damaged: download or copy it again") from None
    names = {member.filename for member in members}
    if len(names) < len(members) or sum(member.compress_size for member in members) > path.stat().st_size:
        raise CheckpointError(f"{path} is damaged: its table of contents contradicts itself; download or copy it again")
    return members


def check_torch(path: Path, members: list[zipfile.ZipInfo]) -> None:
    """CheckpointError unless every member is stored as torch.save stores it and agrees with its checksum, at which
    torch.load does not look. A file saved without any (all 0: torch.serialization.set_crc32_options) passes."""
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CheckpointError(
            f"{path} is a compressed zip archive, which torch.save does not write: pack its files with `zip -0 -r`"
        )
    if not any(member.CRC for member in members):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except Exception as error:  # damaged headers of a member fail in any way
        bad = str(error)
    if bad:
        raise CheckpointError(f"{path} is damaged: its checksum of {bad} is wrong; download or copy it again")


def check_arrays(path: Path, members: list[zipfile.ZipInfo]) -> None:
    """CheckpointError if numpy's archive would unpack to far more than its size; ValueError if a member is not as long
    as its array."""
    unpacked = sum(member.file_size for member in members)
    if unpacked > MOST_UNPACKED * path.stat().st_size:
        raise CheckpointError(
            f"{path} would unpack to {unpacked:,} bytes, more than {MOST_UNPACKED} times its size: no weights do"
        )
    with zipfile.ZipFile(path) as archive:
        for member in members:
            with archive.open(member) as file:
                if _announced(file) != member.file_size:
                    raise ValueError(f"{member.filename} is not as long as its header says")


def _announced(file: IO[bytes]) -> int:
    """Bytes of a .npy file by its header."""
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, _, dtype = read[np.lib.format.read_magic(file)](file)
    return file.tell() + math.prod(shape) * dtype.itemsize
