"""Images from disk, in an order and with augmentations that depend only on the seed and the position."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mae_core import distributed, native
from mae_core.batch import Batch, InTurn, Numbered, Placed
from mae_core.decode import UNREADABLE, read_image, read_pixels
from mae_core.errors import UserError
from mae_core.files import printable
from mae_core.seeds import seed_all as seed_all
from mae_core.seeds import seed_for as seed_for
from mae_core.workers import PREFETCH, begin_worker, fitting_workers, lost_batches_explained, started

if TYPE_CHECKING:
    from torchvision.transforms import v2

# ImageNet's channel statistics, in 0..1, as every MAE model expects its input.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
Normalization = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of the channels, in 0..1
IMAGENET_NORMALIZATION: Normalization = (MEAN, STD)
MAX_UNREADABLE = 10
AUGMENTATIONS = ("none", "crop, fixed size", "crop, random size", "crop + colour jitter")
# How a file becomes pixels, as the records say it.
TORCHVISION_PIXELS = "JPEG decoded and resized by torchvision (uint8, bicubic)"
PILLOW_PIXELS = "decoded and resized by Pillow (bicubic)"


@dataclass(frozen=True, slots=True)
class Sample:
    """What a dataset is asked for: image `index` of its list, augmented with the seed of `position` in the stream."""

    index: int
    position: int


class Samples(Protocol):
    """What a training reads: Sample -> (image, label or dict of targets, name of an unreadable file or "")."""

    def __len__(self) -> int: ...

    def __getitem__(self, sample: Sample, /) -> tuple[Tensor, Any, str]: ...


class Images(Dataset):
    """Files (with optional labels) -> (uint8 [3, S, S], label, unreadable file name or ""). The transform's random
    draws are seeded by (seed, position), so that worker counts and restarts change nothing.

    The transform gets a uint8 tensor [3, H, W]; with pillow=True a PIL image that Pillow decoded, as in the published
    evaluations, which draw nothing. A file that cannot be read gives a black image and its name: the caller decides
    what that means. UserError, with the file's name, where the transform fails, and for a file whose folder is gone:
    with a disk that is no longer mounted all would be black.
    """

    def __init__(
        self,
        files: Sequence[str | Path],
        transform: Callable[[Any], Tensor],
        labels: Sequence[int] | None = None,
        seed: int = 0,
        pillow: bool = False,
    ) -> None:
        # One block of bytes, which forked workers share: touching a list of str would copy it page by page.
        self.files = np.array([os.fsencode(f) for f in files])
        self.labels = np.zeros(len(files), np.int64) if labels is None else np.asarray(labels, np.int64)
        self.transform, self.seed, self.pillow = transform, seed, pillow

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, sample: Sample | int) -> tuple[Tensor, int, str]:
        return self.__getitems__([sample])[0]

    def __getitems__(self, samples: Sequence[Sample | int]) -> Batch:
        """Several at once, as the DataLoader asks."""
        return self.batch(samples)

    def batch(self, samples: Sequence[Sample | int], room: Tensor | None = None) -> Batch:
        """Several at once, in one tensor (`room`, or a new one): consecutive samples of one image are decoded once."""
        indices = [s.index if isinstance(s, Sample) else s for s in samples]
        positions = [s.position if isinstance(s, Sample) else s for s in samples]
        batch, decoded = Batch(self.labels[indices].tolist(), room), -1
        written = np.zeros(len(batch), np.uint8)
        if not self.pillow:
            after, before = [*indices[1:], -1], [-1, *indices[:-1]]
            alone = [-1 if at in (first, last) else at for at, first, last in zip(indices, before, after)]
            written = native.write_crops(self.transform, self.seed, self.files, alone, positions, batch)
        for place, (index, position) in enumerate(zip(indices, positions)):
            if written[place]:
                continue
            try:
                if index != decoded:
                    image, bad = self.decode(index)
                    decoded = index
                if not self.pillow:
                    seed_all(self.seed, position)
                batch.put(place, self.transform(image))
                batch.bad[place] = bad
            except UserError:
                raise
            except Exception as e:  # of any kind: a worker must not lose the file's name
                reason = f"{type(e).__name__}: {e}"
                raise UserError(f"{os.fsdecode(self.files[index])} cannot be augmented ({reason}): replace it") from e
        return batch

    def decode(self, index: int) -> tuple[Any, str]:
        path = os.fsdecode(self.files[index])
        try:
            return (read_image if self.pillow else read_pixels)(path), ""
        except UNREADABLE as e:
            folder = Path(path).parent
            if isinstance(e, FileNotFoundError) and not folder.exists():
                raise UserError(f"{folder} is gone: put it back, or mount its disk, and start again") from None
            black = Image.new("RGB", (64, 64)) if self.pillow else torch.zeros(3, 64, 64, dtype=torch.uint8)
            return black, path


class TrainingStream(Sampler):
    """Micro-batches of Samples from a given step on, in the order that (seed, epoch) decides.

    Each epoch is a permutation of the data without its last incomplete batch. A step takes the next `batch` images of
    it, and each process its own `local_batch` of these, in micro-batches.

    With repeated augmentation (Hoffer et al., arXiv 1901.09335) a batch holds `repeats` samples of each of its images,
    and a permutation lasts for that many epochs: an epoch has as many steps and samples as without it.
    """

    def __init__(
        self, size: int, batch: int, micro_batch: int, seed: int, first_step: int, last_step: int, repeats: int = 1
    ) -> None:
        self.size, self.batch, self.micro_batch, self.seed, self.repeats = size, batch, micro_batch, seed, repeats
        self.first_step, self.last_step = first_step, last_step
        self.local_batch = batch // distributed.world_size()

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * (self.local_batch // self.micro_batch)

    def __iter__(self) -> Iterator[list[Sample]]:
        steps_per_pass = self.size // self.batch * self.repeats
        number, order = -1, np.empty(0, np.int64)
        for step in range(self.first_step, self.last_step):
            if step // steps_per_pass != number:
                number = step // steps_per_pass
                order = np.random.default_rng((self.seed, number)).permutation(self.size)
            start = (step % steps_per_pass) * self.batch + distributed.rank() * self.local_batch
            before = number * steps_per_pass * self.batch  # positions of the earlier passes
            for first in range(start, start + self.local_batch, self.micro_batch):
                views = range(first, first + self.micro_batch)
                yield [Sample(int(order[view // self.repeats]), before + view) for view in views]


def loader(
    dataset: Samples, batches: Any, workers: int, device: str, held: int = 1
) -> Iterator[tuple[Tensor, Any, list[str]]]:
    """(images, labels, unreadable names) for lists of Samples or indices, which `workers` processes prepare, or fewer
    if this machine has no room for so many. held: batches that the caller keeps at a time; they stay in shared
    memory, but for those of Images. UserError if one dies.

    It serves for one pass: a training has one loader for all its epochs, so that workers start once.
    """
    first = next(iter(batches), None) if workers else None
    source: Any = dataset
    pinned = device.startswith("cuda")
    if first:
        like = collate([dataset[first[0]]] * len(first))
        # Images are copied out of shared memory when their turn comes: the caller keeps none there.
        workers = fitting_workers(workers, like, 1 if isinstance(dataset, Images) else held)
        if workers and isinstance(dataset, Images):
            source, batches = InTurn(dataset, like[0], PREFETCH * workers + 1), Numbered(batches)
    with lost_batches_explained():
        prepared = DataLoader(
            source,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=pinned,
            worker_init_fn=begin_worker,
        )
        for images, labels, bad in started(prepared):
            # To pin it has copied it already.
            yield images.images().clone() if isinstance(images, Placed) else images, labels, bad


def collate(samples: list[tuple[Tensor, Any, str]] | Batch) -> tuple[Any, Any, list[str]]:
    """(images, labels, unreadable names); of images that lie in shared memory, where they do."""
    if isinstance(samples, Batch):
        images, bad = samples.placed or samples.images, [name for name in samples.bad if name]
        return images, torch.tensor(samples.labels), bad
    views, labels, names = zip(*samples)
    targets = Targets(labels) if isinstance(labels[0], dict) else torch.tensor(labels)
    return torch.stack(views), targets, [name for name in names if name]


def normalize(images: Tensor, normalization: Normalization = IMAGENET_NORMALIZATION) -> Tensor:
    """uint8 [B, 3, H, W] -> float32 (x / 255 - mean) / std, on the images' device."""
    if images.dtype != torch.uint8:
        raise TypeError(f"images of {images.dtype}: they are normalised once, from uint8")
    from torchvision.transforms.v2.functional import to_dtype

    scaled = to_dtype(images, torch.float32, scale=True)
    mean, std = statistics_on(normalization, scaled.device)
    return scaled.sub_(mean).div_(std)


