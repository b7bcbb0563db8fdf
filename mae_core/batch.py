"""A batch of images that is assembled in the place from which it is used."""

import itertools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Batch:
    """Samples (image, label, name of an unreadable file or "") whose images lie in one tensor: a new one, or `room` if
    it has the right shape and type. The first image says what all are."""

    def __init__(self, labels: Sequence[Any], room: Tensor | None = None) -> None:
        self.labels, self.room, self.images = labels, room, torch.empty(0)
        self.bad = [""] * len(labels)
        self.placed: Placed | None = None  # where the images are, if another process can see them there

    def __len__(self) -> int:
        return len(self.bad)

    def __getitem__(self, place: int) -> tuple[Tensor, Any, str]:
        return self.images[range(len(self))[place]], self.labels[place], self.bad[place]

    def begin(self, shape: Sequence[int], kind: torch.dtype) -> None:
        """Before the first image: there is a place for each."""
        whole, room = (len(self), *shape), self.room
        if room is not None and (room.shape[1:], room.dtype) == (whole[1:], kind) and len(self) <= len(room):
            self.images = room[: len(self)]
        else:
            self.images = torch.empty(whole, dtype=kind)

    def put(self, place: int, image: Tensor) -> None:
        """ValueError for an image that is not like the first."""
        if not self.images.numel():
            self.begin(image.shape, image.dtype)
        into = self.images[place]
        if (image.shape, image.dtype) != (into.shape, into.dtype):
            raise ValueError(f"{image.dtype} {[*image.shape]} in a batch of {into.dtype} {[*into.shape]}")
        into.copy_(image)


class Batched(Protocol):
    """What reads a batch, into a place that is given."""

    def batch(self, samples: Sequence[Any], room: Tensor | None = None) -> Batch: ...


class InTurn(Dataset):
    """Batches that workers write to `count` pieces of shared memory in turn, for lists as `Numbered` gives them. New
    memory for each would take about as long as to decode what it holds: the system clears it page by page.

    A piece is written again `count` batches later. The DataLoader has PREFETCH batches of each worker under way, in
    order: one more piece than those suffices, if a batch is copied as soon as it is there. A worker only says which
    piece it has written: to send and map a tensor costs more than to copy it.
    """

    def __init__(self, images: Batched, like: Tensor, count: int) -> None:
        self.images, self.key = images, next(KEYS)
        self.pieces = [
            torch.empty(0, dtype=like.dtype).set_(
                torch.UntypedStorage._new_shared(like.nbytes), 0, like.shape, like.stride()
            )
            for _ in range(count)
        ]
        IN_USE[self.key] = self

    def __getitems__(self, numbered: tuple[int, Sequence[Any]]) -> Batch:
        number, samples = numbered[0] % len(self.pieces), numbered[1]
        batch = self.images.batch(samples, self.pieces[number])
        if batch.images.data_ptr() == self.pieces[number].data_ptr():
            batch.placed = Placed(self.key, number, len(samples))
        return batch


@dataclass(frozen=True)
class Placed:
    """In place of images [count, ...]: those that a worker has written to a piece."""

    key: int
    piece: int
    count: int

    def images(self) -> Tensor:
        return IN_USE[self.key].pieces[self.piece][: self.count]

    def pin_memory(self) -> Tensor:
        """What the DataLoader calls where the images go to a GPU."""
        return self.images().pin_memory()


KEYS = itertools.count()
IN_USE: "weakref.WeakValueDictionary[int, InTurn]" = weakref.WeakValueDictionary()


class Numbered:
    """Each list with its number, from 0 on."""

    def __init__(self, lists: Iterable[Any]) -> None:
        self.lists = lists

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return enumerate(self.lists)
