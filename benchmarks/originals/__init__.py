"""The originals of what we do, imported from the user's checkouts of them, and our runs beside them.

No code of theirs is part of this project, and their files are not touched: what they miss in today's libraries, or on
a CPU, is patched in while they run. A twin does the same work twice, once by each, and says how far they differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mae_core.errors import UserError


@dataclass(frozen=True)
class Call:
    """What the user gave a twin. data: a folder of images or a data set, as the twin says. reference: the checkout of
    the original; None for one that is an installed package. work: an empty folder for the files of both."""

    data: Path
    reference: Path | None
    work: Path

    @property
    def checkout(self) -> Path:
        assert self.reference is not None  # twins.py asks for it
        return self.reference


@dataclass(frozen=True)
class Difference:
    """One quantity of our run and of the original's, how far they are apart and how far they may be: `difference` and
    `allowed` have one unit, which `quantity` names where it is not that of `ours` and `theirs`."""

    quantity: str
    ours: float
    theirs: float
    difference: float
    allowed: float

    @property
    def held(self) -> bool:
        return self.difference <= self.allowed  # False for NaN


def check_checkout(folder: Path, files: Sequence[str], project: str) -> None:
    """UserError unless the folder holds these files of the project."""
    for file in files:
        if not (folder / file).is_file():
            raise UserError(f"{folder}: {file} is not there; give a checkout of {project}")
