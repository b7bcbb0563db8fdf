"""Files on disk: every kind of weight file, damaged ones, ones that would run code, and writing."""

import argparse
import os
import pickle
import random
import subprocess
import sys
import tarfile
import types
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from torch import nn

from mae_core.checkpoint import CheckpointError, read_checkpoint, save_weights, weights_file
from mae_core.errors import UserError
from tests.fixtures import ROOT
from tests.fixtures.checkpoint import DECODER, ENCODER, RUN, Attack, equal, flax, hf, shapes, tensors, vit


def test_paths_that_python_3_13_wrote_are_read(put, monkeypatch):
    class PosixPath(PurePosixPath):
        __module__ = "pathlib._local"
        __qualname__ = "PosixPath"

        def __reduce__(self):
            return PosixPath, self.parts

    module = types.ModuleType("pathlib._local")
    module.PosixPath = PosixPath
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pathlib._local", module)
        args = argparse.Namespace(epochs=1600, output_dir=PosixPath("/jobs/1"))
        path = put({"model": {**ENCODER, **DECODER}, "args": args})
    assert b"pathlib._local" in path.read_bytes()
    assert equal(read_checkpoint(path).encoder, ENCODER)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_become_float32(put, dtype):
    state = {name: tensor.to(dtype) for name, tensor in ENCODER.items()}
    encoder = read_checkpoint(put(state, "half.safetensors")).encoder
    assert equal(encoder, {name: tensor.float() for name, tensor in state.items()})
    assert {tensor.dtype for tensor in encoder.values()} == {torch.float32}


