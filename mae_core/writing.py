"""Files that are never half written, and that are never written through a link that somebody left in their place."""

import contextlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from mae_core.errors import UserError, in_words


@contextlib.contextmanager
def named_if_refused(path: Path) -> Iterator[None]:
    """UserError in place of an OSError while the file is written."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{path} cannot be written: {in_words(e)}") from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new, empty file beside `path` to write, which replaces it when the block ends without an error: a reader sees
    the old file or the whole new one. A link in its place is replaced, not followed, and the permissions are those of
    the umask, whatever wrote it. UserError if it cannot be written; nothing is left then."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with named_if_refused(path):
        try:
            temporary.unlink(missing_ok=True)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
            os.close(descriptor)
            yield temporary
            with open(temporary, "rb") as file:
                if stat.S_IMODE(os.fstat(file.fileno()).st_mode) != mode:  # safetensors makes files for the owner only
                    os.fchmod(file.fileno(), mode)
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_texts(texts: Mapping[Path, str]) -> None:
    """Write all of these files, or none if one cannot be written: their old contents then stay. In UTF-8; what cannot
    be encoded, such as a byte of a file's name that is no UTF-8, is escaped. Folders are made."""
    with contextlib.ExitStack() as stack:
        for path, text in texts.items():
            with named_if_refused(path.parent):
                path.parent.mkdir(parents=True, exist_ok=True)
            temporary = stack.enter_context(replacing(path))
            with open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())  # a full disk may show only now, and no file has been replaced yet


def write_text(path: Path, text: str) -> None:
    write_texts({path: text})


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, with sorted keys. A byte of a file's name that is no UTF-8 is escaped, and read back as it
    was. The folder is made."""
    with named_if_refused(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
        json.dump(value, file, indent=1, sort_keys=True, ensure_ascii=False)
        file.write("\n")


def open_to_append(path: Path) -> IO[str]:
    """The file, opened to write at its end; UserError if it is a link or may not be written."""
    with named_if_refused(path):
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        return open(os.open(path, flags, 0o666), "a", encoding="utf-8", errors="backslashreplace")


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError("it holds no object")
    return value
