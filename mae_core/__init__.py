"""MAE itself: the pre-trainer, and what a ViT encoder is. Knows nothing of any downstream task."""

import importlib.util
import sys
from pathlib import Path

# argv[0] is "-m" only while `python -m ...` imports the packages around its module: there a missing dependency is a
# user's mistake, answered by a sentence. Everyone else gets Python's own ModuleNotFoundError.
if sys.argv[:1] == ["-m"] and importlib.util.find_spec("torch") is None:
    root = Path(__file__).resolve().parent.parent
    print(
        f"error: {sys.executable} lacks torch: run `make -C {root} install`, then use {root}/.venv/bin/python",
        file=sys.stderr,
    )
    sys.exit(2)
