"""The one exception for what the user can mend."""

from mae_core.files import printable


class UserError(Exception):
    """A mistake or a missing thing that the user can mend: a wrong file, absent data, a bad flag.

    Its text is one sentence: what was wrong, where, and what to do. Command lines print it without a traceback and
    exit non-zero.
    """

    def __str__(self) -> str:
        # A DataLoader raises its worker's error again, with the worker's whole traceback as its text.
        text = printable(super().__str__())
        return text.rpartition(f"{__name__}.UserError: ")[2].strip() if text.startswith("Caught UserError") else text
