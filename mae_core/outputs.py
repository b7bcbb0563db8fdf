"""What a model says of images: one loop over them, each exactly once, whatever the number of processes."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mae_core import distributed
from mae_core.data import Images, Normalization, loader, normalize
from mae_core.decode import why_unreadable
from mae_core.errors import UserError
from mae_core.machine import Machine, lack_of_memory_named
from mae_core.progress import Progress


@torch.inference_mode()
def outputs_of(
    model: nn.Module, dataset: Images, normalization: Normalization, machine: Machine, label: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """The model's output and the labels, for each of this process's batches (`distributed.local_batches`). UserError in
    every process if an image cannot be read in one."""
    model.eval()
    batches = distributed.local_batches(len(dataset), machine.micro_batch or 128)
    progress = Progress(label, len(dataset), enabled=distributed.is_main())
    unreadable: list[str] = []
    done, size = 0, machine.micro_batch or 128
    read = loader(dataset, batches, machine.workers, machine.device, held=2)
    batch = next(read, None)
    while batch is not None:
        images, labels, unreadable = batch
        if unreadable:
            break
        outputs, size = forward(model, images, normalization, machine, size)
        batch = next(read, None)  # while a GPU computes, for whose results whoever takes them waits
        yield outputs, labels
        done += len(images)
        progress.update(min(len(dataset), done * distributed.world_size()), len(images))
    # All processes stop together: one that stopped by itself would leave the others waiting.
    if bad := [name for names in distributed.gather_to_all(unreadable) for name in names]:
        what = f"{bad[0]} cannot be read as an image ({why_unreadable(bad[0])}): replace it"
        raise UserError(f"{what}; no number is given over part of the data")


def forward(
    model: nn.Module, images: Tensor, normalization: Normalization, machine: Machine, size: int
) -> tuple[Tensor, int]:
    """The model's output in float32 for uint8 images, which are normalised here, `size` at a time; when GPU memory runs
    out, half as many. Also returns the size that worked, for the next batch to begin with."""
    outputs: list[Tensor] = []
    try:
        images = images.to(machine.device, non_blocking=True)
        for part in images.split(size):
            with lack_of_memory_named(), machine.autocast():
                outputs.append(model(normalize(part, normalization)).float())
        return torch.cat(outputs), size
    except torch.OutOfMemoryError:
        if min(size, len(images)) == 1:
            raise
    outputs.clear()
    torch.cuda.empty_cache()
    return forward(model, images, normalization, machine, min(size, len(images)) // 2)
