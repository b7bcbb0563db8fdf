"""How every command ends: what it says of an error, and its exit code."""

import os
import sys
from collections.abc import Callable

from mae_core.errors import UserError, in_words
from mae_core.files import escape_output, printable


def answered(work: Callable[[], int], stopped: str = "stopped") -> int:
    """The exit code of `work`. 2, after one sentence, for what the user can mend: a wrong call, absent data, a full
    disk; 130 after Ctrl-C, which is answered by `stopped`, and where nobody reads what is printed any more."""
    escape_output()
    try:
        return work()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 130
    except OSError as e:
        print(f"error: {describe_os_error(e)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130


def describe_os_error(error: OSError) -> str:
    """The file that the system refused, why, and what to do."""
    where = f"{error.filename}: " if error.filename else ""
    return printable(f"{where}{in_words(error)}")
