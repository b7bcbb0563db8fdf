"""How commands end."""

import errno
import os
import subprocess
import sys

import pytest

from mae_core.command_line import answered
from mae_core.errors import UserError
from mae_core.progress import Progress
from tests.fixtures import ROOT
from tests.fixtures.terminal import closed_terminal
from tests.fixtures.transfer import raising


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("the batch is odd"), 2, "error: the batch is odd\n"),
        (UserError("a\x1b[2J\u202e\nb"), 2, "error: a\\x1b[2J\\u202e\\nb\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/o"), 2, "error: /o: the disk is full: free some space\n"),
        (OSError(errno.EROFS, "Read-only file system"), 2, "error: the disk is read-only: make it writable, or choose"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 2, "error: x: this user may not do that: change the"),
        (OSError("it is no regular file"), 2, "error: it is no regular file\n"),
        (KeyboardInterrupt(), 130, "stopped; go on\n"),
    ],
)
def test_what_the_user_can_mend_is_one_sentence(capsys, error, code, said):
    assert answered(raising(error), "stopped; go on") == code
    found = capsys.readouterr().err
    assert found.startswith(said)
    assert found.count("\n") == 1
    assert "Errno" not in found


def test_the_code_of_the_work_is_that_of_the_command_and_a_mistake_of_ours_is_no_sentence():
    assert answered(lambda: 1) == 1
    with pytest.raises(ZeroDivisionError):
        answered(lambda: 1 // 0)


def test_work_goes_on_where_the_terminal_of_its_progress_is_gone():
    with closed_terminal():
        progress = Progress("train", 2)
        progress.update(2, 8)
        print("what comes later is refused no more", flush=True)
    assert not progress.enabled


def test_a_reader_that_is_gone_is_no_traceback():
    program = (
        "import sys; from mae_core.command_line import answered; sys.exit(answered(lambda: print('x' * 10**6) or 0))"
    )
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (130, "")
