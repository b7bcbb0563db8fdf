"""The images that a cell was pre-trained on, and how their exchange is noticed."""

import pytest

from benchmarks.ablation_data import IMAGES_FILE, check_images, images_of, note_images
from mae_core.errors import UserError
from mae_core.training import CHECKPOINT_FILE
from tests.fixtures.transfer import write_imagenet


@pytest.fixture
def data(tmp_path):
    images_of.cache_clear()
    write_imagenet(tmp_path / "data")
    return tmp_path / "data"


def exchange(data, content):
    """Give the first image another content, as the next call finds it; returns the old one."""
    file = min(path for path in data.rglob("*") if path.is_file())
    before = file.read_bytes()
    file.write_bytes(content)
    images_of.cache_clear()
    return before


def test_a_cell_of_other_images_is_refused_and_one_of_the_same_goes_on(data, tmp_path):
    work = tmp_path / "cell"
    check_images(work, data)  # nothing is noted yet
    note_images(work, data)
    (work / CHECKPOINT_FILE).touch()
    check_images(work, data)
    before = exchange(data, b"another size")
    note_images(work, data)  # which belongs to what was begun
    with pytest.raises(UserError, match=r"was pre-trained on other images than .*: move it away"):
        check_images(work, data)
    exchange(data, before)
    check_images(work, data)
    (work / IMAGES_FILE).write_text("{")
    with pytest.raises(UserError, match=r"images\.json is damaged"):
        check_images(work, data)


def test_a_cell_that_was_not_begun_takes_the_images_as_they_are(data, tmp_path):
    """As one that failed at once because the data set was being unpacked."""
    work = tmp_path / "cell"
    note_images(work, data)
    exchange(data, b"another size")
    check_images(work, data)
    note_images(work, data)
    (work / CHECKPOINT_FILE).touch()
    check_images(work, data)


def test_a_note_is_of_the_images_as_they_are_when_a_cell_begins(data, tmp_path):
    """Whatever the call found at its start, days before."""
    first, second = tmp_path / "first", tmp_path / "second"
    check_images(first, data)
    note_images(first, data)
    file = min(path for path in data.rglob("*") if path.is_file())
    (file.parent / f"later{file.suffix}").write_bytes(file.read_bytes())
    note_images(second, data)
    assert (first / IMAGES_FILE).read_text() != (second / IMAGES_FILE).read_text()
