import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mae_core import follow
from mae_core.errors import UserError
from mae_core.follow import knn_top1, labelled_folder
from mae_core.machine import Machine


def write(root, split, name, count, value):
    (root / split / name).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = np.full((48, 48, 3), value, np.uint8)
        pixels[0, 0] = i
        Image.fromarray(pixels).save(root / split / name / f"{i}.png")


@pytest.fixture
def folder(tmp_path):
    """Two classes, dark and bright; one validation image of each class lies in the wrong folder."""
    for split, count in (("train", 12), ("val", 3)):
        write(tmp_path, split, "bright", count, 220)
        write(tmp_path, split, "dark", count, 40)
    write(tmp_path, "val", "dark", 1, 220)
    return tmp_path


class Brightness(nn.Module):
    """An encoder for tests: the class token is (1, mean of the image)."""

    def forward_features(self, images):
        assert not self.training
        mean = images.mean(dim=(1, 2, 3))
        return torch.stack([torch.stack([torch.ones_like(mean), mean], dim=1)] * 2, dim=1)


def test_accuracy_is_of_the_nearest_neighbours_class(folder, monkeypatch):
    monkeypatch.setattr(follow, "BATCH", 5)
    model = Brightness().train()
    data = labelled_folder(folder)
    assert (len(data.train[0]), len(data.val[0]), data.classes) == (24, 6, 2)
    # Of the 24 training images 20 vote, the right 12 with far more weight; 5 of the 6 lie in the right folder.
    top1, left_out = knn_top1(model, data, 48, Machine())
    assert (top1, left_out) == (pytest.approx(500 / 6), [])
    assert model.training


def test_images_that_cannot_be_read_are_left_out_and_named(folder):
    """A black image would be dark: in place of a bright one it would be scored, and vote, as another class."""
    odd = [folder / name for name in ("train/bright/3.png", "val/bright/1.png")]
    for file in odd:
        file.write_bytes(b"broken")
    top1, left_out = knn_top1(Brightness().train(), labelled_folder(folder), 48, Machine())
    assert (top1, left_out) == (pytest.approx(400 / 5), [str(file) for file in odd])
    for file in (folder / "val").rglob("*.png"):
        file.write_bytes(b"broken")
    with pytest.raises(UserError, match=f"no image of {folder}/val can be read"):
        knn_top1(Brightness().train(), labelled_folder(folder), 48, Machine())


def test_large_folders_are_thinned_evenly(folder, monkeypatch):
    monkeypatch.setattr(follow, "TRAIN_IMAGES", 6)
    files, labels = labelled_folder(folder).train
    assert labels == [0, 0, 0, 1, 1, 1]
    assert [f.name for f in files[:3]] == ["0.png", "2.png", "6.png"]  # sorted as text: 0 1 10 11 2 3 4 5 6 ...


def test_splits_and_classes_must_exist(folder):
    write(folder, "train", "odd", 1, 9)
    with pytest.raises(UserError, match="train and val must have the same folders of classes, but only one has odd"):
        labelled_folder(folder)
    with pytest.raises(UserError, match=r"has no folder train: k-NN needs .*/train/CLASS/"):
        labelled_folder(folder / "val")
