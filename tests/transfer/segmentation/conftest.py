"""Fixtures of the segmentation tests: a small ADE20K, mmsegmentation with our parts registered, a start."""

from pathlib import Path

import pytest

from tests.fixtures.segmentation import make_config, make_job, write_ade20k
from transfer.segmentation import train
from transfer.segmentation.mmseg_plugin import register


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    return write_ade20k(tmp_path_factory.mktemp("ade20k"))


@pytest.fixture(scope="session")
def mmseg():
    register()
    return pytest.importorskip("mmseg")


@pytest.fixture
def start(root, tmp_path, mmseg, monkeypatch):
    """The model and the optimizer with which a training starts."""
    given = []
    monkeypatch.setattr(train, "fit", lambda *arguments: given.extend(arguments))
    job = make_job(root, tmp_path, layer_decay=0.5, drop_path=0.3, weight_decay=0.07)
    train.train(job, make_config(job))
    return given[:2]
