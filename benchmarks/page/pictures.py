"""Pictures of predictions and reconstructions, scaled down until they fit into the page."""

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mae_core.errors import in_words
from mae_core.files import leaves, open_regular, printable
from transfer.task import Record

SIDES = (1000, 700, 500, 350)  # px, tried in turn
ONE, ALL = 100_000, 1_500_000  # bytes of a picture, and of all together, before base64
LARGEST = 64 << 20  # bytes of a file that is read
PIXELS = 50_000_000  # of a picture that is decoded


class Unfit(Exception):
    """Why a picture is not shown, without what differs from call to call, such as an object's address."""


@dataclass(frozen=True)
class Picture:
    """path: relative to --out. uri: the scaled picture as a data URI. record: whose artifact it is."""

    path: str
    uri: str
    width: int
    height: int
    record: Record | None = None


def pictures_of(out: Path, records: Sequence[Record], folders: Mapping[int, Path]) -> tuple[list[Picture], list[str]]:
    """The PNGs among the records' artifacts that are still what the records say, then those directly in `out`; and a
    sentence for each that is not shown. folders: id of a record -> its work folder."""
    found: list[Picture] = []
    left: list[str] = []
    room = ALL
    named = [
        (folders[id(r)] / name, r, sha256)
        for r in records
        for name, sha256 in sorted(r.artifacts.items())
        if name.lower().endswith(".png") and not leaves(name)
    ]
    for path, record, sha256 in [*named, *((path, None, "") for path in sorted(out.glob("*.png")))]:
        name = printable(str(path.relative_to(out)))
        try:
            encoded, width, height = scaled(path, sha256)
        except FileNotFoundError:
            continue  # records are passed on without what a run left beside them
        except Unfit as e:
            left.append(f"{name}: {e}")
            continue
        if len(encoded) > room:
            left.append(f"{name}: left out, to keep this page small")
            continue
        room -= len(encoded)
        uri = f"data:image/webp;base64,{base64.b64encode(encoded).decode()}"
        found.append(Picture(name, uri, width, height, record))
    return found, left


def scaled(path: Path, sha256: str) -> tuple[bytes, int, int]:
    """The picture as WebP of at most ONE bytes, with its width and height. Unfit: it is not the one of that hash, or
    cannot be read or made so small. FileNotFoundError."""
    try:
        with open_regular(path) as file:
            content = file.read(LARGEST + 1)
    except FileNotFoundError:
        raise
    except OSError as e:
        raise Unfit(in_words(e)) from None
    if len(content) > LARGEST:
        raise Unfit("the file is too large")
    if sha256 and hashlib.sha256(content).hexdigest() != sha256:
        raise Unfit("changed after its record")
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as opened:
            size = opened.size
            picture = opened.convert("RGBA") if size[0] * size[1] <= PIXELS else None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise Unfit("it cannot be decoded as a PNG") from None
    if picture is None:
        raise Unfit(f"{size[0]} x {size[1]} px are too many")
    flat = Image.new("RGB", picture.size, "white")
    flat.paste(picture, mask=picture.getchannel("A"))
    for side in SIDES:
        small = flat.copy()
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.save(buffer, "WEBP", quality=80)
        if buffer.tell() <= ONE:
            return buffer.getvalue(), small.width, small.height
    raise Unfit(f"more than {ONE // 1000} kB at {SIDES[-1]} px")