def test_the_old_pickle_format_is_read(put):
    path = put({"model": ENCODER}, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(path)
    assert equal(read_checkpoint(path).encoder, ENCODER)


def test_parameters_come_back_as_plain_tensors(put):
    checkpoint = read_checkpoint(put({"model": {name: nn.Parameter(tensor) for name, tensor in ENCODER.items()}}))
    assert equal(checkpoint.encoder, ENCODER)
    assert not any(tensor.requires_grad for tensor in checkpoint.encoder.values())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 343249461\n", "Git LFS pointer"),
        (b"\n<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b"epoch 1 {loss: 0.3}\n", "text file"),
        (b"12345678{ is text too\n", "text file"),
        (b"\x93NUMPY\x01\x00v\x00", "begins with b'\\x93NUMPY"),
        (b"PK\x03\x04 and no more", "cut short"),
        ((2**20).to_bytes(8, "little") + b'{"a":', "cut short inside its safetensors header"),
        (b"\x80\x02", "cut short or damaged"),
    ],
)
def test_files_that_are_not_checkpoints_are_named_for_what_they_are(put, content, message):
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(put(content))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_other_archives_folders_and_absent_files_are_named(tmp_path, put):
    plain, archive = tmp_path / "plain.zip", tmp_path / "old.tar"
    with zipfile.ZipFile(plain, "w") as file:
        file.writestr("readme.txt", "hello")
    with tarfile.open(archive, "w") as file:
        file.add(plain, "plain.zip")
    program = tmp_path / "program.pt"  # TorchScript's layout
    with zipfile.ZipFile(program, "w") as file:
        for member in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            file.writestr(f"program/{member}", b"")
    misnamed = put({"model": ENCODER}).rename(tmp_path / "file.safetensors")
    for path, message in (
        (plain, "zip archive that torch.save did not write"),
        (archive, "tar archive"),
        (program, "TorchScript program"),
        (misnamed, "rename it to .pth"),
        (tmp_path, "is a folder without model.safetensors or pytorch_model.bin"),
        (tmp_path / "absent.pth", "does not exist"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(path)


@pytest.mark.parametrize("way", ["zip", "old pickle", "plain pickle 2", "plain pickle 4", "in the arguments"])
def test_code_in_a_pickle_never_runs(put, tmp_path, way):
    target = tmp_path / "attacked"
    attack = Attack(target)
    content = {"model": {**ENCODER, "norm.bias": attack}}
    if way == "in the arguments":
        content = {"model": {**ENCODER, **DECODER}, "args": argparse.Namespace(output_dir=attack), **RUN}
    if way.startswith("plain"):
        path = put(pickle.dumps({"model": attack}, protocol=int(way[-1])), "evil.pth")
    else:
        path = put(content, "evil.pth", _use_new_zipfile_serialization=way != "old pickle")
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(path)
    assert not target.exists()
    assert f"{os.name}.system" in str(error.value)
    assert "\n" not in str(error.value)
    # Loaded the unsafe way on purpose: an attack that does nothing anyway would prove nothing about the reader.
    torch.load(path, weights_only=False) if way in ("zip", "old pickle") else pickle.loads(pickle.dumps(attack))
    assert target.exists()  # the attack is real


def test_a_pickled_model_is_refused_by_the_name_of_its_class(put):
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.\w+\.\w+.*save only its state_dict"):
        read_checkpoint(put(nn.Linear(2, 2)))


@pytest.mark.parametrize("name", ["zip.pth", "old.pth", "flat.safetensors"])
def test_a_damaged_file_is_always_a_checkpoint_error(put, name):
    content = ENCODER if name.endswith("safetensors") else {"model": ENCODER}
    options = {"_use_new_zipfile_serialization": False} if name == "old.pth" else {}
    path = put(content, name, **options)
    whole = path.read_bytes()
    for length in (1, 9, 100, 5000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_checkpoint(path)
    draw, messages = random.Random(0), []
    for _ in range(40):  # in the part that says what the tensors are
        damaged = bytearray(whole)
        damaged[draw.randrange(9000)] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            read_checkpoint(path)
        except CheckpointError as error:
            messages.append(str(error))
    assert messages
    assert not any("\n" in message for message in messages)


def test_damaged_arrays_and_arrays_of_objects_are_refused(put):
    with pytest.raises(CheckpointError, match="holds no plain arrays"):
        read_checkpoint(put({"embedding/kernel": np.array([{}], dtype=object)}, "f.npz"))
    path = put(flax(vit(num_classes=10).state_dict()), "f.npz")
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        read_checkpoint(path)


def test_only_arrays_are_unpickled(put):
    for thing, name in ((argparse.Namespace(), "argparse.Namespace"), (print, "builtins.print")):
        with pytest.raises(CheckpointError, match=f"wants to run {name} while loading: refused"):
            read_checkpoint(put(pickle.dumps({"model": {"a": np.zeros(2), "b": thing}}), "f.pkl"))


def test_saved_weights_come_back_and_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "mae.safetensors"
    state = {**ENCODER, "pos_embed": ENCODER["pos_embed"].expand(1, -1, -1).requires_grad_()}
    save_weights(path, {**state, "norm.weight": ENCODER["norm.bias"]}, {"epochs": "3"})  # two names, one tensor
    checkpoint = read_checkpoint(path)
    assert equal(checkpoint.encoder, {**ENCODER, "norm.weight": ENCODER["norm.bias"]})
    (tmp_path / "plain").write_text("")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # readable by whoever may read the folder's files

    def break_off(state, part, metadata):
        Path(part).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights_file, "save_file", break_off)
    with pytest.raises(UserError, match=r"mae\.safetensors cannot be written: the disk is full: free some space"):
        save_weights(path, ENCODER, {})
    assert read_checkpoint(path).sha256 == checkpoint.sha256
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mae.safetensors", "plain"]
    with pytest.raises(UserError, match="cannot be written"):
        save_weights(tmp_path / "absent" / "mae.safetensors", ENCODER, {})


# VmHWM and not resource.getrusage: at exec Linux hands the parent's peak down to the child's ru_maxrss.
MEASURE = """
import sys
from mae_core.checkpoint import read_checkpoint
def kilobytes(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1])
read_checkpoint(sys.argv[1])
before = kilobytes("VmRSS:")
checkpoint = read_checkpoint(sys.argv[2])
print(1024 * (kilobytes("VmHWM:") - before), sum(4 * t.numel() for t in checkpoint.encoder.values()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("name", ["zip.pth", "old.pth", "flat.safetensors", "hf.safetensors"])
def test_reading_takes_at_most_a_fifth_more_memory_than_the_file(put, name):
    flat = name.endswith("safetensors")
    options = {"_use_new_zipfile_serialization": False} if name == "old.pth" else {}
    big, little = tensors(shapes(768, 12, 16, 14)), ENCODER
    if name == "hf.safetensors":  # whose queries, keys and values are joined
        big, little = hf(big), hf(little)
    small = put(little if flat else {"model": ENCODER}, f"small_{name}", **options)
    path = put(big if flat else {"model": big}, name, **options)
    size = path.stat().st_size
    command = [sys.executable, "-c", MEASURE, str(small), str(path)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    path.unlink()
    growth, held = map(int, child.stdout.split())
    print(f"{name}: {size / 2**20:.0f} MiB, peak {growth / size:.3f} of it")
    assert held > 0.99 * size > 300e6
    assert growth < 1.2 * size
