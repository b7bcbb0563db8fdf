"""Reading one image file of any format and mode as 8-bit RGB."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from mae_core.errors import UserError
from mae_core.files import open_regular
from mae_core.shards import open_member

UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises on damaged files
SCARCE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # errors of the machine, not of a file


@contextmanager
def opened(path: str | Path) -> Iterator[ImageFile.ImageFile]:
    """The image by Pillow, not decoded yet, from a file or an entry of shards.py. Raises one of UNREADABLE if it cannot
    be opened as one; UserError if the machine has no room to open it."""
    try:
        with open_member(str(path)) or open_regular(path) as file, Image.open(file) as image:
            yield image
    except UnidentifiedImageError:  # whose text is a Python object
        raise OSError("it is of no format that Pillow knows") from None
    except OSError as e:
        if e.errno not in SCARCE:
            raise
        raise UserError(f"{path} cannot be opened ({e.strerror}): give fewer --workers, or raise ulimit -n") from None


def read_image(path: str | Path) -> Image.Image:
    """The image by Pillow, as RGB. path: a file, or an entry of shards.py. Raises one of UNREADABLE if it is damaged.

    As torchvision's ImageFolder reads it: an alpha channel is dropped, not blended; CMYK is converted without a colour
    profile; the EXIF orientation is ignored. Of 16 bits the upper 8 stay.
    """
    with opened(path) as image:
        return as_rgb(image)


def read_pixels(path: str | Path) -> Tensor:
    """The same as a uint8 tensor [3, H, W]; torchvision decodes colour and greyscale JPEGs. Errors as read_image's.

    Both decoders are libjpeg-turbo: no pixel differed in 586 photographs of ImageNet, Places365, COCO and ADE20K.
    """
    from torchvision import io
    from torchvision.transforms.v2.functional import pil_to_tensor

    # torchvision has announced that it will go; Pillow decodes the same pixels
    decode_jpeg = getattr(io, "decode_jpeg", None)
    with opened(path) as image:  # reads the header, and refuses absurd sizes
        if decode_jpeg and image.format == "JPEG" and image.mode in ("RGB", "L") and image.fp is not None:
            image.fp.seek(0)
            content = bytearray(image.fp.read())
            try:
                return decode_jpeg(torch.frombuffer(content, dtype=torch.uint8)).expand(3, -1, -1)
            except RuntimeError:  # a damaged file: Pillow decides whether it can be read
                image.fp.seek(0)
        return pil_to_tensor(as_rgb(image))


def why_unreadable(path: str | Path) -> str:
    """What is wrong with a file that could not be read, in few words."""
    try:
        read_image(path)
    except UNREADABLE as e:
        return (e.strerror if isinstance(e, OSError) and e.strerror else str(e)) or type(e).__name__
    return "only now it could"


def as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # which Pillow would clip at 255, not scale
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no fixed range")
    if image.mode == "RGB":  # convert would copy it: 700 MB for 13,000 x 13,000 px
        image.load()
        return image
    return image.convert("RGB")
