import os
import subprocess
import sys
import time
from datetime import timedelta

import pytest

from mae_core import distributed
from mae_core.claim import claimed
from mae_core.distributed import PRESET, check_alone, process_group, rank, world_size
from mae_core.errors import UserError
from tests.fixtures.transfer import PROCESS, TORCHRUN

# Run by torchrun. The second of two processes fails while the first is at work; leaving the group or Python would wait
# for the first one, as it does in NCCL.
FAILS_ALONE = """
import atexit, sys, time
import torch.distributed as dist
from mae_core import distributed
from mae_core.errors import UserError

dist.destroy_process_group = lambda: time.sleep(600)

@distributed.ends_alone
def main():
    try:
        with distributed.process_group("cpu"):
            distributed.barrier()
            atexit.register(time.sleep, 600)
            if distributed.rank() == 1:
                raise ERROR
            time.sleep(600)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
    return 1

sys.exit(main())
"""

# Run by torchrun: two processes wait for another run's folder, and the second notes for how long.
WAITS = """
import sys, time
from datetime import timedelta
from pathlib import Path
from mae_core import distributed
distributed.TOGETHER, distributed.ROUND = timedelta(seconds=8), 1.0
with distributed.process_group("cpu"):
    begun, gather = time.monotonic(), distributed.gather_to_all
    def noted(value):
        found = gather(value)
        if distributed.rank() == 1:
            Path(sys.argv[2]).write_text(str(time.monotonic() - begun))
        return found
    distributed.gather_to_all = noted
    with distributed.alone_in(Path(sys.argv[1]), wait=True):
        print("in", flush=True)
"""


@pytest.fixture
def preset(monkeypatch):
    """Set what a launcher would, and nothing else."""

    def set_only(**values: str) -> None:
        for name in (*PRESET, "TORCHELASTIC_RUN_ID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_only


@pytest.mark.parametrize(
    "values", [{}, {"WORLD_SIZE": ""}, {"RANK": "1", "LOCAL_RANK": "3"}, {"WORLD_SIZE": "1", "RANK": "7"}]
)
def test_one_process_is_the_first_whatever_is_preset(preset, values):
    preset(**values)
    assert (world_size(), rank(), distributed.local_world_size()) == (1, 0, 1)
    with process_group("cpu") as device:
        assert device == "cpu"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE is 'x' in the environment, which is no number: start"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2'"),
        ({"WORLD_SIZE": "2", "RANK": "one"}, "RANK is 'one'"),
        ({"WORLD_SIZE": "4"}, r"WORLD_SIZE is 4 .* cannot join .*variable RANK .*env -u WORLD_SIZE -u RANK"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1"}, "MASTER_ADDR"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"}, "cannot join"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}, "RANK is 2"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}, "cannot join"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}, "cannot join"),
    ],
)  # fmt: skip
def test_processes_that_cannot_meet_say_so(preset, monkeypatch, values, said):
    """The last two wait for the others: a minute, here a second."""
    preset(**values)
    assert timedelta(0) < distributed.JOINING <= timedelta(minutes=1)
    monkeypatch.setattr(distributed, "JOINING", timedelta(seconds=1))
    with pytest.raises(UserError, match=said), process_group("cpu"):
        pass


def test_a_command_that_is_one_process_drops_what_is_preset_and_refuses_torchrun(preset, monkeypatch):
    preset(WORLD_SIZE="", RANK="3", MASTER_ADDR="10.0.0.1", LOCAL_RANK="1", PET_NNODES="2:4", OTHER_RANK="1")
    check_alone()
    assert not set(os.environ) & {*PRESET, "PET_NNODES"}
    assert os.environ["OTHER_RANK"] == "1"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(UserError, match="start this command plainly, with --gpus N"):
        check_alone(", with --gpus N")


@pytest.mark.parametrize(("count", "size", "world"), [(11, 2, 1), (11, 2, 2), (11, 2, 4), (4, 8, 3), (0, 2, 2)])
def test_batches_are_dealt_out_whole_and_gathered_in_order(monkeypatch, count, size, world):
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    dealt = []
    for number in range(world):
        monkeypatch.setattr(distributed, "rank", lambda number=number: number)
        dealt.append(distributed.local_batches(count, size))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    monkeypatch.setattr(distributed, "gather_to_all", lambda results: dealt)
    batches = distributed.gather_in_turn(dealt[0])
    assert [index for batch in batches for index in batch] == list(range(count))
    assert all(len(batch) == size for batch in batches[:-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("UserError('the disk is full')", "\nerror: the disk is full\n"),
        ("ValueError('no such thing')", "\nValueError: no such thing\n"),
    ],
)
def test_a_process_that_fails_alone_says_why_and_ends_the_others(tmp_path, error, said):
    script = tmp_path / "fails.py"
    script.write_text(FAILS_ALONE.replace("ERROR", error))
    done = subprocess.run([sys.executable, *TORCHRUN, script], **PROCESS, capture_output=True, text=True, timeout=500)
    assert said in "\n" + done.stderr
    assert done.returncode == 1


@pytest.mark.slow
def test_processes_wait_for_another_run_longer_than_for_each_other(tmp_path):
    """They wait for each other for two hours, here for eight seconds, and for a training that another run is at work on
    as long as it takes."""
    script, note = tmp_path / "waits.py", tmp_path / "note"
    script.write_text(WAITS)
    with claimed(tmp_path / "work"):
        command = [sys.executable, *TORCHRUN, script, tmp_path / "work", note]
        run = subprocess.Popen(command, **PROCESS, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while run.poll() is None and not (note.exists() and float(note.read_text() or 0) > 12):
            time.sleep(0.05)
    said, _ = run.communicate(timeout=500)
    assert run.returncode == 0, said
    assert said.count("in\n") == 2
