import pytest

from tests.fixtures.transfer import write_imagenet


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """Four classes of ImageNet, eight training and three validation images of each. Nothing is to be written there."""
    return write_imagenet(tmp_path_factory.mktemp("imagenet"), train=8, val=3)
