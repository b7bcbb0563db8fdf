"""The picture of detections."""

import json

import numpy as np
from PIL import Image

from tests.fixtures.coco import FIRST_ID, detection, filled, rectangle, write_coco, write_split
from transfer.data.coco import read_split
from transfer.detection import picture
from transfer.detection.picture import draw_predictions


def test_the_picture_shows_what_was_found(tmp_path):
    """The box and the mask of a sure detection are drawn; an unsure one is not, and the rest of the image stays."""
    write_coco(tmp_path)
    write_split(tmp_path, "val", [(160, 80)], [rectangle(FIRST_ID["val"], 1, 5, 5, 9, 9)])
    examples = read_split(tmp_path, "val").examples

    def drawn(entries, name):
        results = tmp_path / f"{name}.json"
        results.write_text(json.dumps(entries))
        draw_predictions(examples, results, tmp_path / f"{name}.png")
        return np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int)

    boxes = {0.9: [100, 30, 40, 30], 0.2: [10, 10, 30, 30]}  # by their scores
    entries = [detection(FIRST_ID["val"], 18, box, score, filled(box, (80, 160))) for score, box in boxes.items()]
    plain, found = drawn([], "plain"), drawn(entries, "found")
    assert plain.shape == (320, 320, 3)
    assert (found[162:] == 255).all()  # 160 x 80 px fill the upper half of the square
    assert (plain[162:300] == 255).all()
    assert (plain[300:] < 100).any()  # where nothing was found, it is written
    plain[300:] = 255
    changed = np.abs(found - plain).sum(axis=2) > 20
    rows, columns = np.nonzero(changed)
    # Twice the size: the box from (200, 60) to (280, 120).
    assert 196 <= columns.min() <= 201
    assert 279 <= columns.max() <= 284
    assert rows.max() <= 124
    assert changed[64:116, 204:276].mean() > 0.95


def test_the_grid_shows_sixteen_images_at_most(tmp_path, monkeypatch):
    """Four in a row; here five in all, whose picture is sooner written."""
    assert picture.IMAGES == 16
    monkeypatch.setattr(picture, "IMAGES", 5)
    write_coco(tmp_path)
    write_split(tmp_path, "val", [(64, 48)] * 7, [rectangle(FIRST_ID["val"], 1, 5, 5, 9, 9)])
    (tmp_path / "found.json").write_text("[]")
    draw_predictions(read_split(tmp_path, "val").examples, tmp_path / "found.json", tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as drawn:
        assert drawn.size == (4 * 326 + 6, 2 * 326 + 6)
