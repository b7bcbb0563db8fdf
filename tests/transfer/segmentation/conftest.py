"""Fixtures of the segmentation tests: a small ADE20K, mmsegmentation with our parts registered, a Runner."""

from pathlib import Path

import pytest

from tests.fixtures.segmentation import make_config, make_job, write_ade20k
from transfer.segmentation.mmseg_plugin import register
from transfer.segmentation.train import make_runner


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    return write_ade20k(tmp_path_factory.mktemp("ade20k"))


@pytest.fixture(scope="session")
def mmseg():
    register()
    return pytest.importorskip("mmseg")


@pytest.fixture
def runner(root, tmp_path, mmseg):
    job = make_job(root, tmp_path, layer_decay=0.5, drop_path=0.3, weight_decay=0.07)
    return make_runner(make_config(job) | {"train_cfg": {"type": "OurLoop", "run": lambda *_: None}}, job)
