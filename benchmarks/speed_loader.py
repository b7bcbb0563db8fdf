"""Reading training images, beside the limit: what it takes to decode the same files and nothing else."""

import collections
import io
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from torchvision.transforms import v2

from benchmarks.markdown import markdown_table
from benchmarks.timing import Timing, alternate
from mae_core import native
from mae_core.data import (
    IMAGENET_NORMALIZATION,
    MEAN,
    PREFETCH,
    STD,
    Images,
    TrainingStream,
    loader,
    normalize,
    pretraining_transform,
)
from mae_core.errors import UserError
from mae_core.listing import images_or_shards
from mae_core.machine import Machine, suit_attention
from mae_core.outputs import outputs_of
from mae_core.shards import bytes_of, list_shards
from mae_core.vit import build_vit, get_arch
from transfer.data.transforms import eval_transform

Workload = Callable[[], object]
OURS, NORMALISED, EVALUATION = "ours", "ours, normalised on the CPU", "evaluation images"
UNCOMPILED = "ours, without the compiled reader"
IMAGE_FOLDER = "torchvision's ImageFolder and Pillow, normalised"
RESIZE = "only crop and resize: torchvision"
DECODE = "only decode: "
IN_MEMORY = 2000  # files, at most, that are kept for the arms that do not read
GOAL = 20_000  # images/s: eight GPUs at 2,500 each


@dataclass(frozen=True)
class Arm:
    """One way to read `images` at a time. seconds: of CPU time without workers, else of the clock."""

    name: str
    workers: int
    images: int
    timing: Timing

    @property
    def rate(self) -> float:
        return self.images / self.timing.median


def read_arms(
    data: Path, arch: str, batch: int, counts: Sequence[int], warmup: int, repeats: int, machine: Machine
) -> list[Arm]:
    """The arms on one core by turns, then ours with each of these numbers of worker processes, and evaluation images
    with the last."""
    size = get_arch(arch).image_size
    files, folder = files_of(data, size)
    if len(files) < batch:
        raise UserError(f"{data} has {len(files)} images, fewer than one batch of {batch}: give a smaller --batch")
    workloads = on_one_core(files, folder, size, batch)
    timings = alternate(workloads, warmup, repeats, "cpu", time.process_time)
    arms = [Arm(name, 0, batch, timing) for name, timing in timings.items()]
    dataset = Images(files, pretraining_transform(size))
    for count in counts:
        batches = ours(dataset, batch, count, machine.device)
        arms.append(with_workers(OURS, batches, batch, count, repeats))
    if counts:
        arms += evaluations(files, arch, batch, repeats, replace(machine, workers=counts[-1]))
    return arms


def files_of(data: Path, size: int) -> tuple[list[str], datasets.ImageFolder | None]:
    """The images, and torchvision's view of them with the official script's transforms, all by Pillow; None of tars."""
    if list_shards(data):
        return images_or_shards(data), None
    crop = transforms.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=3)
    steps = [crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    try:
        folder = datasets.ImageFolder(str(data), transforms.Compose(steps))
    except FileNotFoundError:
        raise UserError(f"{data} has no class folders with images, as torchvision's ImageFolder reads them") from None
    return [file for file, _ in folder.samples], folder


def on_one_core(files: list[str], folder: datasets.ImageFolder | None, size: int, batch: int) -> dict[str, Workload]:
    """{arm: its next batch}, in this process. Ours is a batch as it goes to the device, uint8."""
    dataset, jpegs = Images(files, pretraining_transform(size)), []
    for index in torch.randperm(len(files), generator=torch.Generator().manual_seed(0))[:IN_MEMORY].tolist():
        content = bytes_of(dataset.files[index])
        jpegs += [content] if content.startswith(b"\xff\xd8\xff") else []
    workloads: dict[str, Workload] = {OURS: partial(next, as_worker(dataset, batch))}
    if native.library() is not None:
        workloads[UNCOMPILED] = partial(uncompiled, as_worker(dataset, batch))
    if jpegs:
        arms = decoders(jpegs) | {RESIZE: resizing(jpegs, size)}
        workloads |= {name: partial(each, itertools.cycle(works), batch) for name, works in arms.items()}
    floats = map(normalize, as_worker(dataset, batch))
    workloads[NORMALISED] = partial(next, floats)
    if folder is not None:
        workloads[IMAGE_FOLDER] = partial(next, theirs(folder, batch))
    return workloads


def as_worker(dataset: Images, batch: int) -> Iterator[Tensor]:
    """Batches as one of the loader's workers makes them: in turn in its pieces of memory."""
    like = dataset[0][0]
    pieces = [like.new_zeros(batch, *like.shape) for _ in range(PREFETCH + 1)]
    for number, samples in enumerate(TrainingStream(len(dataset), batch, batch, 0, 0, 10**6)):
        yield dataset.batch(samples, pieces[number % len(pieces)]).images


def ours(dataset: Images, batch: int, workers: int, device: str) -> Iterator[Tensor]:
    stream = TrainingStream(len(dataset), batch, batch, 0, 0, 10**6)
    return (images for images, _, _ in loader(dataset, stream, workers, device))


def uncompiled(batches: Iterator[Tensor]) -> None:
    kept, native.library = native.library, lambda: None  # type: ignore[assignment]
    try:
        next(batches)
    finally:
        native.library = kept


def theirs(folder: datasets.ImageFolder, batch: int) -> Iterator[Tensor]:
    while True:
        yield from (images for images, _ in DataLoader(folder, batch, shuffle=True, drop_last=True))


def each(works: Iterator[Workload], batch: int) -> None:
    for work in itertools.islice(works, batch):
        work()


def decoders(jpegs: list[bytes]) -> dict[str, list[Workload]]:
    """{arm: the decoding of each file to RGB, from memory}; by libjpeg-turbo to one place, by libraries to new ones."""
    found: dict[str, list[Workload]] = {}
    library = native.library()
    if library is not None:
        sizes = [Image.open(io.BytesIO(content)).size for content in jpegs]
        room = torch.empty(3 * max(width * height for width, height in sizes) + 128, dtype=torch.uint8)
        place = room[64 - room.data_ptr() % 64 + 1 :].data_ptr()  # to an aligned place it would write past the cache
        found[f"{DECODE}libjpeg-turbo"] = [
            partial(decoded_to, room, library.mae_decode, c, len(c), place) for c in jpegs
        ]
    as_rgb: Any = getattr(torchvision.io, "decode_jpeg", None)
    if as_rgb is not None:
        mode = torchvision.io.ImageReadMode.RGB
        tensors = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in jpegs]
        found[f"{DECODE}torchvision"] = [partial(as_rgb, tensor, mode) for tensor in tensors]
    return found | {f"{DECODE}Pillow": [partial(by_pillow, content) for content in jpegs]}


