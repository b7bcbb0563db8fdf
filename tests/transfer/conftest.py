import pytest

from tests.fixtures.transfer import TableModel, write_imagenet
from transfer.classification import robustness


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """Four classes of ImageNet, eight training and three validation images of each. Nothing is to be written there."""
    return write_imagenet(tmp_path_factory.mktemp("imagenet"), train=8, val=3)


@pytest.fixture
def loads(monkeypatch):
    """Replace the loading of classifiers: `loads(table)` sets the model; the list counts what was loaded."""
    calls = []

    def use(table, size=16):
        def load(checkpoint, image_size, device):
            calls.append(checkpoint)
            return TableModel(table), image_size or size

        monkeypatch.setattr(robustness, "trained_classifier", load)
        robustness.load_once.cache_clear()
        return calls

    yield use
    robustness.load_once.cache_clear()
