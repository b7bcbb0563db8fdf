"""Data of a few images, and the flags of a plan on it."""

from pathlib import Path

import pytest

from tests.benchmarks.launch.told import ARCH, TWO
from tests.fixtures.transfer import write_imagenet, write_split


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = write_imagenet(tmp_path / "data", train=4, val=3, classes=TWO)
    write_split(root / "imagenet-a", 1, TWO)
    write_split(root / "imagenet-r", 1, TWO)
    return root


@pytest.fixture
def flags(tmp_path: Path, data: Path) -> list[str]:
    return ["--ckpt", ARCH, "--recipe", "mini", "--data", str(data), "--out", str(tmp_path / "out")]
