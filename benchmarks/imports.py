"""What takes seconds to import, and when it is imported."""

import contextlib
import gc
import importlib
import sys
from collections.abc import Iterator

# Imported by jobs only, and so in the functions that use it: it takes as long as torch, whose compiler it imports.
LATE = ("timm", "timm.data", "timm.loss", "timm.optim", "timm.utils", "torchvision", "torchvision.transforms.v2")
# Ours, also late: else a server would import today what another commit may bring tomorrow.
OWN = ("mae_core.crops", "transfer.data.loop_free_crop", "transfer.detection.engine_torchvision")


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Imports within do not look for garbage, which takes a fifth of torch's: what they make stays."""
    first = "torch" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        if first:
            gc.freeze()  # nobody looks through it later either


def import_late_ones() -> None:
    """What jobs import when they need it, and plans do without. The commit in their records is from now on that of
    what was imported."""
    for name in (*LATE, *OWN):
        importlib.import_module(name)
    importlib.import_module("mae_core.machine").commit()
