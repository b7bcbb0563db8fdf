"""Weight files on disk: read without running anything they hold, written atomically.

Read: what ``torch.save`` writes (the zip format and the older pickle format), safetensors, ``.npz``, and plain pickles
of arrays. The content decides what a file is, not its extension.
"""

import argparse
import hashlib
import json
import os
import pickle
import re
import stat
import tarfile
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mae_core.checkpoint.archive import check_arrays, check_torch, members_of
from mae_core.checkpoint.array_pickle import NotAllowed, load_arrays
from mae_core.checkpoint.errors import CheckpointError
from mae_core.stopping import stop_postponed
from mae_core.writing import replacing

OUR_FORMAT = "mae-transfer"
SAFETENSORS_HEADER_LIMIT = 100_000_000  # bytes, the library's own
LEGACY_TORCH = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # how files of the older torch.save begin

# Besides tensors and plain values, official training checkpoints hold an argparse.Namespace, with paths in it when
# submitit ran them. Python 3.13 writes PosixPath as pathlib._local.PosixPath; the pure class opens nothing.
SAFE_TYPES: list[Any] = [
    argparse.Namespace,
    (PurePosixPath, "pathlib.PosixPath"),
    (PurePosixPath, "pathlib._local.PosixPath"),
]


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parameters_sha256(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over the names and values."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_file(path: Path, checked: bool = False) -> tuple[dict[Any, Any], dict[str, str]]:
    """The dictionary in the file ({} if it holds something else), and its safetensors metadata ({} for other kinds of
    file). CheckpointError if it is no weight file, is damaged, or holds more than tensors and plain values.

    checked: its checksums were found right before.
    """
    content, metadata = _read(path, checked)
    return content if isinstance(content, dict) else {}, metadata


def _begin(path: Path) -> tuple[int, bytes]:
    """The size of a regular file in bytes, and its first ones."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for, a device never ends
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
            raise CheckpointError(f"{path} is {kind}, not a file: give the weight file itself")
        with open(path, "rb") as file:
            return status.st_size, file.read(512)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist: give a checkpoint file or folder, hf:NAME, timm:NAME or random:ARCH"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in its name
        raise CheckpointError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from None


def _read(path: Path, checked: bool) -> tuple[object, dict[str, str]]:
    size, head = _begin(path)
    if os.fsencode(path).decode(errors="ignore") != str(path):
        raise CheckpointError(f"{path}: its name is not UTF-8, and neither torch nor safetensors opens it: rename it")
    if head.startswith(b"PK\x03\x04"):
        return _read_zip(path, checked), {}
    header = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header <= SAFETENSORS_HEADER_LIMIT:
        return _read_safetensors(path, size, header)
    if head.startswith(LEGACY_TORCH):
        return _torch_load(path, mmap=False), {}
    if head.startswith(b"\x80"):
        return _read_numpy_pickle(path), {}
    raise CheckpointError(f"{path} {_instead(path, head)}")


def is_mapped(path: Path) -> bool:
    """Whether `read_file` maps this file's tensors instead of copying them: torch's zip format and safetensors."""
    with open(path, "rb") as file:
        head = file.read(9)
    return head.startswith(b"PK\x03\x04") or head[8:] == b"{"


def _instead(path: Path, head: bytes) -> str:
    """What a file is that is no weight file, and what to do."""
    if not head:
        return "is empty: download or save it again"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights: fetch them with `git lfs pull`"
    if head.lstrip().startswith(b"<"):
        return "is a web page, not a checkpoint: the download went wrong, fetch the file itself"
    if tarfile.is_tarfile(path):
        return "is a tar archive: unpack it and give the weight file, or save the model again with torch.save"
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head):
        return "is a text file, not a checkpoint: give a file written by torch.save or safetensors"
    return f"is no checkpoint (it begins with {head[:8]!r}): give a file written by torch.save or safetensors"


def _read_zip(path: Path, checked: bool) -> object:
    members = members_of(path)
    names = {member.filename.partition("/")[2] for member in members}
    if "constants.pkl" in names:
        raise CheckpointError(f"{path} is a TorchScript program, not weights: save its state_dict with torch.save")
    if members and all(member.filename.endswith(".npy") for member in members):
        return _read_npz(path, members)
    if "data.pkl" not in names:
        raise CheckpointError(f"{path} is a zip archive that torch.save did not write: give the weight file itself")
    if not checked:
        check_torch(path, members)
    return _torch_load(path, mmap=True)


def read_state(path: Path) -> object:
    """What torch.save wrote, in memory and not mapped: a training to resume. CheckpointError if it is damaged, which
    its checksums show, or holds more than tensors and plain values."""
    _begin(path)  # which may be no file
    check_torch(path, members_of(path))
    return _torch_load(path, mmap=False)


def _torch_load(path: Path, mmap: bool) -> object:
    if path.suffix == ".safetensors":  # torch.load would read it as such
        raise CheckpointError(f"{path} was written by torch.save, it is no safetensors file: rename it to .pth")
    try:
        with torch.serialization.safe_globals(SAFE_TYPES), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what matters raises
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        found = _unsafe_names(path, str(error))
        if found:
            raise CheckpointError(
                f"{path} wants to run {found} while loading: refused; only tensors and plain values are read, "
                "so save only its state_dict"
            ) from None
        raise CheckpointError(
            f"{path} is a damaged file or a Python pickle that torch.save did not write: download it again or save its "
            "state_dict with torch.save"
        ) from None
    except Exception as error:  # a damaged pickle fails in any way: EOFError, KeyError, RuntimeError...
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise CheckpointError(f"{path} is cut short or damaged ({reason}): download or copy it again") from None


def _read_npz(path: Path, members: list[zipfile.ZipInfo]) -> dict[str, Tensor]:
    try:
        check_arrays(path, members)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except CheckpointError:
        raise
    except Exception as error:  # a damaged member or header; TypeError: no numbers
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(f"{path} is damaged or holds no plain arrays ({reason}): download it again") from None


def _read_numpy_pickle(path: Path) -> object:
    """A plain pickle of arrays, unlike torch.save's: detectron2's model zoo."""
    try:
        return load_arrays(path)
    except NotAllowed as error:
        raise CheckpointError(
            f"{path} wants to run {error} while loading: refused; only arrays, tensors and plain values are read, so "
            "save only its state_dict"
        ) from None
    except Exception as error:  # a damaged pickle fails in any way
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise CheckpointError(f"{path} is cut short or damaged ({reason}): download or copy it again") from None


def _unsafe_names(path: Path, message: str) -> str:
    """The functions and classes that a file calls besides SAFE_TYPES, at most three; "" if none is known."""
    try:
        with torch.serialization.safe_globals(SAFE_TYPES):
            names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not the zip format, or a damaged pickle: torch's message names the first one
        names = re.findall(r"GLOBAL (\S+) (?:was not an allowed|whose module)", message)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read_safetensors(path: Path, size: int, header: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    if header > size - 8:
        raise CheckpointError(f"{path} is cut short inside its safetensors header: download or copy it again")
    try:
        with stop_postponed(), safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # SafetensorError, or a type of numbers that this torch does not know
        raise CheckpointError(f"{path} is cut short or damaged ({error}): download or copy it again") from None


def check_memory(path: Path, tensors: dict[str, Tensor]) -> None:
    """CheckpointError if tensors hold more numbers than their memory has bytes: expanded ones (stride 0), which in a
    small file can be of any size, and would fill this machine's memory when they are copied."""
    dense = {n: t for n, t in tensors.items() if t.layout is torch.strided and not t.is_meta}
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in dense.values()}
    numbers = sum(tensor.numel() for tensor in dense.values())
    if numbers > sum(memory.values()):
        largest = max(dense, key=lambda name: dense[name].numel())
        raise CheckpointError(
            f"{path}: tensors such as {largest} are expanded ({numbers:,} numbers in {sum(memory.values()):,} bytes): "
            "save contiguous copies of them"
        )


