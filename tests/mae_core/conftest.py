import pytest

from tests.fixtures.pretrain import train


@pytest.fixture(scope="module")
def reference(noise_images, tmp_path_factory):
    """An uninterrupted run of two epochs."""
    out = tmp_path_factory.mktemp("reference")
    train(noise_images, out)
    return out
