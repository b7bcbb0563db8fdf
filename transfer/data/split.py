"""One split of a labelled set: its image files and labels, parts of it, and its fingerprint."""

import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, repeat
from pathlib import Path
from typing import overload

import numpy as np

from mae_core.data import seed_for
from transfer.data.findings import spread


class Files(Sequence[Path]):
    """Files by their folders: (folder, names) each. As Paths a million of them would fill 400 MiB."""

    def __init__(self, folders: Iterable[tuple[str, Sequence[str]]] = ()) -> None:
        self.folders = tuple(folders)
        self.ends = list(accumulate(len(names) for _, names in self.folders))

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Files":
        """The files of these names, in their order."""
        folders: list[tuple[str, list[str]]] = []
        names: list[str] = []
        last, cut = None, ""
        for folder, slash, name in map(str.rpartition, texts, repeat("/")):
            if folder != last or slash != cut:  # "/x" is no file of "."
                last, cut, names = folder, slash, []
                folders.append((folder if slash else ".", names))
            names.append(name)
        return cls(folders)

    @property
    def names(self) -> list[str]:
        return [name for _, names in self.folders for name in names]

    def texts(self) -> Iterator[str]:
        """str() of each."""
        return (f"{folder}/{name}" for folder, names in self.folders for name in names)

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __iter__(self) -> Iterator[Path]:
        return map(Path, self.texts())

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Path, ...]: ...
    def __getitem__(self, index: int | slice) -> Path | tuple[Path, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        place = range(len(self))[index]  # IndexError as of any sequence
        number = bisect_right(self.ends, place)
        folder, names = self.folders[number]
        return Path(f"{folder}/{names[place - self.ends[number]]}")  # from its folder's end: a negative index

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Files | tuple) and len(self) == len(other) and all(a == b for a, b in zip(self, other))

    def __hash__(self) -> int:
        return hash(tuple(self))


def folders_of(files: Sequence[Path]) -> tuple[tuple[str, Sequence[str]], ...]:
    """(folder, names) of files that follow each other there."""
    return (files if isinstance(files, Files) else Files.of(map(str, files))).folders


def texts_of(files: Sequence[Path | str]) -> Iterator[str]:
    """str() of each."""
    return files.texts() if isinstance(files, Files) else map(str, files)


@dataclass(frozen=True)
class Split:
    """Image files and their labels, in a fixed order (ImageNet's sets: by WNID and file name, labels 0..999)."""

    files: Sequence[Path] = ()
    labels: tuple[int, ...] = ()

    @property
    def names(self) -> list[str]:
        return self.files.names if isinstance(self.files, Files) else [file.name for file in self.files]

    @property
    def classes(self) -> frozenset[int]:
        return frozenset(self.labels)

    def by_folder(self) -> Iterator[tuple[str, Sequence[str], tuple[int, ...]]]:
        """(folder, names, labels) of the files that follow each other in a folder."""
        start = 0
        for folder, names in folders_of(self.files):
            if names:
                yield folder, names, self.labels[start : start + len(names)]
            start += len(names)

    def of_classes(self, kept: Iterable[int]) -> "Split":
        """Only the images of these classes."""
        kept = frozenset(kept)
        pairs = [(f, c) for f, c in zip(self.files, self.labels) if c in kept]
        return Split(tuple(f for f, _ in pairs), tuple(c for _, c in pairs))

    def share(self, fraction: float, seed: int) -> "Split":
        """That share of the images, balanced over the classes like the 1 % and 10 % subsets of ImageNet
        (tensorflow_datasets imagenet2012_subset): equally many of each class, with the remainder from the largest
        classes; all images of a class that has fewer; at least one of each. The seed decides which."""
        if fraction == 1:
            return self
        members: dict[int, list[int]] = {}
        for i, label in enumerate(self.labels):
            members.setdefault(label, []).append(i)
        left, kept = max(int(len(self.files) * fraction + 1e-9), len(members)), []
        rng = np.random.default_rng(seed_for(seed))
        for number, label in enumerate(sorted(members, key=lambda c: (len(members[c]), c))):
            wanted = min(len(members[label]), left // (len(members) - number))
            kept += rng.permutation(members[label])[:wanted].tolist()
            left -= wanted
        kept.sort()
        return Split(tuple(self.files[i] for i in kept), tuple(self.labels[i] for i in kept))

    def few(self, limit: int) -> "Split":
        """At most `limit` images, equally many of each class and the first ones of it, in all processes and calls the
        same; of fewer classes, spread over all, where there are more than that. All images for 0."""
        if not limit or len(self.files) <= limit:
            return self
        members: dict[int, list[int]] = {}
        for i, label in enumerate(self.labels):
            members.setdefault(label, []).append(i)
        classes = sorted(members)
        each, left = divmod(limit, len(classes))
        more = {classes[i] for i in spread(len(classes), left)} if left else set()
        kept = sorted(i for label in classes for i in members[label][: each + (label in more)])
        return Split(tuple(self.files[i] for i in kept), tuple(self.labels[i] for i in kept))


def joined(splits: Sequence[Split]) -> Split:
    """The images of the splits, one split after the other."""
    files = [split.files for split in splits]
    folders = [each.folders for each in files if isinstance(each, Files)]
    whole: Sequence[Path] = Files(chain.from_iterable(folders)) if len(folders) == len(files) else ()
    return Split(whole or tuple(chain.from_iterable(files)), tuple(chain.from_iterable(s.labels for s in splits)))


def few_of_both(train: Split, val: Split, limit: int) -> tuple[Split, Split]:
    """`Split.few` of both, of the same classes."""
    few = val.few(limit)
    return (train if few is val else train.of_classes(few.classes)).few(limit), few


def fingerprint(root: Path, *splits: Split) -> str:
    """SHA-256 over the splits' listings: paths relative to root, and labels."""
    digest = hashlib.sha256()
    above = os.path.join(root, "")
    for split in splits:
        for folder, names, labels in split.by_folder():
            at = f"{folder}/".removeprefix(above)
            if len(set(labels)) == 1:  # of a class: for millions in a fraction of the time
                text = at + f" {labels[0]}\n{at}".join(names) + f" {labels[0]}\n"
            else:
                text = "".join(f"{at}{name} {label}\n" for name, label in zip(names, labels))
            digest.update(text.encode(errors="surrogateescape"))
        digest.update(b"\n")
    return digest.hexdigest()
