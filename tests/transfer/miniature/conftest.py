"""Fixtures of the miniature tests: the ImageNet sets."""

from pathlib import Path

import pytest

from transfer.miniature import imagenet


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("miniature")
    for make in (
        imagenet.imagenet, imagenet.imagenet_a, imagenet.imagenet_r, imagenet.imagenet_sketch, imagenet.imagenet_c
    ):  # fmt: skip
        make(folder)
    imagenet.unlabelled(folder, count=300)
    return folder
