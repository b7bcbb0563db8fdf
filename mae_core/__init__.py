"""MAE itself: the pre-trainer, and what a ViT encoder is. Knows nothing of any downstream task."""

import importlib.util
import sys
from types import TracebackType


def _stopped(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ctrl-C during the imports, which take seconds, ends a command as later on: with a word and exit code 130."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print("stopped", file=sys.stderr)
    sys.exit(130)


# argv[0] is "-m" only while `python -m ...` imports the packages around its module: there a missing dependency is a
# user's mistake, answered by a sentence. Everyone else gets Python's own ModuleNotFoundError.
if sys.argv[:1] == ["-m"]:
    if importlib.util.find_spec("torch") is None:
        where = "run it with the Python that has this project installed: .venv/bin/python after `make install`"
        print(f"error: {sys.executable} lacks torch: {where}", file=sys.stderr)
        sys.exit(2)
    sys.excepthook = _stopped