@cache
def statistics_on(normalization: Normalization, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and std [3, 1, 1], which stay on the device: to copy them there for each batch would wait for the GPU."""
    with torch.inference_mode(False):
        mean, std = (torch.tensor(values, dtype=torch.float32, device=device) for values in normalization)
    return mean.view(3, 1, 1), std.view(3, 1, 1)


class Targets(list):
    """A dict for each image, where a label is more than a number. Its tensors move, and it slices, as a tensor does."""

    def to(self, device: str, non_blocking: bool = False) -> "Targets":
        def moved(value: Any) -> Any:
            return value.to(device, non_blocking=non_blocking) if isinstance(value, Tensor) else value

        return Targets({name: moved(value) for name, value in one.items()} for one in self)

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return Targets(found) if isinstance(index, slice) else found


def pretraining_transform(
    image_size: int, min_scale: float = 0.2, augmentation: str = "crop, random size"
) -> "v2.Compose":
    """The augmentations of the paper's Table 1e, on uint8 tensors [3, H, W]. "crop, random size": random resized crop
    and flip, all that MAE's pre-training uses. "crop, fixed size": random crop of the resized image, and flip. "none":
    centre crop of the resized image. Resampling is bicubic, by torchvision on uint8; 0.3 % of the values differ from
    those of Pillow before version 13, by at most 2 of 255 levels (164 photographs; tests/mae_core/test_decode.py).

    The paper does not say what size the fixed crop is taken from, nor how strong the jitter is. Stand-ins: the short
    side is 256 px for a crop of 224, as in ImageNet's evaluation; brightness, contrast and saturation by up to 0.4.
    """
    from torchvision.transforms import InterpolationMode, v2

    from mae_core.crops import Crop

    short = (image_size * 256 + 112) // 224
    resize = v2.Resize(short, interpolation=InterpolationMode.BICUBIC)
    random_size = v2.RandomResizedCrop(image_size, scale=(min_scale, 1.0), interpolation=InterpolationMode.BICUBIC)
    transforms: dict[str, v2.Compose] = {
        "none": v2.Compose([resize, v2.CenterCrop(image_size)]),
        "crop, fixed size": v2.Compose([resize, v2.RandomCrop(image_size), v2.RandomHorizontalFlip()]),
        "crop, random size": Crop(random_size),
        "crop + colour jitter": Crop(random_size, v2.ColorJitter(0.4, 0.4, 0.4)),
    }
    return transforms[augmentation]


class UnreadableFiles:
    """Counts the files that could not be read, prints each once, and gives up after MAX_UNREADABLE of them."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names = set(names)

    def add(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.names:
                self.names.add(name)
                print(f"unreadable image, replaced by black: {printable(name)}", flush=True)
        self.check()

    def of_all_processes(self) -> tuple[str, ...]:
        """The names that any process has met, sorted; from now on each process knows them all."""
        self.names.update(*distributed.gather_to_all(self.names))
        self.check()
        return tuple(sorted(self.names))

    def check(self) -> None:
        if len(self.names) > MAX_UNREADABLE:
            raise UserError(
                f"{len(self.names)} images cannot be read (at most {MAX_UNREADABLE} may be): "
                f"{', '.join(sorted(self.names)[:5])}, ...; mend or delete them"
            )
