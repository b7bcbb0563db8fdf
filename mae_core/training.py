"""One training as a value, its state, and both on disk: the checkpoint to resume from, and the log."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mae_core import distributed
from mae_core.checkpoint import read_state, save_pickle
from mae_core.data import Samples
from mae_core.errors import UserError
from mae_core.files import printable
from mae_core.machine import Machine
from mae_core.settings import differences
from mae_core.writing import open_to_append, write_text

CHECKPOINT_FILE = "checkpoint.pth"
LOG_FILE = "log.jsonl"
FORMAT = "mae-transfer training"


@dataclass(frozen=True)
class Training:
    """One training without its model and optimizer.

    batch: the effective batch over all processes. micro_batch: images per process and forward pass. prepared: images
    that `prepare` gets at a time, a multiple of micro_batch (0: micro_batch).
    lr_at: step -> learning rate. prepare: (images, labels, step, index of the first image in the effective batch) ->
    the tensors of its forward passes, all with the batch first. loss_of: (model, *tensors) -> mean loss.
    fixed: what must be equal in a resumed run. tracker: where its curves go besides TensorBoard. repeats: samples of
    each image in a batch. after_epoch: called by every process with the number of epochs done and the state; what it
    returns enters the epoch's line of the log. before_step: called with the step, once its gradients are complete and
    before the optimizer uses them. synchronised: the forward pass waits for the other processes, as
    SyncBatchNorm's does.
    """

    label: str
    work: Path
    dataset: Samples
    epochs: int
    batch: int
    micro_batch: int
    seed: int
    machine: Machine
    fixed: dict[str, Any]
    lr_at: Callable[[int], float]
    prepare: Callable[[Tensor, Tensor, int, int], tuple[Tensor, ...]]
    loss_of: Callable[..., Tensor]
    tracker: str = ""
    repeats: int = 1
    after_epoch: Callable[[int, "State"], dict[str, Any]] | None = None
    prepared: int = 0
    synchronised: bool = False
    before_step: Callable[[int], None] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return len(self.dataset) // self.batch

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch


@dataclass
class State:
    """How far the training is; saved with the weights."""

    step: int = 0
    loss_sum: float = 0.0  # over the current epoch's steps
    seconds: float = 0.0
    micro_batch: int = 0
    notes: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()  # images of all processes that were replaced by black


def unreadable_metadata(state: State) -> dict[str, str]:
    """What a file of trained weights says about the images that were replaced by black; nothing if there were none."""
    return {"unreadable": json.dumps([printable(name) for name in state.unreadable])} if state.unreadable else {}


def diverged(what: str, step: int, t: Training) -> UserError:
    kept = t.work / CHECKPOINT_FILE
    after = f"{kept} holds the last good state" if kept.exists() else "no checkpoint was written yet"
    return UserError(
        f"{what} at step {step} (epoch {step // t.steps_per_epoch}, lr {t.lr_at(step):.2e}): stopped; {after}; "
        f"a lower base_lr, a longer warm-up or --precision fp32 may help"
    )


def restart(work: Path) -> str:
    """What a run that ends early goes on from, as part of a sentence."""
    there = (work / CHECKPOINT_FILE).exists()
    return "the run goes on from its last checkpoint" if there else "no checkpoint was written yet"


def end_epoch(t: Training, state: State, lr: float, images_per_second: float, found: dict[str, Any]) -> None:
    """One JSON line: mean loss over the epoch and all processes, rate, time, and what after_epoch found."""
    sums = distributed.gather_to_all(state.loss_sum)
    state.loss_sum = 0.0
    if not distributed.is_main():
        return
    line = {
        "epoch": state.step // t.steps_per_epoch - 1,
        "step": state.step,
        "loss": sum(sums) / (len(sums) * t.steps_per_epoch),  # rounded once: a save has made means of the sums
        "lr": lr,
        "images_per_second": round(images_per_second, 1),
        "seconds": round(state.seconds, 1),
        **found,
    }
    with open_to_append(t.work / LOG_FILE) as log:
        log.write(json.dumps(line) + "\n")


def truncate_log(path: Path, epochs: int) -> None:
    """Keep the first `epochs` lines: a killed run may have logged epochs that it now repeats. UserError if it holds no
    text."""
    if path.exists() and distributed.is_main():
        try:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        except UnicodeDecodeError:
            raise UserError(f"{path} is no log of a training: move it away or delete it") from None
        write_text(path, "".join(lines[:epochs]))


def save(model: nn.Module, optimizer: Any, t: Training, state: State, ema: Any) -> None:
    """Write the checkpoint atomically: the old one stays until the new one is whole. If a weight is not finite, which
    the loss shows only in the next step, UserError, and the old one stays."""
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise diverged("a weight became infinite or NaN", state.step - 1, t)
    content = {
        "format": FORMAT,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "ema": ema.module.state_dict() if ema is not None else {},
        "state": dataclasses.asdict(state),
        "fixed": t.fixed,
        "machine": rounding_settings(t),
    }
    save_pickle(t.work / CHECKPOINT_FILE, content)


def rounding_settings(t: Training) -> dict[str, Any]:
    """What the weights' last bits depend on besides the recipe and the seed."""
    m = t.machine
    return {
        "device": m.device.split(":")[0],
        "precision": m.precision,
        "micro_batch": t.micro_batch,
        "activation_checkpointing": m.activation_checkpointing,
        "compile": m.compile,
        "fused_adamw": m.fused_adamw,
        "processes": m.processes,
        "threads": m.threads,
        "torch": str(torch.__version__),
    }


