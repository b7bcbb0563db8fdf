"""Files that are no checkpoint, one of each kind: each is refused in a sentence."""

import json
import os
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tests.campaign.cases import Case, refused
from tests.campaign.starts import call
from tests.campaign.tiny import SUITE, World
from tests.fixtures.checkpoint import DECODER, ENCODER

Make = Callable[[Path], object]  # an empty folder -> the path of the bad file


def text(name: str, content: str | bytes) -> Make:
    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return make


def state(name: str, content: Any) -> Make:
    def make(folder: Path) -> Path:
        path = folder / name
        save_file(content, path) if name.endswith("safetensors") else torch.save(content, path)
        return path

    return make


def with_config(config: str) -> Make:
    def make(folder: Path) -> Path:
        save_file({f"vit.{name}": tensor for name, tensor in ENCODER.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(config)
        return folder

    return make


def special(kind: str) -> Make:
    def make(folder: Path) -> object:
        path = folder / "a.pth"
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "loop":
            path.symlink_to(path)
        elif kind == "dangling":
            path.symlink_to("absent")
        elif kind == "folder":
            path.mkdir()
        return {"device": "/dev/zero", "long": "a" * 300 + ".pth", "null": "/dev/null"}.get(kind, path)

    return make


def cut(name: str) -> Make:
    def make(folder: Path) -> Path:
        path = state(name, ENCODER)(folder)
        path.write_bytes(path.read_bytes()[:-1000])
        return path

    return make


def bomb(folder: Path) -> Path:
    np.savez_compressed(folder / "a.npz", a=np.zeros(2**28, np.uint8))
    return folder / "a.npz"


def shards(folder: Path) -> Path:
    index = {"metadata": {}, "weight_map": dict.fromkeys(ENCODER, "model-00001-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def overlapping(folder: Path) -> Path:
    one = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    header = json.dumps({"blocks.0.attn.qkv.weight": one, "cls_token": one}).encode()
    return text("a.safetensors", struct.pack("<Q", len(header)) + header + bytes(16))(folder)


DEEP = "[" * 100_000 + "]" * 100_000
CHECKPOINTS: dict[str, Make] = {
    "an empty file": text("a.pth", ""),
    "an HTML page": text("a.pth", "<!DOCTYPE html><html>404</html>"),
    "zeros": text("a.pth", bytes(100_000)),
    "a Git LFS pointer": text("a.pth", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    "an image": text("a.safetensors", b"\x89PNG\r\n\x1a\n" + bytes(1000)),
    "JSON": text("a.safetensors", json.dumps({"model": 1})),
    "a header longer than the file": text("a.safetensors", struct.pack("<Q", 2**62) + b"{}"),
    "a nested header": text("a.safetensors", struct.pack("<Q", len(DEEP)) + DEEP.encode()),
    "tensors that share their bytes": overlapping,
    "a pipe": special("pipe"),
    "a device": special("device"),
    "/dev/null": special("null"),
    "a link to itself": special("loop"),
    "a link to nothing": special("dangling"),
    "an empty folder": special("folder"),
    "a name of 300 letters": special("long"),
    "a .pth that was cut": cut("a.pth"),
    "a safetensors file that was cut": cut("a.safetensors"),
    "an archive that unpacks to 256 MiB": bomb,
    "shards that are absent": shards,
    "a list": state("a.pth", [1, 2, 3]),
    "no tensors": state("a.pth", {"model": {}, "epoch": 3}),
    "only an optimizer": state("a.pth", {"optimizer": {"state": {0: torch.zeros(3)}}}),
    "only a decoder": state("a.safetensors", DECODER),
    "a convolutional network": state("a.pth", {"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.bias": torch.zeros(10)}),
    "a block number of 5,000 digits": state("a.pth", {f"blocks.{'9' * 5000}.norm1.weight": torch.zeros(3)}),
    "a tensor of 10^11 numbers": state(
        "a.pth", {**ENCODER, "decoder_embed.weight": torch.zeros(1).expand(10**6, 10**5)}
    ),
    "weights of integers": state("a.safetensors", {name: tensor.int() for name, tensor in ENCODER.items()}),
    "a config of infinite heads": with_config('{"model_type": "vit", "num_attention_heads": Infinity}'),
    "a nested config": with_config(DEEP),
    "a config that is a list": with_config("[1]"),
}


def try_checkpoint(world: World, make: Make, work: Path) -> None:
    """By the command that describes it, and by the main command's plan."""
    folder = work / "given"
    folder.mkdir()
    path = make(folder)
    refused(call(["-m", "mae_core.checkpoint", path], work, 60), work)
    plan = ["-m", "benchmarks.run_all", "--ckpt", path, "--data", world.data, *SUITE, "--plan"]
    refused(call(plan, work, 60), work)


def cases(world: World) -> list[Case]:
    return [
        Case("bad input: checkpoint files", name, partial(try_checkpoint, world, make), small=number % 6 == 0)
        for number, (name, make) in enumerate(CHECKPOINTS.items())
    ]
