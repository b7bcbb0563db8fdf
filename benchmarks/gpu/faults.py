"""What goes wrong on a GPU: memory that runs out, kills, several processes."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.flops import GIB, training_memory
from benchmarks.gpu.room import Line, Room, line, log_of, relative_error, skipped
from mae_core.errors import UserError
from mae_core.recipe import recipe
from mae_core.training import CHECKPOINT_FILE

MICRO_BATCH = 2048
# Deterministic kernels, in which a resumed run must equal an undisturbed one to the bit.
DETERMINISTIC = "import torch; torch.use_deterministic_algorithms(True); import {0} as m; raise SystemExit(m.main())"
# Before it: dies within its second save. Python announces the replacing of a file to hooks.
DIES = """
import os, signal, sys
saves = []

def hook(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith(NAME):
        saves.append(event)
        if len(saves) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
"""
# Two ranks on one GPU: NCCL refuses them, gloo copies through the host.
SHARED_GPU = """
import os, runpy, sys
import torch.distributed as dist
os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
start = dist.init_process_group
dist.init_process_group = lambda backend, **more: start("gloo", **more)
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def out_of_memory(room: Room) -> Iterator[Line]:
    """A micro-batch for which this GPU is too small: halved until it fits, with the numbers of a small one."""
    name = "out of memory"
    if room.rehearsal:
        yield skipped(name, "a CPU has no limit to run into")
        return
    total = torch.cuda.get_device_properties(0).total_memory / GIB
    sizes = ("vit_base_patch16", "vit_large_patch16", "vit_huge_patch14")
    arch = next(
        (a for a in sizes if training_memory(a, recipe(a, "paper"), MICRO_BATCH, False).total > 1.3 * total), ""
    )
    if not arch:
        yield skipped(name, f"{total:.0f} GiB hold {MICRO_BATCH} images of {sizes[-1]}")
        return
    losses, said = [], ""
    for micro_batch in (MICRO_BATCH, 64):
        run = f"memory-{micro_batch}"
        knobs = ("--no-compile", "--set", "epochs=3", "warmup_epochs=1", f"batch={MICRO_BATCH}")
        text = room.run(run, room.pretraining(run, arch, "--micro-batch", str(micro_batch), *knobs))
        said = said or text
        losses.append([epoch["loss"] for epoch in log_of(room.work / run)])
    gap = max(abs(a / b - 1) for a, b in zip(*losses, strict=True))
    halved = said.count("micro-batch reduced")
    figure = (
        f"{arch}, micro-batch {MICRO_BATCH}: halved {halved} times, losses of 3 steps off by {gap:.1e} (allowed 1e-02)"
    )
    yield line(name, halved > 0 and gap <= 1e-2, figure, halved=halved, gap=gap)


def kill_and_resume(room: Room) -> Iterator[Line]:
    """SIGKILL in the middle of a pre-training and of a fine-tuning, then the same command: weights equal to the bit."""
    epochs = room.many(8, 4)
    mae = ["mae_core.pretrain", "--data", str(room.unlabelled), "--arch", "vit_mini_patch8", "--recipe", "mini"]
    mae += ["--set", f"epochs={epochs}", "warmup_epochs=1", f"batch={room.many(128, 16)}", "--save-minutes", "0"]
    tune = ["transfer.classification", "--task", "imagenet_finetune", "--ckpt", "random:vit_mini_patch8", "--recipe"]
    tune += ["mini", "--data", str(room.data), "--save-minutes", "0", "--set", f"epochs={epochs}"]
    tune += ["warmup_epochs=1", f"batch={room.many(64, 8)}"]
    for what, command, weights in (
        ("pre-training", mae, "mae.safetensors"),
        ("fine-tuning", tune, "classifier.safetensors"),
    ):
        call = [*command, "--device", room.device]
        files = [the(room.work / run, weights) for run in resumed(room, what, call)]
        equal = files[0] == files[1]
        figure = "equal to the bit" if equal else "not equal to the bit"
        yield line(f"SIGKILL and resume, {what}", equal, f"{figure} to the undisturbed run, deterministic kernels")


def resumed(room: Room, what: str, call: list[str]) -> Iterator[str]:
    """Run undisturbed, and killed within its second save; the names of both runs' folders."""
    program = DETERMINISTIC.format(f"{call[0]}.__main__" if call[0].startswith("transfer") else call[0])
    env = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    for name in (f"undisturbed-{what}", f"killed-{what}"):
        command = [sys.executable, "-c", program, *call[1:], "--out", str(room.work / name)]
        if name.startswith("killed"):
            dying = [*command[:2], DIES.replace("NAME", repr(CHECKPOINT_FILE)) + program, *command[3:]]
            code = subprocess.run(dying, env={**os.environ, **env}, capture_output=True, check=False).returncode
            if code != -signal.SIGKILL:
                raise UserError(f"{name} ended with {code} before its second save")
        said = room.run(name, command, env)
        if name.startswith("killed") and "resuming" not in said:
            raise UserError(f"{name} did not resume; see {room.work / 'logs'}")
        yield name


def the(folder: Path, name: str) -> bytes:
    """The bytes of the one file of that name below a folder."""
    found = list(folder.rglob(name))
    if len(found) != 1:
        raise UserError(f"{folder} holds {len(found)} files {name}, not one")
    return found[0].read_bytes()


def two_processes(room: Room) -> Iterator[Line]:
    """Two ranks give the weights of one: on one GPU by gloo, and by NCCL where there are two GPUs."""
    knobs = (
        "--recipe",
        "mini",
        "--precision",
        "fp32",
        "--set",
        f"epochs={room.many(4, 1)}",
        "warmup_epochs=0",
        f"batch={room.many(128, 16)}",
    )
    alone = room.pretraining("one-process", "vit_mini_patch8", *knobs)
    room.run("one-process", alone)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = room.work / "shared_gpu.py"
    script.write_text(SHARED_GPU, encoding="utf-8")
    ways = {"gloo": [*torchrun, str(script)]}
    if not room.rehearsal and torch.cuda.device_count() > 1:
        ways["nccl"] = [*torchrun, "-m"]
    else:
        yield skipped("two processes, NCCL", "it needs two GPUs")
    truth = load_file(room.work / "one-process" / "mae.safetensors")
    for way, start in ways.items():
        name = f"two-processes-{way}"
        command = room.pretraining(name, "vit_mini_patch8", *knobs)
        room.run(name, [*start, *command[2:]])
        ours = load_file(room.work / name / "mae.safetensors")
        error = relative_error(*(torch.cat([w[key].flatten().double() for key in truth]) for w in (ours, truth)))
        figure = f"weights after {log_of(room.work / name)[-1]['step']} steps off by {error:.1e} (allowed 1e-04)"
        yield line(f"two processes, {way}", error <= 1e-4, figure, error=error)
