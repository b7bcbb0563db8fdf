"""mae-transfer: one command in front of the programs, and the wheel that brings it."""

import email
import os
import subprocess
import sys
import zipfile

import pytest

from benchmarks import command, run_all
from benchmarks.suite import TASKS
from tests.fixtures import ROOT
from transfer.run import read_record


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/mae-transfer", *arguments])
    return command.main()


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_lists_every_command(monkeypatch, capsys, arguments):
    assert call(monkeypatch, *arguments) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    expected = "run plan status ls report export compare verify checkpoint pretrain watch reconstruct ablations speed"
    assert " ".join(listed) == expected


def test_help_and_a_misspelt_command_import_nothing_heavy():
    program = "import sys; from benchmarks import command; print(command.main(), 'torch' in sys.modules)"
    for argument, code in (("--help", 0), ("checkpoints", 2)):
        done = subprocess.run([sys.executable, "-c", program, argument], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == f"{code} False"
    assert done.stderr == "mae-transfer: unknown command 'checkpoints'; did you mean checkpoint?\n"


@pytest.mark.parametrize("name", list(command.COMMANDS))
def test_every_command_shows_its_own_flags_under_its_own_name(monkeypatch, capsys, name):
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, name, "--help")
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: mae-transfer {name} [-h]")


def test_ls_lists_the_tasks(monkeypatch, capsys):
    assert run_all.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()] == [task.name for task in TASKS]
    assert (call(monkeypatch, "ls"), run_all.main(["--ls"])) == (0, 0)
    assert capsys.readouterr().out == listed * 2


@pytest.mark.parametrize("flag", ["--plan", "--dry-run"])
def test_plan_is_run_with_plan(monkeypatch, capsys, tmp_path, flag):
    monkeypatch.chdir(tmp_path)
    flags = ["--ckpt", "random:vit_mini_patch8", "--recipe", "mini", "--tasks", "imagenet_knn", "--out", "out"]
    assert run_all.main([flag, *flags]) == 0
    planned, _, free = capsys.readouterr().out.rpartition(", ")
    assert "imagenet_knn" in planned
    assert free.endswith("GiB free\n")
    assert call(monkeypatch, "plan", *flags) == 0
    assert capsys.readouterr().out.rpartition(", ")[0] == planned
    assert not (tmp_path / "out" / "runs").exists()


@pytest.mark.slow
def test_the_wheel_holds_the_packages_and_what_they_read(tmp_path):
    pytest.importorskip("hatchling")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=900)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)

    # As in the checkout, under transfer/results; no tests, no package called results, no committed record.
    (info,) = site.glob("*.dist-info")
    assert {path.name for path in site.iterdir()} == {"mae_core", "transfer", "benchmarks", info.name}
    published = {path.name: path.read_bytes() for path in (ROOT / "results" / "published").glob("*.csv")}
    assert len(published) == 11
    inside = site / "transfer" / "results"
    assert {path.name: path.read_bytes() for path in (inside / "published").iterdir()} == published
    shipped = {path.name for path in (inside / "miniature").iterdir()}
    assert shipped == {"mae_mini.safetensors"}
    for package in ("mae_core", "transfer", "benchmarks"):
        for path in (ROOT / package).glob("**/*.py"):
            assert (site / path.relative_to(ROOT)).read_bytes() == path.read_bytes()

    metadata = email.message_from_string((info / "METADATA").read_text(encoding="utf-8"))
    assert len(metadata.get_all("Requires-Dist")) > 10
    assert not [line for line in metadata.get_all("Requires-Dist") if "@" in line], "an index refuses direct URLs"
    assert "mae-transfer = benchmarks.command:main" in (info / "entry_points.txt").read_text(encoding="utf-8")

    # From there, in a folder of its own: its own mae_mini through one task, to tables, with its own published numbers.
    work = tmp_path / "work"
    work.mkdir()
    env = {**os.environ, "PYTHONPATH": str(site)}
    program = "import sys; from benchmarks import command; from benchmarks.tables import PUBLISHED; print(PUBLISHED); "
    flags = ["run", "--recipe", "mini", "--tasks", "imagenet_knn", "--device", "cpu"]
    call = [sys.executable, "-c", program + "sys.exit(command.main())", *flags]
    done = subprocess.run(call, cwd=work, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[0] == str(inside / "published")
    (path,) = work.glob("results/runs/mae_mini-*/imagenet_knn/*/record.json")
    record = read_record(path)
    assert record.checkpoint["path"] == str(inside / "miniature" / "mae_mini.safetensors")
    assert record.commit == ""
    assert "mae_mini" in (work / "results" / "summary.md").read_text(encoding="utf-8")


def test_a_package_that_is_missing_is_told_in_a_sentence(monkeypatch, capsys):
    def absent(name):
        raise ModuleNotFoundError("No module named 'orjson'", name="orjson")

    monkeypatch.setattr(command.importlib, "import_module", absent)
    assert call(monkeypatch, "verify", "x") == 2
    assert capsys.readouterr().err == "error: the package orjson is not installed; after an update: make install\n"
