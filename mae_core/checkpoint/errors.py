"""The error of a checkpoint, and text out of a file made fit to print."""

from mae_core.errors import UserError


def printable(text: str, limit: int = 1000) -> str:
    """The text in one line that any terminal can show: what is no visible character is escaped, and of more than
    `limit` characters the middle is left out. Names and metadata in a file can hold anything."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown if len(shown) <= limit else f"{shown[: limit // 2]} ... {shown[-limit // 2 :]}"


class CheckpointError(UserError):
    """A checkpoint file that cannot be used, or does not fit the model it is loaded into."""

    def __init__(self, text: str) -> None:
        super().__init__(printable(text))
