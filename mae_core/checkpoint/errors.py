"""The error of a checkpoint, and text out of a file made fit to print."""

from mae_core import files
from mae_core.errors import UserError


def printable(text: str, limit: int = 1000) -> str:
    """`files.printable`; of more than `limit` characters the middle is left out. Names and metadata in a file can hold
    anything."""
    shown = files.printable(text)
    return shown if len(shown) <= limit else f"{shown[: limit // 2]} ... {shown[-limit // 2 :]}"


class CheckpointError(UserError):
    """A checkpoint file that cannot be used, or does not fit the model it is loaded into."""

    def __init__(self, text: str) -> None:
        super().__init__(printable(text))
