"""MAE itself: the pre-trainer, and what a ViT encoder is. Knows nothing of any downstream task."""

import importlib.util
import signal
import sys
from types import TracebackType

from mae_core.stopping import come_again_if_lost


def _stopped(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # another one ends what is left, without a traceback
    print("stopped", file=sys.stderr)
    sys.exit(130)


def stop_quietly() -> None:
    """For a command: Ctrl-C ends it with a word and exit code 130 also where it is not expected, as during the imports,
    which take seconds."""
    sys.excepthook = _stopped
    come_again_if_lost()


# argv[0] is "-m" only while `python -m ...` imports the packages around its module: there a missing dependency is a
# user's mistake, answered by a sentence. Everyone else gets Python's own ModuleNotFoundError.
if sys.argv[:1] == ["-m"]:
    if importlib.util.find_spec("torch") is None:
        where = "run it with the Python that has this project installed: .venv/bin/python after `make install`"
        print(f"error: {sys.executable} lacks torch: {where}", file=sys.stderr)
        sys.exit(2)
    stop_quietly()
