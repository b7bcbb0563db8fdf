"""What two runs must have equal, bit for bit: everything but times and places."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import torch

from tests.campaign.cases import Broken

# Fields of records, states and logs that say when and how fast, hashes of them, and a table's durations.
TIMES = re.compile(r"(.*_)?seconds(_per_.*)?|(.*_)?images_per_second|peak_memory_gib|finished|digest|[cg]pu_hours")
DURATION = re.compile(r"\b\d+:\d\d(:\d\d)?\b|[\d.e-]+ [CG]PU h")
PADDING = re.compile("[ -]+")  # of a table, as wide as its durations
# Left by a run for the reader, and no result: logs, the page, TensorBoard's events, mmengine's own files, claims.
PASSING = ("logs/", "index.html", "tensorboard/", "mmengine/", ".claim.")


def results(out: Path) -> dict[str, Path]:
    files = (path for path in sorted(out.rglob("*")) if path.is_file())
    named = {str(path.relative_to(out)): path for path in files}
    return {name: path for name, path in named.items() if not any(part in name for part in PASSING)}


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(inner) for key, inner in value.items() if not TIMES.fullmatch(str(key))}
    return [without_times(inner) for inner in value] if isinstance(value, list | tuple) else value


def content(path: Path) -> Any:
    """A file's content for comparison: numbers and text without times, bytes of everything else."""
    if path.suffix == ".pth":
        return as_bytes(without_times(torch.load(path, weights_only=True)))
    if path.suffix == ".safetensors":  # its header's length, its header, its numbers
        raw = path.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        return without_times(json.loads(raw[8:end])), raw[end:]
    if path.suffix in (".json", ".jsonl"):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        return [without_times(json.loads(line)) for line in lines]
    if path.suffix == ".csv":
        return without_times(list(csv.DictReader(io.StringIO(path.read_text()))))
    return PADDING.sub(" ", DURATION.sub("", path.read_text())) if path.suffix == ".md" else path.read_bytes()


def as_bytes(value: Any) -> Any:
    """Tensors as what can be compared, at any depth."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), list(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: as_bytes(inner) for key, inner in value.items()}
    return [as_bytes(inner) for inner in value] if isinstance(value, list | tuple) else value


def compare(one: Path, other: Path) -> int:
    """The number of files compared; Broken if the results below the two folders differ."""
    a, b = results(one), results(other)
    if a.keys() != b.keys():
        raise Broken(f"only undisturbed: {sorted(a.keys() - b.keys())}; only disturbed: {sorted(b.keys() - a.keys())}")
    different = [name for name in a if content(a[name]) != content(b[name])]
    if different:
        raise Broken(f"{len(different)} of {len(a)} files differ: {different[:10]}")
    return len(a)
