"""Pre-training on a disk that fills up while it runs: a small tmpfs, in a name space of its own."""

import shutil
import subprocess
import sys

import pytest

from tests.fixtures import pretrain
from tests.fixtures.transfer import PROCESS

UNSHARE = shutil.which("unshare")
ALLOWED = UNSHARE and subprocess.run([UNSHARE, "-m", "true"], capture_output=True).returncode == 0

# The space is checked before the training, so that check is left out: others may fill the disk later.
PROGRAM = """
import sys
from mae_core import pretrain
pretrain.check_free = lambda *space: None
sys.exit(pretrain.main())
"""
SCRIPT = """
set -u
mount -t tmpfs -o size=2m tmpfs "$1" || exit 77
shift
"$@"; echo "code $?"
find "$OUT" -type f -not -path "*/tensorboard/*" -printf "left %f\\n"
mount -o remount,size=64m "$OUT"/..
"$@"; echo "code $?"
find "$OUT" -type f -not -path "*/tensorboard/*" -printf "end %f\\n"
"""


@pytest.mark.slow
@pytest.mark.skipif(not ALLOWED, reason="this user may not mount")
def test_a_disk_that_fills_up_is_a_sentence_and_the_same_command_goes_on(noise_images, tmp_path):
    (tmp_path / "disk").mkdir()
    out = tmp_path / "disk" / "out"
    flags = pretrain.command(noise_images, out, "--save-minutes", "0")[2:]
    call = [
        "unshare",
        "-m",
        "bash",
        "-c",
        SCRIPT,
        "bash",
        str(tmp_path / "disk"),
        sys.executable,
        "-c",
        PROGRAM,
        *flags,
    ]
    process = PROCESS | {"env": {**PROCESS["env"], "OUT": str(out)}}
    done = subprocess.run(call, **process, capture_output=True, text=True, timeout=900)
    if done.returncode == 77:
        pytest.skip("this user may not mount")
    said = f"error: {out}/checkpoint.pth cannot be written: the disk is full: free some space\n"
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("code")] == ["code 2", "code 0"]
    assert sorted(line for line in lines if line.startswith("left")) == ["left .claim.0"]
    assert sorted(line for line in lines if line.startswith("end")) == [
        *("end .claim.1", "end checkpoint.pth", "end log.jsonl", "end mae.safetensors"),
    ]
