"""Data of a few images, and the flags of a plan on it."""

from pathlib import Path

import pytest

from tests.benchmarks.launch.told import ARCH, small_data


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return small_data(tmp_path / "data", "imagenet-a", "imagenet-r")


@pytest.fixture
def flags(tmp_path: Path, data: Path) -> list[str]:
    return ["--ckpt", ARCH, "--recipe", "mini", "--data", str(data), "--out", str(tmp_path / "out")]
