"""Weight files on disk: read without running anything they hold, written atomically.

Read: what ``torch.save`` writes (the zip format and the older pickle format) and safetensors. The content decides
what a file is, not its extension.
"""

import argparse
import hashlib
import json
import os
import pickle
import re
import tarfile
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mae_core.errors import UserError

OUR_FORMAT = "mae-transfer"
SAFETENSORS_HEADER_LIMIT = 100_000_000  # bytes, the library's own

# Official training checkpoints hold, besides tensors and plain values, an argparse.Namespace, and paths in it when
# submitit ran them. PosixPath is pathlib._local.PosixPath where Python 3.13 wrote it; the pure class opens nothing.
SAFE_TYPES = [
    argparse.Namespace,
    (PurePosixPath, "pathlib.PosixPath"),
    (PurePosixPath, "pathlib._local.PosixPath"),
]


class CheckpointError(UserError):
    """A checkpoint file that cannot be used, or that does not fit the model it is loaded into."""


@dataclass(frozen=True)
class Format:
    """How a format is recognised: the key its tensors lie under, keys beside that one, tensor names it must hold."""

    name: str
    under: str | None = None
    beside: frozenset[str] = frozenset()
    holds: frozenset[str] = frozenset()


# The first that fits. Our own files say what they are: in their metadata, or under "format" beside the model.
FORMATS = (
    Format("mae-linprobe", under="model", holds=frozenset({"head.0.running_mean", "head.1.weight"})),
    Format("mae-training", under="model", beside=frozenset({"optimizer"}), holds=frozenset({"decoder_embed.weight"})),
    Format("mae-full", holds=frozenset({"decoder_embed.weight"})),
    Format("mae-finetuned", under="model", holds=frozenset({"head.weight"})),
    Format("mae-pretrain", under="model"),
    Format("timm"),
)
UNDER = ("model", "state_dict")
PREFIXES = ("module.", "_orig_mod.")


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Weights(NamedTuple):
    """The format, the state dict without wrappers' prefixes, and what the file says about its training."""

    format: str
    entries: dict[str, object]
    facts: dict[str, object]


def read_weights(path: Path) -> Weights:
    """The state dict in a file, tensors on the CPU. Facts are safetensors metadata or a pre-training run's arguments.

    Tensors of zip and safetensors files are mapped from the file (copy on write), not copied into memory.
    CheckpointError if it is no weight file, is damaged, or holds more than tensors and plain values.
    """
    content, metadata = _read(path)
    under, entries = _state_dict(path, content)
    beside, names = content.keys() - {under}, entries.keys()
    format = next(f.name for f in FORMATS if f.under in (None, under) and f.beside <= beside and f.holds <= names)
    if str(metadata.get("format") or content.get("format")).startswith(OUR_FORMAT):
        format = "ours"
    facts: dict[str, object] = {name: metadata[name] for name in sorted(metadata) if name != "format"}
    # Metadata is text alone, and "false" is true to Python.
    facts |= {name: int(text) for name, text in metadata.items() if name == "epochs" and text.isdecimal()}
    facts |= {name: text == "true" for name, text in metadata.items() if text in ("true", "false")}
    if "decoder_embed.weight" in entries:
        facts |= _training_facts(format, content)
    return Weights(format, entries, facts)


def _state_dict(path: Path, content: object) -> tuple[str | None, dict[str, object]]:
    """The key that the state dict lies under (None: the file is the state dict), and its entries without prefixes."""
    under = None
    if isinstance(content, dict):
        under = next((key for key in UNDER if isinstance(content.get(key), dict)), None)
    entries = content if under is None else content[under]
    if not isinstance(entries, dict) or not any(isinstance(value, Tensor) for value in entries.values()):
        found = f"only {', '.join(map(str, list(entries)[:3]))}" if isinstance(entries, dict) and entries else "none"
        raise CheckpointError(f"{path} holds no named tensors ({found}): give a file with a model's state_dict")
    entries = {str(name): value for name, value in entries.items()}
    # Of every name or of none: "module." inside a name, or before some, is no wrapper's prefix.
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in entries)), None):
        entries = {name.removeprefix(prefix): value for name, value in entries.items()}
    return under, entries