def decoded_to(room: Tensor, decode: Callable[..., int], *arguments: object) -> int:
    """room: kept alive, since its address is among the arguments."""
    return decode(*arguments)


def by_pillow(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def resizing(jpegs: list[bytes], size: int) -> list[Workload]:
    """A crop of each decoded image, in the layout that torchvision resizes fastest."""
    crop = pretraining_transform(size)
    works: list[Workload] = []
    for content in jpegs[:200]:
        image = v2.functional.pil_to_tensor(by_pillow(content))[None].contiguous(memory_format=torch.channels_last)
        works.append(partial(crop.__call__, image))
    return works


def with_workers(name: str, batches: Iterator[object], batch: int, workers: int, repeats: int) -> Arm:
    """Of the clock: `repeats` spells of some batches each, once every worker has given two."""
    spell, seconds = spell_of(workers), []
    take: Callable = partial(collections.deque, maxlen=0)
    take(itertools.islice(batches, spell))
    for _ in range(repeats):
        started = time.perf_counter()
        take(itertools.islice(batches, spell))
        seconds.append(time.perf_counter() - started)
    batches.close()  # type: ignore[attr-defined]
    return Arm(name, workers, batch * spell, Timing(tuple(seconds)))


def spell_of(workers: int) -> int:
    return max(4, 2 * workers)


def evaluations(files: list[str], arch: str, batch: int, repeats: int, machine: Machine) -> Iterator[Arm]:
    """Images as evaluations read them, by all workers: the reading alone, and beside the forward pass of the ViT where
    that takes no hours."""
    size, count = get_arch(arch).image_size, batch * spell_of(machine.workers) * (repeats + 1)
    listed = list(itertools.islice(itertools.cycle(files), count))
    dataset = Images(listed, eval_transform(size), pillow=True)
    indices = [range(first, first + batch) for first in range(0, count, batch)]
    read = (images for images, _, _ in loader(dataset, indices, machine.workers, machine.device))
    yield with_workers(EVALUATION, read, batch, machine.workers, repeats)
    if machine.device == "cuda" or arch == "vit_mini_patch8":
        model, each = build_vit(arch, size).to(machine.device), replace(machine, micro_batch=batch)
        suit_attention(model, machine)
        found = (out.cpu() for out, _ in outputs_of(model, dataset, IMAGENET_NORMALIZATION, each, arch))
        yield with_workers(f"{EVALUATION}, {arch}", found, batch, machine.workers, repeats)


def limit_of(arms: Sequence[Arm]) -> float:
    """images/s of the fastest decoder; 0 if there is none."""
    return max((arm.rate for arm in arms if arm.name.startswith(DECODE)), default=0.0)


def loader_table(arms: Sequence[Arm]) -> str:
    limit = limit_of(arms)
    rows = [["arm", "workers", "images/s", "spread", "of decoding alone"]]
    for arm in arms:
        spread = "" if arm.timing.spread is None else f"± {arm.timing.spread:.1f} %"
        share = f"{arm.rate / limit:.2f}" if limit and not arm.workers else ""
        rows.append([arm.name, str(arm.workers or ""), f"{arm.rate:.0f}", spread, share])
    per_core = next(arm.rate for arm in arms if arm.name == OURS)
    cores = f"{GOAL} images/s take {GOAL / per_core:.1f} such cores for workers"
    note = f"Of one core's CPU time; with workers of the clock. {cores}."
    return f"{markdown_table(rows)}\n\n{note}"


def loader_values(arms: Sequence[Arm]) -> dict[str, Any]:
    ours_alone = next(arm.rate for arm in arms if arm.name == OURS)
    limit = limit_of(arms)
    return {
        "compiled_reader": native.library() is not None,
        "of_decoding_alone": ours_alone / limit if limit else None,
        f"cores_for_{GOAL}_images_per_second": GOAL / ours_alone,
        "arms": [
            {
                "name": arm.name,
                "workers": arm.workers,
                "clock": "wall" if arm.workers else "process CPU",
                "images_per_second": arm.rate,
                "spread_percent": arm.timing.spread,
                "images": arm.images,
                "seconds": list(arm.timing.seconds),
            }
            for arm in arms
        ],
    }
