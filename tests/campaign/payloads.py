"""Pickles that run a command when they are unpickled, in every kind of file that is read: none runs."""

import io
import pickle
import shutil
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from tests.campaign.cases import Case, no_traceback, require
from tests.campaign.kills import undisturbed
from tests.campaign.starts import Done, call, descendants, finish, kill_all, start
from tests.campaign.tiny import World, pipelines, pretraining
from tests.fixtures.checkpoint import ENCODER, Attack

KIND = "pickle payloads"


def zipped(attack: Attack) -> bytes:
    file = io.BytesIO()
    torch.save({"model": ENCODER, "args": attack}, file)
    return file.getvalue()


def legacy(attack: Attack) -> bytes:
    file = io.BytesIO()
    torch.save({"model": ENCODER, "args": attack}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def bare(attack: Attack) -> bytes:
    return pickle.dumps({"model": attack})


def array(attack: Attack) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([attack], dtype=object), allow_pickle=True)
    return file.getvalue()


def arrays(attack: Attack) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("blocks.0.attn.qkv.weight.npy", array(attack))
    return file.getvalue()


def inside_a_tensor(attack: Attack) -> bytes:
    """Where a tensor's storage type should be."""
    file = io.BytesIO()
    torch.save({"model": {**ENCODER, "norm.weight": [ENCODER["norm.weight"], attack]}}, file)
    return file.getvalue()


WAYS: dict[str, Callable[[Attack], bytes]] = {
    "zip": zipped, "old": legacy, "bare": bare, "array": array, "arrays": arrays, "inside": inside_a_tensor,
}  # fmt: skip
NAMES = ("a.pth", "a.pt", "a.bin", "a.ckpt", "a.pkl", "a.npz", "a.npy", "a.safetensors", "pytorch_model.bin")


def nothing_ran(victim: Path, done: Done | None = None) -> None:
    require(not victim.exists(), "the payload ran", done)


def try_checkpoint(world: World, way: str, work: Path) -> None:
    """Under every name that a checkpoint may have, by every command that reads one."""
    victim = work / "victim"
    content = WAYS[way](Attack(victim))
    commands = [
        ["-m", "mae_core.checkpoint"],
        ["-m", "mae_core.reconstruct", "--images", world.images, "--out", "a.png", "--ckpt"],
    ]
    for name in NAMES:
        path = work / name
        path.write_bytes(content)
        for command in commands if name == "a.pth" else commands[:1]:
            done = call([*command, path], work, 60)
            nothing_ran(victim, done)
            no_traceback(done, work)
        path.unlink()


def try_tokenizer(world: World, way: str, work: Path) -> None:
    victim = work / "victim"
    (work / "encoder.pkl").write_bytes(WAYS[way](Attack(victim)))
    command = [*pretraining(world, epochs=2), "target=tokens", "tokenizer=dall-e", "--tokenizer", work / "encoder.pkl"]
    done = call(command, work, 60)
    nothing_ran(victim, done)
    no_traceback(done, work)
    require(done.code, "accepted", done)


def try_state(world: World, name: str, way: str, work: Path) -> None:
    """In place of a saved training, and of every other file of a killed run that holds numbers."""
    command, log, victim = pipelines(world)[name], work / "printed.txt", work / "victim"
    process = start(command, work, log)
    while not (states := [p for p in work.glob("out/**/*") if p.suffix in (".pth", ".pt")]) and process.poll() is None:
        time.sleep(0.01)
    kill_all([process.pid, *descendants(process.pid)])
    process.wait()
    require(states, "no state was saved before the run ended", finish(process, log, 1))
    content = WAYS[way](Attack(victim))
    for path in work.glob("out/**/*"):
        if path.suffix in (".pth", ".pt", ".safetensors", ".npz", ".pkl"):
            path.write_bytes(content)
    done = call(command, work, 200)
    nothing_ran(victim, done)
    no_traceback(done, work)


def try_leftovers(world: World, way: str, work: Path) -> None:
    """In place of the features, the classifier and the targets of a run that has ended, with its records gone."""
    victim, name = work / "victim", "fine-tuning, probing, k-NN, A, R, C"
    shutil.copytree(undisturbed(name, world).folder / "out", work / "out")
    content = WAYS[way](Attack(victim))
    for path in (work / "out").rglob("*"):
        if path.suffix in (".safetensors", ".npz", ".pth"):
            path.write_bytes(content)
    for path in (work / "out").rglob("record.json"):
        if "imagenet_finetune" not in str(path):
            path.unlink()
    done = call(pipelines(world)[name], work, 300)
    nothing_ran(victim, done)
    no_traceback(done, work)


def cases(world: World) -> list[Case]:
    found = [
        Case(
            KIND, f"a checkpoint, {way}", partial(try_checkpoint, world, way), small=way == "zip", tries=len(NAMES) + 1
        )
        for way in WAYS
    ]
    found += [Case(KIND, f"the tokenizer, {way}", partial(try_tokenizer, world, way)) for way in ("zip", "old", "bare")]
    states = ("fine-tuning, probing, k-NN, A, R, C", "coco", "ade20k", "pre-training", "ablations")
    found += [
        Case(KIND, f"a saved state of {name}, {way}", partial(try_state, world, name, way))
        for name in states
        for way in ("zip", "old")
    ]
    return [*found, Case(KIND, "features and classifier in a shared folder", partial(try_leftovers, world, "zip"))]
