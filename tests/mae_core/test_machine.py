"""What a record says of the code that made it, and which machine a call gets."""

import argparse
import re
import subprocess

import pytest
import torch

from mae_core import flags, machine
from mae_core.errors import UserError


def commit_now():
    machine.commit.cache_clear()
    return machine.commit()


@pytest.fixture(autouse=True)
def forget():
    yield
    machine.commit.cache_clear()


def test_the_commit_is_that_of_the_checkout_that_tracks_the_package(tmp_path, monkeypatch):
    """A wheel inside another project's checkout (its .venv, say) must not report that project's commit."""

    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        done = subprocess.run(["git", "-C", tmp_path, *who, *arguments], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    path = tmp_path / "lib" / "machine.py"
    path.parent.mkdir()
    path.write_text("as installed\n")
    monkeypatch.setattr(machine, "__file__", str(path))
    assert commit_now() == ""  # in no checkout

    git("init", "--quiet")
    (tmp_path / "theirs.txt").write_text("another project\n")
    git("add", "theirs.txt")
    git("commit", "--quiet", "-m", "theirs")
    assert commit_now() == ""  # in a checkout that does not track it

    git("add", "lib")
    git("commit", "--quiet", "-m", "ours")
    head = git("rev-parse", "HEAD")
    assert len(head) == 40
    assert commit_now() == head

    (tmp_path / "theirs.txt").write_text("changed, in another folder\n")
    assert commit_now() == f"{head}-dirty"


def resolved(*given, processes=0):
    parser = argparse.ArgumentParser()
    flags.add_machine_flags(parser)
    return machine.machine_from(parser.parse_args(given), processes)


@pytest.fixture
def gpus(monkeypatch):
    """Make torch see so many GPUs."""

    def see(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return see


def test_there_is_a_gpu_for_each_process(gpus, monkeypatch):
    gpus(0)
    with pytest.raises(UserError, match="8 processes, but torch can use no GPU here: add --device cpu"):
        resolved(processes=8)
    assert (resolved("--device", "cpu", processes=8).processes, resolved().device) == (8, "cpu")
    gpus(1)
    with pytest.raises(UserError, match="2 processes for 1 GPU: start one for each GPU"):
        resolved(processes=2)
    gpus(8)
    monkeypatch.setenv("WORLD_SIZE", "16")  # on two machines
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert (resolved().device, resolved().processes) == ("cuda", 16)
    monkeypatch.setattr(machine, "cores", lambda: 96)
    assert resolved().workers == 12  # a machine's cores are shared by the processes that run there


def test_a_gpu_that_torch_cannot_use_is_named(gpus, tmp_path, monkeypatch):
    gpus(0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    driver = tmp_path / "version"
    assert machine.unusable_gpu(driver) == ""
    for version, said in (
        ("535.183.01", "driver 535.183.01 is too old .* needs 580 or newer"),
        ("590.10", "cannot use"),
    ):
        driver.write_text(
            f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {version}  Thu May  2 2024\nGCC version: 12.2.0"
        )
        assert re.search(said, machine.unusable_gpu(driver))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert machine.unusable_gpu(driver) == ""


def test_without_a_compiler_or_headers_nothing_is_compiled(tmp_path, monkeypatch, capsys):
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    for name in ("gcc", "g++"):
        (tmp_path / name).touch(mode=0o755)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert resolved("--compile", "--device", "cpu").compile
    (tmp_path / "g++").unlink()
    assert not resolved("--compile", "--device", "cpu").compile
    assert machine.can_compile("cuda")
    (tmp_path / "Python.h").unlink()
    assert not machine.can_compile("cuda")
    first, second = capsys.readouterr().out.splitlines()
    assert first == "note: torch.compile needs a compiler (g++ or clang++), which is not here: going on without it"
    assert second.startswith("note: torch.compile needs Python.h (Debian: apt install python3.")