def _training_facts(format: str, content: dict) -> dict[str, object]:
    """What a pre-training checkpoint says about its run: the plain values of our recipe, or the official arguments."""
    fixed, state, args, epoch = (content.get(key) for key in ("fixed", "state", "args", "epoch"))
    facts: dict[str, object] = {}
    if format == "ours" and isinstance(fixed, dict) and isinstance(fixed.get("recipe"), dict):
        facts = {name: value for name, value in fixed["recipe"].items() if isinstance(value, str | int | float)}
        # It counts steps: that the planned epochs are done is known of mae.safetensors alone.
        facts["epochs_planned"] = facts.pop("epochs", None)
        facts["steps_done"] = state.get("step") if isinstance(state, dict) else None
    if format == "mae-training" and isinstance(args, argparse.Namespace):
        facts = {"epochs": getattr(args, "epochs", None), "norm_pix": getattr(args, "norm_pix_loss", None)}
    if format == "mae-training" and isinstance(epoch, int):
        facts["epochs_done"] = epoch + 1  # the official code counts from 0
    return {name: value for name, value in facts.items() if value is not None}


def _read(path: Path) -> tuple[object, dict[str, str]]:
    """What the file holds and its safetensors metadata ({} for the other formats)."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: give the checkpoint file inside it")
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(512)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: give a checkpoint file or random:ARCH") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if head.startswith(b"PK\x03\x04"):
        return _read_zip(path), {}
    header = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header <= SAFETENSORS_HEADER_LIMIT:
        return _read_safetensors(path, size, header)
    if head.startswith(b"\x80"):
        return _torch_load(path, mmap=False), {}
    raise CheckpointError(f"{path} {_what_it_is(path, head)}")


def _what_it_is(path: Path, head: bytes) -> str:
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


def _read_zip(path: Path) -> object:
    # The table of contents is the last thing in a zip file.
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} is cut short or damaged: download or copy it again")
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.partition("/")[2] for name in archive.namelist()}
    except zipfile.BadZipFile:
        raise CheckpointError(f"{path} is damaged: download or copy it again") from None
    if "constants.pkl" in members:
        raise CheckpointError(f"{path} is a TorchScript program, not weights: save its state_dict with torch.save")
    if "data.pkl" not in members:
        raise CheckpointError(f"{path} is a zip archive that torch.save did not write: give the weight file itself")
    return _torch_load(path, mmap=True)


def _torch_load(path: Path, mmap: bool) -> object:
    if path.suffix == ".safetensors":  # which torch.load would believe
        raise CheckpointError(f"{path} was written by torch.save, it is no safetensors file: rename it to .pth")
    try:
        with torch.serialization.safe_globals(SAFE_TYPES), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on pickle protocols; what matters raises
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        found = _unsafe_names(path, str(error))
        if found:
            raise CheckpointError(
                f"{path} wants to run {found} while loading: refused; only tensors and plain values are read, "
                "so save its state_dict alone"
            ) from None
        raise CheckpointError(
            f"{path} is a damaged file or a Python pickle that torch.save did not write: download it again or save its "
            "state_dict with torch.save"
        ) from None
    except Exception as error:  # a damaged pickle makes the reader fail in any way: EOFError, KeyError, RuntimeError...
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise CheckpointError(f"{path} is cut short or damaged ({reason}): download or copy it again") from None


def _unsafe_names(path: Path, message: str) -> str:
    """The functions and classes beyond SAFE_TYPES that a file calls, at most three; "" if none is known."""
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
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is cut short or damaged ({error}): download or copy it again") from None


def as_float32(path: Path, name: str, tensor: Tensor) -> Tensor:
    """The tensor as float32 without a graph; a BatchNorm's counter stays an integer."""
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        raise CheckpointError(f"{path}: {name} is not a dense tensor; save the weights as ordinary float tensors")
    if not tensor.is_floating_point():
        if name.endswith("num_batches_tracked"):
            return tensor
        raise CheckpointError(f"{path}: {name} is of type {tensor.dtype}; save the weights as floating-point numbers")
    tensor = tensor.detach().float()
    # Extremes, because isfinite() would make a mask of the tensor's size; NaN makes both NaN.
    if tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
        raise CheckpointError(f"{path}: {name} holds NaN or infinite values; give a file from before it diverged")
    return tensor


def sort_header(path: Path) -> None:
    """Order a safetensors header by name, in place: the library writes metadata in any order, and the hash of a file
    is the identity of what is in it."""
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

    Atomic: the file appears complete under its name, or an older one stays as it was.
    """
    path = Path(path)
    # Copies, because safetensors refuses tensors that share memory, as tied weights and slices do.
    state = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            mode = os.fstat(file.fileno()).st_mode
        save_file(state, part, metadata={**metadata, "format": OUR_FORMAT})
        sort_header(part)
        os.chmod(part, mode)  # safetensors makes files that only their owner can read
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from None
    finally:
        part.unlink(missing_ok=True)
