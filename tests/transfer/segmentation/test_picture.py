"""The picture of predictions, against the image, the prediction and the labels that it was drawn from."""

import numpy as np
from PIL import Image

from transfer.data.ade20k import FOLDER, pairs
from transfer.segmentation.picture import draw_predictions


def test_pictures_show_the_image_the_prediction_and_the_truth(root, tmp_path):
    """A right prediction looks like the truth; each class has its own colour, and unlabelled pixels are black."""
    folder = root / FOLDER
    image, label = pairs(folder, "val")[0]
    truth = np.asarray(Image.open(label))
    palette = np.random.default_rng(0).integers(30, 256, (150, 3)).tolist()
    right, wrong = np.where(truth == 0, 0, truth - 1).astype(np.uint8), np.full(truth.shape, 7, np.uint8)
    draw_predictions([(image, right), (image, wrong)], folder, palette, tmp_path / "picture.png")
    sheet = np.asarray(Image.open(tmp_path / "picture.png"))
    width = round(truth.shape[1] * 200 / truth.shape[0])

    def panel(row: int, column: int) -> np.ndarray:
        """200 px high, below a title of 18 px, 6 px from the next."""
        top, left = 6 + row * (218 + 6) + 18, 6 + column * (width + 6)
        return sheet[top : top + 200, left : left + width]

    first = [panel(0, column) for column in range(3)]
    labelled = np.asarray(Image.fromarray(truth).resize((width, 200), Image.Resampling.NEAREST)) > 0
    assert (first[1] == first[2])[labelled].all()
    assert (first[2][~labelled] == 0).all()
    photograph = np.asarray(Image.open(image).resize((width, 200), Image.Resampling.NEAREST))
    assert (first[0] == photograph).all()
    assert (panel(1, 1) == palette[7]).all()
    assert sheet.shape == (2 * 224 + 6, 3 * (width + 6) + 6, 3)
    assert (sheet[6:24] < 100).any()  # the titles