def as_float32(path: Path, name: str, tensor: Tensor) -> Tensor:
    """The tensor as float32, detached; a BatchNorm's counter stays an integer. CheckpointError if it is not dense, of
    floating-point numbers, and finite."""
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        raise CheckpointError(f"{path}: {name} is not a dense tensor; save the weights as ordinary float tensors")
    if not tensor.is_floating_point():
        if name.endswith("num_batches_tracked"):
            return tensor
        raise CheckpointError(f"{path}: {name} is of type {tensor.dtype}; save the weights as floating-point numbers")
    tensor = tensor.detach().float()
    # Only the extremes, because isfinite() would make a mask of the tensor's size; a NaN makes both NaN.
    if tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
        raise CheckpointError(f"{path}: {name} holds NaN or infinite values; give a file from before it diverged")
    return tensor


def sort_header(path: Path) -> None:
    """Sort a safetensors header by name, in place: the library writes metadata in any order, and equal contents must
    have equal hashes."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        ordered = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        if len(ordered) > length:
            raise ValueError(f"the ordered header of {path} outgrew its {length} bytes")
        file.seek(8)
        file.write(ordered.ljust(length))


def save_weights(path: str | Path, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors as safetensors with the metadata and {"format": "mae-transfer"}.

    Atomic: the file appears complete under its name, or an older one stays as it was. UserError if it cannot be
    written.
    """
    save_tensors(Path(path), copies(state), {**metadata, "format": OUR_FORMAT})


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """`save_weights` for contiguous tensors that share no memory, with this metadata alone."""
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            if number := re.search(r"\(os error (\d+)\)", str(error)):
                raise OSError(int(number[1]), os.strerror(int(number[1]))) from None
            raise
        sort_header(temporary)


def save_pickle(path: Path, content: object) -> None:
    """`torch.save`, but atomic; UserError if it cannot be written."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(content, file)
            file.flush()
        except RuntimeError as error:  # what torch makes of a full disk
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies: safetensors refuses tensors that share memory, as tied weights and slices do."""
    return {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
