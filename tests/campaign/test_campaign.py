"""A small part of the campaign; `make campaign` runs all of it. And that it can tell what breaks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.campaign.cases import Broken, Case, Outcome, Skipped, attempt, refused, table
from tests.campaign.compare import compare
from tests.campaign.starts import Done, call
from tests.fixtures import ROOT


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> list[Outcome]:
    """Of a process of its own: what it starts are its forks."""
    file = tmp_path_factory.mktemp("campaign") / "outcomes.json"
    command = [sys.executable, "-m", "tests.campaign", "--small", "--examples", "10", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert file.exists(), done.stdout + done.stderr
    return [Outcome(**one) for one in json.loads(file.read_text())]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bad input", "pickle", "killed", "full disk", "read-only"])
def test_it_holds(outcomes, kind):
    chosen = [one for one in outcomes if one.kind.startswith(kind)]
    assert chosen
    assert [(one.kind, one.name, one.why) for one in chosen if one.result == "broken"] == []
    if all(one.result == "skipped" for one in chosen):
        pytest.skip(chosen[0].why)


@pytest.mark.parametrize(
    ("code", "text", "held"),
    [
        (2, "error: a.pth is no checkpoint: give another", True),
        (1, "imagenet_knn: failed: there are no images", True),
        (0, "error: a.pth is no checkpoint: give another", False),
        (2, "", False),
        (1, 'Traceback (most recent call last):\n  File "a.py"\nValueError: error: x', False),
        (-9, "error: a.pth is no checkpoint: give another", False),
    ],
)
def test_a_refusal_is_a_sentence_and_an_exit_code(tmp_path, code, text, held):
    case = Case("kind", "name", lambda work: refused(Done(code, text, 0.0), work))
    assert attempt(case, tmp_path / "work").result == ("held" if held else "broken")


def test_a_traceback_in_a_log_counts_too(tmp_path):
    (tmp_path / "error.txt").write_text("Traceback (most recent call last):\n")
    with pytest.raises(Broken, match=r"error\.txt"):
        refused(Done(1, "error: the data are not there", 0.0), tmp_path)


def write_results(folder: Path, weight: float = 1.0, loss: float = 1.0, seconds: float = 1.0) -> Path:
    (folder / "logs").mkdir(parents=True)
    save_file({"a": torch.tensor([weight])}, folder / "mae.safetensors")
    for name in ("record.json", "log.jsonl"):
        (folder / name).write_text(json.dumps({"metrics": {"loss": loss}, "seconds": seconds}) + "\n")
    (folder / "summary.csv").write_text(f"loss,seconds\n{loss},{seconds}\n")
    (folder / "logs" / "a.log").write_text(str(seconds))
    return folder


def test_only_times_may_differ(tmp_path):
    one = write_results(tmp_path / "one")
    assert compare(one, write_results(tmp_path / "slower", seconds=2.0)) == 4
    nearly = 1.0 + 2**-23
    for name, changed in (("weight", {"weight": nearly}), ("loss", {"loss": nearly})):
        with pytest.raises(Broken, match="differ"):
            compare(one, write_results(tmp_path / name, **changed))
    (tmp_path / "slower" / "mae.safetensors").unlink()
    with pytest.raises(Broken, match="only undisturbed"):
        compare(one, tmp_path / "slower")


def test_a_fork_is_started_and_ends_like_the_command(tmp_path):
    (tmp_path / "say.py").write_text("import os, sys\nprint(sys.argv[1:], os.getcwd())\nsys.exit(3)\n")
    (tmp_path / "die.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    (tmp_path / "fail.py").write_text("1 / 0\n")
    done = call(["say.py", "a b", 1], tmp_path)
    assert (done.code, done.text) == (3, f"['a b', '1'] {tmp_path}\n")
    assert call(["die.py"], tmp_path).code == -9
    failed = call(["fail.py"], tmp_path)
    assert failed.code == 1
    assert "ZeroDivisionError" in failed.text
    assert os.getcwd() != str(tmp_path)


def test_the_table_counts_every_try(tmp_path):
    def skip(work: Path) -> None:
        raise Skipped("no root")

    def broken(work: Path) -> None:
        raise Broken("a traceback")

    cases = [Case("kill", "a", lambda work: None, tries=7), Case("kill", "b", broken, tries=2), Case("disk", "c", skip)]
    found = [attempt(case, tmp_path / case.name) for case in cases]
    assert [one.why for one in found] == ["", "a traceback", "no root"]
    assert table(found).splitlines()[2:] == [
        "| kill | 9 | 7 | 2 | 0 |",
        "| disk | 0 | 0 | 0 | 1 |",
        "| **all** | 9 | 7 | 2 | 1 |",
    ]
