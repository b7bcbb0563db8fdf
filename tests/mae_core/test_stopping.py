"""What signals do to a run, and that no command answers Ctrl-C with a traceback."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from mae_core.flops import count_flops, forward_flops
from mae_core.stopping import stop_on_signals, stop_postponed, stop_requested
from tests.fixtures import ROOT

ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def handlers():
    """Put back what this process does with signals."""
    before = {number: signal.getsignal(number) for number in ALL}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ALL)
def test_each_signal_stops_like_ctrl_c(number):
    stop_on_signals()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)
    with stop_requested() as stop:
        os.kill(os.getpid(), number)
        assert stop == [number]
        stop.clear()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", ALL)
def test_a_request_that_nobody_answered_stops_at_the_end(number):
    """It came after the last step."""
    stop_on_signals()
    done = []

    def train():
        with stop_requested():
            os.kill(os.getpid(), number)
            done.append("saved")

    with pytest.raises(KeyboardInterrupt):
        train()
    assert done

    def diverge():
        with stop_requested():
            os.kill(os.getpid(), number)
            raise ValueError  # which ends the run anyway, and says more

    with pytest.raises(ValueError):
        diverge()
    assert signal.getsignal(number) is signal.default_int_handler


def test_a_second_ctrl_c_stops_at_once_and_a_schedulers_signal_beside_the_parents_does_not():
    """torchrun passes on the SIGTERM that its processes have got themselves, run_all sends SIGINT."""
    stop_on_signals()
    with stop_requested() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP, signal.SIGHUP, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop[-1] == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        stop.clear()


@pytest.mark.parametrize("number", ALL)
def test_a_signal_can_wait_until_a_library_is_done(number):
    stop_on_signals()
    done = []

    def read():
        with stop_postponed():
            os.kill(os.getpid(), number)
            done.append("read")

    with pytest.raises(KeyboardInterrupt):
        read()
    assert done
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("count", [count_flops, lambda work, model: forward_flops(lambda: model, lambda _: work())])
def test_a_stop_waits_for_a_count_of_flops(count):
    """Raised where C++ has called Python, KeyboardInterrupt aborts the process."""
    stop_on_signals()
    done = []

    def work():
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("counted")

    with pytest.raises(KeyboardInterrupt):
        count(work, nn.Linear(2, 2))
    assert done


@pytest.mark.parametrize("thread", ["", "threading.Thread(target=threading.Event().wait, daemon=True).start()"])
def test_a_signal_during_a_fork_stops_its_parent_alone(thread):
    """What a handler raises in Python's hooks around a fork is lost: here one hook sends a signal, which another
    thread may take."""
    script = """if True:
        import os, signal, sys, threading, time
        from mae_core.stopping import admit_stop, stop_held, stop_on_signals

        stop_on_signals()
        sys.unraisablehook = sys.__unraisablehook__  # nothing comes again
        THREAD
        os.register_at_fork(before=lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(0.2)))
        try:
            with stop_held():
                if os.fork() == 0:
                    admit_stop()
                    print("child: went on", flush=True)
                    os._exit(0)
            time.sleep(60)  # the other thread may not have run yet
            print("parent: went on", flush=True)
        except KeyboardInterrupt:
            os.wait()
            print("parent: stopped", flush=True)
    """
    script = script.replace("THREAD", thread)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["child: went on", "parent: stopped"]


@pytest.mark.parametrize(
    "place",
    [
        "class Last:\n    def __del__(self): strike()\nLast()",
        "class Last: pass\none = Last()\nreference = weakref.ref(one, lambda _: strike())\ndel one",
        "os.register_at_fork(before=strike)\nif os.fork() == 0: os._exit(0)",
    ],
    ids=["del", "weakref", "fork"],
)
@pytest.mark.parametrize("begin", ["stop_on_signals()", "mae_core.stop_quietly()"])
def test_a_stop_that_python_cannot_pass_on_comes_again(place, begin):
    lines = ["import os, signal, sys, time, weakref, mae_core", "from mae_core.stopping import stop_on_signals", begin]
    lines += ["def strike(): os.kill(os.getpid(), signal.SIGINT)", place, "time.sleep(60)", "print('went on')"]
    script = ["try:", *("    " + line for part in lines for line in part.splitlines())]
    script += ["except KeyboardInterrupt:", "    print('stopped')"]
    done = subprocess.run([sys.executable, "-c", "\n".join(script)], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "stopped\n", "")


def test_other_errors_that_python_cannot_pass_on_are_printed():
    script = "import mae_core\nmae_core.stop_quietly()\nclass Last:\n    def __del__(self): 1 / 0\nLast()\nprint('on')"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "on\n")
    assert "ZeroDivisionError" in done.stderr


def test_under_nohup_a_closed_terminal_stops_nothing():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop_on_signals()
    with stop_requested() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop == []
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


MODULES = [f"mae_core.{name}" for name in ("pretrain", "reconstruct", "checkpoint")]
MODULES += [f"transfer.{name}" for name in ("classification", "miniature")]
SCRIPTS = ["run_all", "ablations", "speed", "twins"]
COMMANDS = [*(["-m", module] for module in (*MODULES, "benchmarks.report", "benchmarks.run_all"))]
COMMANDS += [[str(ROOT / "benchmarks" / f"{name}.py")] for name in SCRIPTS]
COMMANDS += [["-c", "import sys; from benchmarks.command import main; sys.exit(main())", "run"]]


def assert_stops_with_a_word(folder: Path, command: list[str]) -> None:
    """The command is interrupted by what its interpreter finds in that folder."""
    path = {"PYTHONPATH": f"{folder}:{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=folder, env={**os.environ, **path}, capture_output=True)
    assert done.returncode == 130, done.stderr.decode()
    assert b"stopped" in done.stderr or not done.stderr
    assert b"Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 1


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[1] if "-m" in command else command[0][-12:])
def test_ctrl_c_during_the_imports_ends_with_a_word(tmp_path, command):
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    (tmp_path / "pandas.py").write_text("import torch\n")
    assert_stops_with_a_word(tmp_path, command)


# Found by the interpreter as it starts: Ctrl-C when a certain function is called.
INTERRUPT = """
import os, signal, sys

def at_call(frame, event, argument):
    code = frame.f_code
    if event == "call" and code.co_name == {name!r} and code.co_filename.endswith({file!r}):
        sys.setprofile(None)
        os.kill(os.getpid(), signal.SIGINT)

sys.setprofile(at_call)
"""
RUN_ALL, ABLATIONS = (str(ROOT / "benchmarks" / f"{name}.py") for name in ("run_all", "ablations"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "file", "name"),
    [
        (["-m", "mae_core.checkpoint", "--formats"], "argparse.py", "parse_args"),
        (["-m", "mae_core.reconstruct", "--ckpt", "x", "--images", "x", "--out", "x.png"], "argparse.py", "parse_args"),
        (["-m", "transfer.miniature", "--out", "x"], "writer.py", "write_set"),
        (["-m", "benchmarks.report"], "report.py", "report"),
        ([ABLATIONS, "--table", "1a", "--recipe", "mini", "--plan"], "ablations.py", "cell_state"),
        ([RUN_ALL, "--plan"], "plan.py", "make_plan"),
        # Nothing can run, so that it comes to its tables at once.
        ([RUN_ALL, "--ckpt", "random:vit_mini_patch8", "--data", "."], "report.py", "group_by_section"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_ctrl_c_wherever_it_comes_ends_with_a_word(tmp_path, command, file, name):
    (tmp_path / "sitecustomize.py").write_text(INTERRUPT.format(file=file, name=name))
    assert_stops_with_a_word(tmp_path, command)
