"""Images inside plain tar files, as webdataset shards and ImageNet's own archives hold them.

Each tar's table of contents is read once; after that any image is read by seeking, so that a training's seeded order is
the same for loose files and tars.
"""

import io
import os
import re
import tarfile
from pathlib import Path
from typing import BinaryIO

from mae_core.errors import UserError
from mae_core.files import EXTENSIONS, folders_below, is_image, open_regular
from mae_core.writing import read_object

ENTRY = re.compile(rb"(?P<tar>.+\.tar)!/(?P<member>.+)@(?P<offset>\d+)\+(?P<size>\d+)", re.DOTALL)
END = 2 * tarfile.BLOCKSIZE  # bytes of zeros that mark the end of a tar
AT_A_TIME = 1 << 20  # bytes
LISTING = "shards.json"  # what write_shards.py writes first, beside its shards


def list_shards(root: Path) -> list[Path]:
    """Every .tar file below a folder, as `walk` finds them, sorted. UserError if some that write_shards.py listed are
    not there yet."""
    folders = folders_below(root)
    found = [
        Path(folder, name) for folder, names in folders for name in names if name.endswith(".tar") or name == LISTING
    ]
    for listing in (path for path in found if path.name == LISTING):
        try:
            names = read_object(listing)["shards"]
            lacking = sum(listing.with_name(name) not in found for name in names)
        except (OSError, ValueError, KeyError, TypeError):  # somebody else's file of that name
            continue
        if lacking:
            raise UserError(
                f"{listing.parent} lacks {lacking} of {len(names)} shards: mae_core.write_shards goes on there"
            )
    return sorted(path for path in found if path.suffix == ".tar")


def list_members(shards: list[Path]) -> list[str]:
    """Every image in the shards, in their order, as "SHARD.tar!/MEMBER@OFFSET+SIZE" (bytes), which open_member reads.

    UserError for a file that is no uncompressed tar or of which any part is damaged or missing, for an image that is
    stored with holes, and if no shard holds an image.
    """
    entries = []
    for path in shards:
        try:
            with open_regular(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
                members = [m for m in tar if m.isreg() and is_image(Path(m.name).name)]
                check_end(path, file, tar.offset)
        except (tarfile.TarError, OSError) as error:
            raise UserError(f"{path} cannot be read as an uncompressed tar file ({error}): pack it again") from None
        if sparse := [m.name for m in members if m.issparse()]:
            raise UserError(f"{path} stores {sparse[0]} with holes: pack it again without --sparse")
        entries += [f"{path}!/{m.name}@{m.offset_data}+{m.size}" for m in members]
    if not entries:
        raise UserError(f"no image ({', '.join(sorted(EXTENSIONS))}) in {', '.join(map(str, shards[:3]))}")
    return entries


def check_end(path: Path, file: BinaryIO, offset: int) -> None:
    """UserError unless all that follows the last member that was read, from `offset` on, is the end of the tar. Python
    takes the first header that it cannot read for the end, and would silently leave out what follows."""
    file.seek(offset)
    length = 0
    while part := file.read(AT_A_TIME):
        if stray := part.lstrip(b"\0"):
            at = offset + length + len(part) - len(stray)
            if length + len(part) - len(stray) >= END:
                raise UserError(f"{path} goes on after its end, at byte {at} (two tars in one file?): keep them apart")
            raise UserError(f"{path} is damaged at byte {offset}, where no header of a file is: copy it again")
        length += len(part)
    if length < END:
        raise UserError(f"{path} is cut short, it lacks the mark of a tar's end: copy it again")


def place_of(entry: bytes) -> tuple[bytes, int, int] | None:
    """Tar, offset and size of an entry of list_members, as os.fsencode gives it; None for the path of a file."""
    match = ENTRY.fullmatch(entry)
    return (match["tar"], int(match["offset"]), int(match["size"])) if match else None


def member_name(entry: str) -> str | None:
    """The name of an entry of list_members in its tar; None for the path of a file."""
    match = ENTRY.fullmatch(os.fsencode(entry))
    return os.fsdecode(match["member"]) if match else None


def bytes_of(path: bytes) -> bytes:
    """The contents of a file, or of an entry of list_members; OSError if it cannot be read."""
    file, offset, size = place_of(path) or (path, 0, -1)
    with open_regular(os.fsdecode(file)) as opened:  # anew each time: forked workers must not share a position
        opened.seek(offset)
        return opened.read(size)


def open_member(entry: str) -> io.BytesIO | None:
    """The bytes of an entry of list_members; None for the path of an ordinary file."""
    path = os.fsencode(entry)
    return io.BytesIO(bytes_of(path)) if place_of(path) else None
