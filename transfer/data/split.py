"""One split of a labelled set: its image files and labels, parts of it, and its fingerprint."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mae_core.data import seed_for
from transfer.data.findings import spread


@dataclass(frozen=True)
class Split:
    """Image files and their labels, in a fixed order (ImageNet's sets: by WNID and file name, labels 0..999)."""

    files: tuple[Path, ...] = ()
    labels: tuple[int, ...] = ()

    @property
    def classes(self) -> frozenset[int]:
        return frozenset(self.labels)

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


def few_of_both(train: Split, val: Split, limit: int) -> tuple[Split, Split]:
    """`Split.few` of both, of the same classes."""
    few = val.few(limit)
    return (train if few is val else train.of_classes(few.classes)).few(limit), few


def fingerprint(root: Path, *splits: Split) -> str:
    """SHA-256 over the splits' listings: paths relative to root, and labels."""
    digest = hashlib.sha256()
    above = os.path.join(root, "")  # as text: for a million files, relative_to would take half as long again
    for split in splits:
        for file, label in zip(split.files, split.labels):
            digest.update(f"{str(file).removeprefix(above)} {label}\n".encode(errors="surrogateescape"))
        digest.update(b"\n")
    return digest.hexdigest()
