"""Image files of every kind that a data set may hold, as bytes."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours, edges and a little noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / a + c) * np.cos(y / b) for a, b, c in rng.uniform(3, 40, (3, 3))]
    pixels = np.stack(waves, axis=-1) * 100 + 128 + 40 * ((x // 17 + y // 23) % 2)[..., None]
    return Image.fromarray((pixels + rng.normal(0, 4, pixels.shape)).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png16(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, uint16 [H, W, 3], which Pillow cannot write."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def odd_files(width: int = 8, height: int = 4) -> dict[str, tuple[bytes, tuple[int, int, int]]]:
    """{file name: (content, its one RGB colour)} of what can be read though it is no plain colour photograph. JPEGs are
    of colours that survive it."""
    size = (width, height)
    grey, turned = Image.new("L", size, 200), Image.Exif()
    turned[0x0112] = 6  # orientation: turn by 90 degrees to show
    opaque, half = Image.new("RGB", size, (10, 20, 30)), Image.new("L", size, 100)
    sixteen = np.full((height, width, 3), (200 * 256 + 7, 100 * 256 + 255, 3 * 256), np.uint16)
    return {
        "grey.jpg": (encoded(grey, "JPEG"), (200, 200, 200)),
        "turned.jpg": (encoded(grey, "JPEG", exif=turned), (200, 200, 200)),
        "cmyk.jpg": (encoded(Image.new("CMYK", size, (0, 0, 0, 55)), "JPEG"), (200, 200, 200)),
        "cmyk.tif": (encoded(Image.new("CMYK", size, (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
        "grey.png": (encoded(grey, "PNG"), (200, 200, 200)),
        "grey_alpha.png": (encoded(Image.merge("LA", [grey, half]), "PNG"), (200, 200, 200)),
        "alpha.png": (encoded(Image.merge("RGBA", [*opaque.split(), half]), "PNG"), (10, 20, 30)),
        "alpha.webp": (encoded(Image.merge("RGBA", [*grey.convert("RGB").split(), half]), "WEBP"), (200, 200, 200)),
        "palette.png": (encoded(opaque.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"), (10, 20, 30)),
        "transparent.gif": (encoded(opaque.convert("P", palette=1), "GIF", transparency=0), (10, 20, 30)),
        "bits.png": (encoded(Image.new("1", size, 1), "PNG"), (255, 255, 255)),
        "grey16.png": (encoded(Image.fromarray(sixteen[..., 0]), "PNG"), (200, 200, 200)),
        "colour16.png": (png16(sixteen), (200, 100, 3)),
    }


def broken_files(width: int = 48, height: int = 48) -> dict[str, bytes]:
    """{file name: content} of what cannot be read, though most of it says that it is an image."""
    jpeg, png = (encoded(photograph(width, height), kind) for kind in ("JPEG", "PNG"))
    return {
        "zero.jpg": b"",
        "cut.jpg": jpeg[: 2 * len(jpeg) // 3],
        "cut.png": png[: len(png) // 2],
        "header.jpg": jpeg[:200],
        "text.jpg": b"<html>404 Not Found</html>",
    }
