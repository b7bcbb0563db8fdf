"""The machine: how it is used, which is recorded and never part of a recipe, and what it is."""

import argparse
import contextlib
import math
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

from mae_core import distributed
from mae_core.errors import UserError

DRIVERS = {"13": 580, "12": 525}  # the oldest NVIDIA driver for each CUDA (its release notes)


@dataclass(frozen=True)
class Machine:
    """How this machine does the work. Accumulation keeps the effective batch, whatever the micro-batch.

    precision: "fp32", or "bf16" for autocast. micro_batch: images per process and forward pass (0: all of the local
    batch, up to a limit of the task).
    """

    device: str = "cpu"
    precision: str = "fp32"
    precision_given: bool = False  # by the user, not chosen for the device
    micro_batch: int = 0
    workers: int = 0
    activation_checkpointing: bool = False
    compile: bool = False
    fused_adamw: bool = False  # only in pre-training
    processes: int = 1
    threads: int = 1
    save_minutes: float = 10.0  # between two training checkpoints

    def autocast(self) -> contextlib.AbstractContextManager:
        kind = self.device.split(":")[0]
        return torch.autocast(kind, torch.bfloat16, enabled=self.precision == "bf16")


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers(processes: int) -> int:
    # On few cores one process that decodes and computes by turns is faster than two that feed each other.
    return 0 if cores() <= 2 else min(16, cores() // processes)


def machine_from(args: argparse.Namespace, processes: int = 0) -> Machine:
    """The Machine that the flags ask for, with "auto" resolved; UserError if it is not there. processes: those that
    will run (0: those that torchrun has started)."""
    here = processes or distributed.local_world_size()
    processes = processes or distributed.world_size()
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        lacking = unusable_gpu() if device == "cpu" else ""
        if lacking and distributed.is_main():
            print(f"warning: {lacking}; the CPU is used", file=sys.stderr)
        if device == "cpu" and processes > 1:
            raise UserError(
                f"{processes} processes, but torch can use no GPU here: add --device cpu to run them all on the CPU"
            )
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device cuda: {unusable_gpu() or 'torch sees no GPU here'}; use --device cpu")
    if device == "cuda" and here > torch.cuda.device_count():
        seen = torch.cuda.device_count()
        raise UserError(f"{here} processes for {seen} {'GPU' if seen == 1 else 'GPUs'}: start one for each GPU")
    if device == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32 in convolutions too, where torch's default is TF32
    if args.micro_batch < 0:
        raise UserError(f"--micro-batch {args.micro_batch}: give a positive number of images")
    if args.workers < -1:
        raise UserError(f"--workers {args.workers}: give 0 or more processes, or leave it out")
    if not 0 <= args.save_minutes < math.inf:
        raise UserError(f"--save-minutes {args.save_minutes}: give a number of minutes, 0 or more")
    return Machine(
        device=device,
        precision={"auto": "bf16" if device == "cuda" else "fp32"}.get(args.precision, args.precision),
        precision_given=args.precision != "auto",
        micro_batch=args.micro_batch,
        workers=args.workers if args.workers >= 0 else default_workers(here),
        activation_checkpointing=args.activation_checkpointing,
        compile=args.compile and can_compile(device),
        processes=processes,
        threads=torch.get_num_threads(),
        save_minutes=args.save_minutes,
    )


@contextlib.contextmanager
def lack_of_memory_named() -> Iterator[None]:
    """torch.OutOfMemoryError also where it is a library of CUDA that gets no memory: they ask for their own beside what
    torch has taken, which can be all. Seen on an H200: cublasCreate in the first backward pass of a large batch."""
    try:
        yield
    except RuntimeError as e:
        if re.search(r"CU\w+_STATUS_ALLOC_FAILED|CUDA error: out of memory", str(e)):
            raise torch.OutOfMemoryError(str(e)) from e
        raise


def unusable_gpu(driver: Path = Path("/proc/driver/nvidia/version")) -> str:
    """Why torch cannot use the NVIDIA GPU of this machine; "" if there is none, or if it is hidden from torch."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    if hidden or not driver.exists() or torch.cuda.is_available():
        return ""
    found = re.search(r"(\d+)\.\d+(?:\.\d+)?", driver.read_text())
    version = found[0] if found else "of an unknown version"
    if torch.version.cuda is None:
        return f"this machine has an NVIDIA GPU, but torch {torch.__version__} was built without CUDA"
    built = f"torch {torch.__version__} for CUDA {torch.version.cuda}"
    wanted = DRIVERS.get(torch.version.cuda.split(".")[0])
    if wanted and found and int(found[1]) < wanted:
        return f"this machine's NVIDIA driver {version} is too old for {built}, which needs {wanted} or newer"
    return f"this machine has an NVIDIA GPU (driver {version}), but {built} cannot use it"


def can_compile(device: str) -> bool:
    """Whether torch.compile finds what it needs, a compiler and Python's headers; says so if not."""
    variable, names = ("CC", ("gcc", "clang")) if device.startswith("cuda") else ("CXX", ("g++", "clang++"))
    asked = os.environ.get(variable)
    if not any(shutil.which(name) for name in ([asked] if asked else names)):
        lacking = f"a compiler ({asked or ' or '.join(names)})"
    elif not Path(sysconfig.get_path("include"), "Python.h").exists():
        lacking = f"Python.h (Debian: apt install python{sys.version_info[0]}.{sys.version_info[1]}-dev)"
    else:
        return True
    if distributed.is_main():
        print(f"note: torch.compile needs {lacking}, which is not here: going on without it", flush=True)
    return False


def suit_attention(model: nn.Module, machine: Machine) -> None:
    """On a CPU in bf16, turn off fused attention in timm's layers: its backward pass took half of a whole pre-training
    step there (775 images/s with it, 1623 without, for vit_mini_patch8 on two cores)."""
    if machine.device == "cpu" and machine.precision == "bf16":
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False  # type: ignore[assignment]  # torch says: a Tensor or a Module


def peak_memory_gib(device: str) -> float:
    """Peak memory so far in GiB: of the GPU, or this process's resident memory on CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")
    # Not ru_maxrss: at exec Linux hands a child the peak of its parent.
    if status.exists() and (kibibytes := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(kibibytes[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # bytes on macOS


def hardware(machine: Machine) -> str:
    """What the work runs on, as the records name it."""
    if machine.device.startswith("cuda"):
        return f"{machine.processes}x {torch.cuda.get_device_name()}"
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


def versions(further: Sequence[str] = ()) -> dict[str, str]:
    """Versions of Python, of the libraries behind every number, and of those further ones that are installed."""
    found = {"python": platform.python_version()}
    for name in ("torch", "torchvision", "timm", "numpy", "pillow", *further):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


COMMIT_FILE = "COMMIT"


@cache
def commit() -> str:
    """The commit of the checkout that tracks this file, with "-dirty" where tracked files differ from it; in a bundle
    (benchmarks/gpu_bundle.py) the one it was made from. Empty without one, also where a wheel is installed inside
    another project's checkout. Asked once for a process and its forks, to be called when it begins its work: the
    sources may change while it runs."""
    path = Path(__file__).resolve()
    bundled = path.parent.parent / COMMIT_FILE
    if bundled.exists():
        return bundled.read_text(encoding="utf-8").strip()

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(path.parent), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        head = git("rev-parse", "HEAD") if git("ls-files", path.name) else ""
        return head + ("-dirty" if head and git("status", "--porcelain", "--untracked-files=no") else "")
    except FileNotFoundError:  # no git on this machine
        return ""