# What may be raised while a checkpoint is loaded: by one that was changed or is of another version, or by the device.
UNLOADABLE = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def unloadable(path: Path, error: Exception) -> UserError:
    """What to say of a checkpoint whose loading ended with one of UNLOADABLE. Nobody should delete it because the
    device failed."""
    problem = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    if isinstance(error, torch.OutOfMemoryError):
        return UserError(f"no memory on the device for {path} ({problem}): free some there, then start again")
    if str(error).startswith("CUDA"):
        return UserError(f"the device failed while {path} was loaded ({problem}): the file is untouched, start again")
    return UserError(f"{path} does not fit this model ({problem}): delete it, or choose another --out")


def resume(model: nn.Module, optimizer: Any, t: Training, state: State, ema: Any) -> None:
    """Load the work folder's checkpoint, if there is one, into all of these. UserError if it is of another run."""
    path = t.work / CHECKPOINT_FILE
    if not path.exists():
        return
    try:
        content: Any = read_state(path)
        ours = content["format"] == FORMAT
    except Exception:  # a damaged or foreign pickle fails in any way
        ours = False
    if not ours:
        raise UserError(f"{path} is damaged or no training checkpoint of ours: delete it, or choose another --out")
    try:
        changed = differences(as_json(content["fixed"]), as_json(t.fixed))
        if changed:
            raise UserError(f"{path} is of another run ({'; '.join(changed)}): choose another --out")
        model.load_state_dict(content["model"])
        for group, ours in zip(content["optimizer"]["param_groups"], optimizer.param_groups):
            group |= {flag: ours[flag] for flag in ("foreach", "fused") if flag in ours}
        optimizer.load_state_dict(content["optimizer"])
        if ema is not None:
            ema.module.load_state_dict(content["ema"])
        kept = {"unreadable": ()} | content["state"]  # which a checkpoint of an earlier version does not have
        for field in dataclasses.fields(state):
            setattr(state, field.name, type(getattr(state, field.name))(kept[field.name]))
        if content["machine"]["micro_batch"] != t.micro_batch:
            state.micro_batch = t.micro_batch  # asked for anew; otherwise it stays as reduced for lack of memory
        moved = differences(content["machine"], rounding_settings(t))
    except UNLOADABLE as e:
        raise unloadable(path, e) from None
    if moved:
        # Drop path draws for a micro-batch as a whole.
        draws = " and the draws of drop path" * any(one.startswith("micro_batch:") for one in moved)
        note = f"resumed at step {state.step} on a changed machine ({'; '.join(moved)}): equal but for rounding{draws}"
        state.notes += (note,)
    if distributed.is_main():
        print(f"resuming {t.label} at step {state.step}/{t.steps}", *moved, sep="; ", flush=True)


def check_agreement(work: Path, step: int, images: int, fixed: dict[str, Any]) -> None:
    """UserError in every process unless all go on from the same step of the same run: one whose node does not see the
    checkpoint, or other data, would train other weights, or wait for ever."""
    found = [{"step": s, "images": n, **f} for s, n, f in distributed.gather_to_all((step, images, as_json(fixed)))]
    for rank, theirs in enumerate(found):
        if differs := differences(found[0], theirs):
            what = f"processes 0 and {rank} do not go on from the same place ({'; '.join(differs)})"
            raise UserError(f"{what}: --out {work} and the data must be the same on all nodes")


def as_json(value: dict[str, Any]) -> dict[str, Any]:
    """The value as JSON returns it: a tuple and the list it may have become then compare equal."""
    return json.loads(json.dumps(value))
