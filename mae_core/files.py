"""The files of a data set: which there are, which count, and opening one without the risk of waiting for ever."""

import io
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"))


def passed_over(name: str) -> bool:
    """Whether a file or folder is none of the data: what file browsers, editors and notebooks leave behind, such as
    .DS_Store, ._1.jpg (macOS), .ipynb_checkpoints/, @eaDir/ (Synology) and Thumbs.db (Windows)."""
    return name.startswith((".", "@")) or name == "Thumbs.db"


def is_image(name: str) -> bool:
    # os.path.splitext takes twice as long; it sees no extension in ".jpg", which is passed over.
    return name[name.rfind(".") :].lower() in EXTENSIONS and not passed_over(name)


def images_among(names: list[str]) -> list[str]:
    """The names that `is_image` says yes to: of a million that all end alike in a fraction of the time."""
    text = "\n".join(["", *names, ""])
    end = names[0][names[0].rfind(".") :] if names else ""
    alike = text.count(f"{end}\n") == len(names) == text.count("\n") - 1  # no name has a line break
    if alike and end.lower() in EXTENSIONS and "\n." not in text and "\n@" not in text:
        return names
    return list(filter(is_image, names))


def walk(root: Path) -> Iterator[Path]:
    """Every file of `folders_below`."""
    for folder, names in folders_below(root):
        yield from (Path(folder, name) for name in names)


def folders_below(root: Path) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files) for a folder and every one below it, without what is passed over, at any depth and
    through links, which Path.rglob silently skips: class folders are often links into a larger set. Each real folder is
    visited once, so that a link to a folder above it neither repeats the data nor goes on for ever."""
    seen: set[tuple[int, int]] = set()
    for folder, inner, names in os.walk(root, followlinks=True):
        found = os.stat(folder)
        if (found.st_dev, found.st_ino) in seen:
            inner.clear()
            continue
        seen.add((found.st_dev, found.st_ino))
        inner[:] = sorted(name for name in inner if not passed_over(name))
        yield folder, [name for name in names if not passed_over(name)]


def leaves(name: str) -> bool:
    """Whether the file of that relative name may lie outside of the folder that it is relative to."""
    return name.startswith("/") or ".." in name.split("/")


def leaving(names: list[str]) -> list[str]:
    """Those that `leaves` says yes to; of a million usual ones in a fraction of the time."""
    text = "\n".join(["", *names])
    return [name for name in names if leaves(name)] if ".." in text or "\n/" in text else []


def open_regular(path: str | Path) -> BinaryIO:
    """The file, opened to be read; OSError if it is none with contents of its own, such as a pipe or a device: to read
    those could last for ever."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("it is no regular file")
    return os.fdopen(descriptor, "rb")


def printable(text: str) -> str:
    """The text in one line that any terminal and file can show: a byte of a file's name that is no UTF-8 is escaped, as
    in "caf\\xe9", and so are line breaks, colours of terminals, marks that turn the direction of writing, and all else
    that cannot be seen."""
    return "".join(c if c.isprintable() else escape(c) for c in text)


def escape(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # how Python holds such a byte (PEP 383)
        return f"\\x{ord(character) & 0xFF:02x}"
    return character.encode("unicode_escape").decode()


def escape_output() -> None:
    """From now on print escapes what standard output cannot show, such as names that are no UTF-8, as standard error
    does anyway: to report a problem must not fail itself."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
