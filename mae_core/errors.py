"""The one exception for what a user can mend."""


class UserError(Exception):
    """A mistake or a missing thing that the user can mend: wrong file, absent data, bad flag.

    Its text is one sentence: what was wrong, where, and what to do. Command lines print it without a traceback and
    exit non-zero.
    """
