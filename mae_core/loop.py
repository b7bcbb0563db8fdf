"""The training loop that pre-training and every classifier share: accumulation, DDP, progress, and exact resume.

Everything random is a function of (seed, step, position), never of what ran before: a killed run resumes from its last
checkpoint and ends with the same weights, and a sample's augmentation does not depend on the number of processes or
workers. With three processes or more the weights are equal to rounding: the first steps of each start add gradients up
in another order.
"""

import math
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mae_core import distributed
from mae_core.data import TrainingStream, UnreadableFiles, loader, seed_all
from mae_core.errors import UserError
from mae_core.files import printable
from mae_core.machine import Machine, lack_of_memory_named, suit_attention
from mae_core.optim import set_learning_rate
from mae_core.progress import Progress
from mae_core.stopping import stop_requested
from mae_core.tracker import Curves, Run
from mae_core.training import (
    LOG_FILE,
    State,
    Training,
    check_agreement,
    diverged,
    end_epoch,
    restart,
    resume,
    save,
    truncate_log,
)
from mae_core.workers import dead_workers_explained

CAREFUL_STEPS = 2  # of each start: Adam's state comes with the end of the first, so the second takes more memory
FLUSH_STEPS = 10  # losses stay on the device for so many steps, so that the GPU never waits for them


def micro_batch_for(local_batch: int, wanted: int) -> int:
    """The largest divisor of local_batch, a process's part of the batch, that is at most `wanted`."""
    return max(n for n in range(1, min(local_batch, wanted) + 1) if local_batch % n == 0)


def check_batch(images: int, batch: int, where: str) -> None:
    """UserError if an epoch would have no step or the batch does not divide among the processes."""
    world = distributed.world_size()
    if batch < 1 or batch % world:
        raise UserError(f"a batch of {batch} cannot be shared by {world} processes: choose a multiple of {world}")
    if images < batch:
        raise UserError(
            f"{where} has {images} images, less than one batch of {batch}: set a smaller batch (--set batch=N)"
        )


def batch_within(batch: int, images: int) -> int:
    """The batch, or the largest power of two that so few images fill."""
    return batch if images >= batch else 1 << (max(images, 1).bit_length() - 1)


def batch_objections(images: int, batch: int, processes: int, part: str = "") -> Iterator[tuple[str, str]]:
    """(knob or flag, why an epoch would have no step or the processes no equal parts). part: of all images, which."""
    if images < batch:
        yield "batch", f"{images} training images{part} are less than one batch={batch}: set a smaller batch"
    if batch % processes:
        yield "--gpus", f"batch={batch} cannot be shared by {processes} processes: --gpus must divide it"


