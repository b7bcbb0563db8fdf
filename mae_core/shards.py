"""Images inside plain tar files, as webdataset shards and ImageNet's own archives hold them.

Each tar's table of contents is read once; after that any image is read by seeking, so that a training's seeded order is
the same for loose files and tars.
"""

import io
import os
import re
import tarfile
from collections.abc import Set
from pathlib import Path

from mae_core.errors import UserError

ENTRY = re.compile(r"(?P<tar>.+\.tar)!/(?P<member>.+)@(?P<offset>\d+)\+(?P<size>\d+)", re.DOTALL)


def list_shards(root: Path) -> list[Path]:
    """Every .tar file below a folder, at any depth and through links, sorted."""
    found = (Path(folder, name) for folder, _, names in os.walk(root, followlinks=True) for name in names)
    return sorted(path for path in found if path.suffix == ".tar")


def list_members(shards: list[Path], extensions: Set[str]) -> list[str]:
    """Every image in the shards, in their order, as "SHARD.tar!/MEMBER@OFFSET+SIZE" (bytes), which open_member reads.

    UserError for a file that is no uncompressed tar or is cut short, and if no shard holds an image.
    """
    entries = []
    for path in shards:
        try:
            with tarfile.open(path, "r:") as tar:
                members = [m for m in tar if m.isreg() and not m.issparse()]
        except tarfile.TarError as error:
            raise UserError(f"{path} cannot be read as an uncompressed tar file ({error}): pack it again") from None
        if members and members[-1].offset_data + members[-1].size > path.stat().st_size:
            raise UserError(f"{path} is cut short: copy it again")
        images = (m for m in members if Path(m.name).suffix.lower() in extensions)
        entries += [f"{path}!/{m.name}@{m.offset_data}+{m.size}" for m in images]
    if not entries:
        raise UserError(f"no image ({', '.join(sorted(extensions))}) in {', '.join(map(str, shards[:3]))}")
    return entries


def open_member(entry: str) -> io.BytesIO | None:
    """The bytes of an entry of list_members; None for the path of an ordinary file."""
    match = ENTRY.fullmatch(entry)
    if match is None:
        return None
    with open(match["tar"], "rb") as file:  # opened anew each time: forked workers must not share a position
        file.seek(int(match["offset"]))
        return io.BytesIO(file.read(int(match["size"])))
