"""The one exception for what the user can mend, and the words for what the system refuses."""

import errno

from mae_core.files import printable


class UserError(Exception):
    """A mistake or a missing thing that the user can mend: a wrong file, absent data, a bad flag.

    Its text is one sentence: what was wrong, where, and what to do. Command lines print it without a traceback and
    exit non-zero.
    """

    def __str__(self) -> str:
        # A DataLoader raises its worker's error again, with the worker's whole traceback as its text.
        text = super().__str__()
        own = text.rpartition(f"{__name__}.UserError: ")[2] if text.startswith("Caught UserError") else text
        return printable(own.strip())


ADVICE = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "this user's quota of the disk is used up: free some space",
    errno.EFBIG: "it is larger than a file may become: raise this user's limit (ulimit -f)",
    errno.EROFS: "the disk is read-only: make it writable, or choose another folder",
    errno.EACCES: "this user may not do that: change the permissions (chmod), or choose another folder",
    errno.EPERM: "this user may not do that: change the permissions, or choose another folder",
    errno.ENOENT: "it is not there, or its folder was removed: put it back, or choose another",
    errno.ENOTDIR: "a file stands where a folder should: move it away, or choose another folder",
    errno.EISDIR: "it is a folder, not a file: move it away",
    errno.ELOOP: "it is a symbolic link, which is not followed here: remove it",
    errno.EMFILE: "too many open files: raise the limit (ulimit -n)",
    errno.EIO: "the disk reports an error: check it",
}


def in_words(error: OSError) -> str:
    """Why the system refused and what to do, without the file's name."""
    return ADVICE.get(error.errno or 0) or error.strerror or str(error)
