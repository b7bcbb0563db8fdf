"""The images that a cell was pre-trained on, and how their exchange is noticed."""

import pytest

from benchmarks.ablation_data import IMAGES_FILE, check_images, images_of, note_images
from mae_core.errors import UserError
from tests.fixtures.transfer import write_imagenet


def test_a_cell_of_other_images_is_refused_and_one_of_the_same_goes_on(tmp_path):
    data, work = tmp_path / "data", tmp_path / "cell"
    write_imagenet(data)
    check_images(work, data)  # nothing is noted yet
    note_images(work, data)
    images_of.cache_clear()
    check_images(work, data)
    file = next(data.rglob("*.[Jj][Pp]*"))
    content = file.read_bytes()
    for exchanged in (content + b"more", None):
        file.write_bytes(exchanged) if exchanged else file.unlink()
        images_of.cache_clear()
        with pytest.raises(UserError, match="was pre-trained on other images than"):
            check_images(work, data)
        note_images(work, data)  # of a training that goes on
        with pytest.raises(UserError, match="move it away"):
            check_images(work, data)
    file.write_bytes(content)
    images_of.cache_clear()
    check_images(work, data)
    (work / IMAGES_FILE).write_text("{")
    with pytest.raises(UserError, match=r"images\.json is damaged"):
        check_images(work, data)