def batchnorm_objections(local_batch: int, machine: Machine) -> Iterator[tuple[str, str]]:
    """(knob or flag, why) where a BatchNorm that is not synchronised would see one image at a time."""
    if micro_batch_for(local_batch, machine.micro_batch or local_batch) == 1:
        flag = "--gpus" if machine.processes > 1 else "batch"
        flag = "--micro-batch" if machine.micro_batch == 1 else flag
        yield flag, "BatchNorm cannot learn from one image at a time: give each process 2 or more"


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, training: Training, ema: Any = None) -> State:
    """Train to the end, from the checkpoint in training.work if there is one. Ctrl-C, SIGTERM and SIGHUP save first,
    then raise KeyboardInterrupt. A loss that is not finite raises UserError and leaves the last checkpoint as it was.
    """
    t, main = training, distributed.is_main()
    state = State(micro_batch=t.micro_batch)
    resume(model, optimizer, t, state, ema)
    check_agreement(t.work, state.step, len(t.dataset), t.fixed)
    if state.step >= t.steps:
        return with_unreadable(state)
    unreadable = UnreadableFiles(state.unreadable)
    truncate_log(t.work / LOG_FILE, state.step // t.steps_per_epoch)
    suit_attention(model, t.machine)
    forward = model
    if t.machine.compile:
        # Not dynamic: a reduced micro-batch would make one graph for all sizes, which is slower.
        if distributed.is_main():  # or the first step would look like a hang
            print("compiling: the first step takes from half a minute to some minutes", flush=True)
        forward = torch.compile(model, dynamic=False)  # type: ignore[assignment]  # which is a module too
    if distributed.world_size() > 1:
        # No broadcast: each process keeps its own BatchNorm statistics, and a target's tensors are equal everywhere.
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # what replaces it starts with one
            forward = DistributedDataParallel(forward, broadcast_buffers=False)
    model.train()
    progress = Progress(t.label, t.steps, state.step, enabled=main, unit="it")
    waiting: list[tuple[int, Tensor]] = []
    seconds_before, started, saved = state.seconds, time.monotonic(), time.monotonic()
    batches, note, careful = steps_of(t, state.step, unreadable), "", state.step + CAREFUL_STEPS

    curves = Curves(Run(t.work, state.step, t.label, t.fixed), t.tracker)
    with curves, dead_workers_explained(), stop_requested() as stop:
        for step in range(state.step, t.steps):
            lr = t.lr_at(step)
            set_learning_rate(optimizer, lr)
            loss = train_step(forward, optimizer, next(batches), step, t, state, careful=step < careful)
            if ema is not None:
                ema.update(model)
            waiting.append((step, loss))
            state.step = step + 1
            state.seconds = seconds_before + time.monotonic() - started
            end_of_epoch = state.step % t.steps_per_epoch == 0
            due = main and time.monotonic() - saved >= 60 * t.machine.save_minutes
            # All save and stop after the same step: otherwise one would wait for gradients that never come.
            due, stopping = distributed.any_process(due, bool(stop))
            ended = state.step == t.steps
            if len(waiting) >= FLUSH_STEPS or end_of_epoch or due or stopping or ended:
                last_loss = flush(waiting, state, t)
                note = f"epoch {step // t.steps_per_epoch + 1}/{t.epochs} loss {last_loss:.4f} lr {lr:.2e}"
                curves.training(step, last_loss, lr, progress.rate())
            progress.update(state.step, t.batch, note)
            if end_of_epoch or due or stopping:
                state.unreadable = unreadable.of_all_processes()
            if end_of_epoch:
                before = time.monotonic()
                found = t.after_epoch(state.step // t.steps_per_epoch, state) if t.after_epoch else {}
                started += time.monotonic() - before  # evaluation is not training time
                progress.started += time.monotonic() - before
                end_epoch(t, state, lr, progress.rate(), found)
                curves.evaluation(step, found)
            if due or stopping or ended:
                # There is one checkpoint for all processes: each resumes from the mean of their losses.
                losses = distributed.gather_to_all(state.loss_sum)
                state.loss_sum = sum(losses) / len(losses)
                if main:
                    save(model, optimizer, t, state, ema)
                saved = time.monotonic()
            if stopping:
                distributed.barrier()  # torchrun ends the others with the first that leaves: none before it is saved
                raise KeyboardInterrupt
    return with_unreadable(state)


def with_unreadable(state: State) -> State:
    """The state with a note on the images that could not be read, if there were any."""
    if names := state.unreadable:
        what = f"{len(names)} training images could not be read and were replaced by black"
        state.notes += (f"{what}: {', '.join(map(printable, names))}",)
    return state


def steps_of(t: Training, first_step: int, unreadable: UnreadableFiles) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The (images, labels) of each step from first_step on, for this process, in the parts that `prepare` gets."""
    local_batch, size = t.batch // distributed.world_size(), t.prepared or t.micro_batch
    stream = TrainingStream(len(t.dataset), t.batch, size, t.seed, first_step, t.steps, t.repeats)
    chunks, parts = [], local_batch // size
    for images, labels, bad in loader(t.dataset, stream, t.machine.workers, t.machine.device, held=parts + 1):
        unreadable.add(bad)
        chunks.append((images, labels))
        if len(chunks) == parts:
            yield chunks
            chunks = []


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    chunks: list[tuple[Tensor, Tensor]],
    step: int,
    t: Training,
    state: State,
    careful: bool,
) -> Tensor:
    """One optimizer step over the effective batch; returns this process's mean loss. Out of memory halves the
    micro-batch and repeats the step. Several processes must agree on that: they can in careful steps, where gradients
    are averaged by hand after all have computed theirs, and where no forward pass waits for the others. UserError
    where a step cannot be repeated."""
    parallel = isinstance(model, DistributedDataParallel)
    agreeing = parallel and careful and not t.synchronised
    while True:
        optimizer.zero_grad(set_to_none=True)
        try:
            with lack_of_memory_named():
                loss = accumulate(model, chunks, step, t, state.micro_batch, sync=parallel and not agreeing)
            failed = False
        except torch.OutOfMemoryError:
            failed = True
        if not (distributed.any_process(failed)[0] if agreeing else failed):
            if agreeing:
                average_gradients(model)
            failed = not updated(optimizer, step, t, state)
            if not (distributed.any_process(failed)[0] if agreeing else failed):
                return loss
            if not failed:
                raise out_of_memory(step, t, state, ", in another process's update of the weights")
        if (parallel and not agreeing) or state.micro_batch == 1:
            raise out_of_memory(step, t, state)
        torch.cuda.empty_cache()
        state.micro_batch = max(1, state.micro_batch // 2)
        note = f"out of GPU memory: micro-batch reduced to {state.micro_batch}, effective batch kept"
        state.notes += (note,)
        if distributed.is_main():
            print(note, flush=True)


def average_gradients(model: nn.Module) -> None:
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= distributed.world_size()


def updated(optimizer: torch.optim.Optimizer, step: int, t: Training, state: State) -> bool:
    """Take the optimizer's step; False if memory ran out before it changed anything, so that it can be repeated.
    UserError if it had."""

    def versions() -> dict[int, int]:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        kept = [value for values in optimizer.state.values() for value in values.values()]
        return {id(one): one._version for one in (*parameters, *kept) if isinstance(one, Tensor)}

    before = versions()
    try:
        with lack_of_memory_named():
            if t.before_step is not None:
                t.before_step(step)
            optimizer.step()
        return True
    except torch.OutOfMemoryError:
        failed = versions()
    if any(version != before.get(one, 0) for one, version in failed.items()):
        raise out_of_memory(step, t, state, ", in the update of the weights")
    return False


def out_of_memory(step: int, t: Training, state: State, where: str = "") -> UserError:
    return UserError(
        f"out of GPU memory at step {step} with a micro-batch of {state.micro_batch}{where}: start again with a "
        f"smaller --micro-batch or --activation-checkpointing; {restart(t.work)}"
    )


def accumulate(model: nn.Module, chunks: list, step: int, t: Training, micro_batch: int, sync: bool) -> Tensor:
    """Forward and backward over all micro-batches; gradients of the mean. sync: DDP averages them in the last one."""
    local_batch = t.batch // distributed.world_size()
    total = torch.zeros((), device=t.machine.device)
    first = distributed.rank() * local_batch
    for number, (images, labels) in enumerate(chunks):
        seed_all(t.seed, step, first, device=t.machine.device)
        images = images.to(t.machine.device, non_blocking=True)
        labels = labels.to(t.machine.device, non_blocking=True)
        tensors = t.prepare(images, labels, step, first)
        first += len(images)
        for start in range(0, len(images), micro_batch):
            part = [tensor[start : start + micro_batch] for tensor in tensors]
            last = number == len(chunks) - 1 and start + micro_batch >= len(images)
            averaging = sync and last
            with model.no_sync() if isinstance(model, DistributedDataParallel) and not averaging else nullcontext():
                with t.machine.autocast():
                    loss = t.loss_of(model, *part) * (len(part[0]) / local_batch)
                loss.backward()
            total += loss.detach()
    return total


def flush(waiting: list[tuple[int, Tensor]], state: State, t: Training) -> float:
    """Fetch the losses from the device; UserError for the first that is not finite. Returns the last."""
    values = torch.stack([loss for _, loss in waiting]).tolist()
    for (step, _), value in zip(waiting, values):
        if not math.isfinite(value):
            raise diverged(f"the loss is {value}", step, t)
    state.loss_sum += sum(values)
    waiting.clear()
    return values[-1]
