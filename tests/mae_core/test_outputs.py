"""A model's outputs over a data set: in order, each image once, the next batch read while the last is scored."""

import pytest
import torch
from torch import nn

from mae_core.data import Images
from mae_core.errors import UserError
from mae_core.listing import list_images
from mae_core.machine import Machine
from mae_core.outputs import outputs_of
from transfer.data.transforms import eval_transform

PLAIN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


class Means(nn.Module):
    def __init__(self, events):
        super().__init__()
        self.events = events

    def forward(self, images):
        self.events.append("model")
        return images.mean(dim=(1, 2, 3))[:, None]


class Watched(Images):
    events: list

    def batch(self, samples, room=None):
        self.events.append("read")
        return super().batch(samples, room)


@pytest.mark.parametrize("count", [0, 8, 20])
def test_the_next_batch_is_read_before_the_last_is_handed_out(noise_images, count):
    files, events = list_images(noise_images)[:count], []
    dataset = Watched(files, eval_transform(48, "resize"), labels=range(count), pillow=True)
    dataset.events, rows, labels = events, [], []
    for outputs, found in outputs_of(Means(events), dataset, PLAIN, Machine(micro_batch=8), "x"):
        events.append("scored")
        rows.append(outputs)
        labels += found.tolist()
    assert labels == list(range(count))
    if count == 20:
        expected = torch.stack([dataset[i][0] for i in range(count)]).float().mean(dim=(1, 2, 3)) / 255
        torch.testing.assert_close(torch.cat(rows)[:, 0], expected)
        assert events[:8] == ["read", "model", "read", "scored", "model", "read", "scored", "model"]


def test_a_broken_image_ends_it_after_the_whole_batches_before_it(noise_images, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"none")
    files = [*list_images(noise_images)[:8], tmp_path / "broken.jpg"]
    dataset = Images(files, eval_transform(48, "resize"), pillow=True)
    found = outputs_of(Means([]), dataset, PLAIN, Machine(micro_batch=4), "x")
    assert [len(next(found)[0]) for _ in range(2)] == [4, 4]
    with pytest.raises(UserError, match=r"broken.jpg cannot be read as an image .*: replace it; no number is given"):
        next(found)
