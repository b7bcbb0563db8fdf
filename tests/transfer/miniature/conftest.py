"""Fixtures of the miniature tests: the ImageNet sets."""

from pathlib import Path

import pytest

from transfer.miniature import imagenet
from transfer.miniature.unlabelled import unlabelled


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("miniature")
    for kind in ("imagenet", "imagenet_a", "imagenet_r", "imagenet_sketch", "imagenet_c"):
        getattr(imagenet, kind)(folder)
    unlabelled(folder, count=300)
    return folder
