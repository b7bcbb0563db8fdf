"""What timm or torchvision must be imported to find out, such as the FLOPs of a model, remembered from one plan to the
next: to import them takes longer than all else that a plan does."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, wraps
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

from mae_core.errors import UserError
from mae_core.writing import read_object, write_text

P = ParamSpec("P")
T = TypeVar("T")
LIBRARIES = ("torch", "timm", "torchvision")  # on whose versions, and on the sources, what is found depends
memory: list[dict[str, Any]] = []  # of `remembering`: what was found, by function and arguments


def remembered(function: Callable[P, T]) -> Callable[P, T]:
    """`functools.cache`; within `remembering` over processes. For a function that depends on the repr of its arguments
    alone, and returns what JSON can hold."""
    name, cached = f"{function.__module__}.{function.__qualname__}", cast(Callable[P, T], cache(function))

    @wraps(function)
    def found(*args: P.args, **kwargs: P.kwargs) -> T:
        if not memory:
            return cached(*args, **kwargs)
        key = f"{name} {args!r} {sorted(kwargs.items())!r}"
        if key not in memory[0]:
            memory[0][key] = cached(*args, **kwargs)
        return memory[0][key]

    return found


def cache_folder() -> Path | None:
    """$MAE_TRANSFER_CACHE, else a folder in the user's cache; None if that variable is empty or a relative path."""
    folder = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = os.environ.get("MAE_TRANSFER_CACHE", os.path.join(folder, "mae-transfer"))
    folder = os.path.expanduser(folder)
    return Path(folder) if os.path.isabs(folder) else None


def memory_file() -> Path | None:
    folder = cache_folder()
    return folder and folder / "remembered.json"


@contextmanager
def remembering(path: Path | None, packages: Iterable[Path]) -> Iterator[None]:
    """Within, what a file remembers is taken from there, as long as the sources below `packages` and the libraries are
    what they were; what is new is added to it at the end. Without a file, or where it cannot be read or written,
    nothing is remembered: that takes longer, no more."""
    if path is None:
        yield
        return
    of, known = origin(packages), {}
    with suppress(OSError, ValueError):
        content = read_object(path)
        if content.get("of") == of and isinstance(content.get("found"), dict):
            known = content["found"]
    memory[:] = [dict(known)]
    try:
        yield
        if memory[0].keys() > known.keys():
            with suppress(UserError, OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path, json.dumps({"of": of, "found": memory[0]}))
    finally:
        memory.clear()


def origin(packages: Iterable[Path]) -> str:
    """SHA-256 over the sources and the libraries' versions."""
    digest = hashlib.sha256()
    for library in LIBRARIES:
        with suppress(PackageNotFoundError):
            digest.update(f"{library} {version(library)}\n".encode())
    for package in packages:
        for source in sorted(package.rglob("*.py")):
            digest.update(f"{source.relative_to(package)}\n".encode())
            digest.update(source.read_bytes())
    return digest.hexdigest()
