"""Fixtures of the detection tests: a COCO of a few small images whose objects are known."""

from pathlib import Path

import pytest

from tests.fixtures.coco import write_coco


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco"))
