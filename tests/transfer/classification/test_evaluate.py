"""One loop over the images, one way to count; and how a released classifier is shown its images."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.verify import calibration_error as recomputed
from mae_core.data import IMAGENET_NORMALIZATION
from mae_core.errors import UserError
from mae_core.machine import Machine
from mae_core.vit import build_vit
from tests.fixtures.transfer import ARCH, CLASSES, TableModel, one_hot_logits, write_code
from transfer.classification.evaluate import EvalRecipe
from transfer.data.imagenet import read_split
from transfer.data.scores import Scores, calibration_error, evaluate, score
from transfer.data.split import Split
from transfer.data.transforms import eval_transform


def coded_split(folder: Path, labels: list[int]) -> Split:
    """Image i says i; its label is labels[i]."""
    files = [folder / f"{i}.png" for i in range(len(labels))]
    for i, file in enumerate(files):
        write_code(file, i)
    return Split(tuple(files), tuple(labels))


def evaluated(model, split: Split, kept=None, size: int = 16, micro_batch: int = 0) -> Scores:
    transform, machine = eval_transform(size, "center_crop"), Machine(micro_batch=micro_batch)
    return evaluate(model, split, transform, IMAGENET_NORMALIZATION, machine, "x", kept)


def test_scores_count_and_err_as_computed_by_hand():
    loss = np.array([1.0, 2.0, 3.0, 6.0])
    ranked = np.array([[7, 1], [2, 7], [7, 3], [7, 4]])
    scores = Scores(["a", "b", "c", "d"], np.full(4, 7), loss, ranked, np.zeros((4, 2)))
    metrics, stderr = scores.metrics()
    assert metrics == {"top1": 75.0, "top5": 100.0, "loss": 3.0, "ece": 25.0}  # sure of all four, right in three
    # sqrt(0.75 * 0.25 / 4) = 0.2165; the losses' variance is (4 + 1 + 0 + 9) / 3, over 4 images.
    assert stderr["top1"] == pytest.approx(21.6506, abs=1e-4)
    assert stderr["top5"] == 0.0
    assert stderr["loss"] == pytest.approx((14 / 3 / 4) ** 0.5)


def test_the_calibration_error_is_the_one_computed_by_hand():
    """Of five images at 0.7 four are right, of five at 0.9 three: 0.5 * 0.1 + 0.5 * 0.3."""
    confidence = np.array([0.7] * 5 + [0.9] * 5, np.float32)
    right = np.array([1, 1, 1, 1, 0, 1, 1, 1, 0, 0], bool)
    assert calibration_error(confidence, right) == pytest.approx(20.0, abs=1e-5)


@pytest.mark.parametrize("classes", [3, 1000])
def test_the_calibration_error_is_torchmetrics(classes):
    """Of logits from vague to saturated, the edges of the bins among the confidences."""
    from torchmetrics.classification import MulticlassCalibrationError

    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(3000, classes, generator=generator) * torch.linspace(0, 60, 3000)[:, None]
    probabilities = logits.softmax(dim=1)
    for row, edge in enumerate(torch.linspace(0, 1, 16)[8:]):  # a first class exactly at each edge, and the rest
        probabilities[row] = (1 - edge) / (classes - 1)
        probabilities[row, 0] = edge
    labels = torch.randint(3, (3000,), generator=generator)
    confidence, first = probabilities.max(dim=1)
    assert (confidence == 1).sum() > 100
    theirs = MulticlassCalibrationError(classes, n_bins=15, norm="l1")(probabilities, labels).item()
    for ours in (calibration_error, lambda *values: 100 * recomputed(*values)):
        found = ours(confidence.numpy(), (first == labels).numpy())
        assert found == pytest.approx(100 * theirs, rel=1e-5)


def test_score_ranks_as_computed_by_hand():
    logits = torch.zeros(4, 10)
    logits[:, :7] = torch.tensor([7.0, 6, 5, 4, 3, 2, 1])
    rows = score(logits, torch.tensor([0, 4, 5, 1]))
    assert rows[:, 1:6].tolist() == [[0, 1, 2, 3, 4]] * 4
    total = sum(np.exp([7, 6, 5, 4, 3, 2, 1])) + 3
    np.testing.assert_allclose(rows[:, 6:], [np.array([7, 6, 5, 4, 3]) - np.log(total)] * 4, rtol=1e-6)
    np.testing.assert_allclose(rows[:, 0], [np.log(total) - v for v in (7, 3, 2, 6)], rtol=1e-6)


def test_every_image_is_counted_once_whatever_the_batch(tmp_path):
    """Images 0, 2 and 5 are answered wrongly; 7 images in batches of 3."""
    labels = [3, 14, 15, 92, 65, 35, 89]
    split = coded_split(tmp_path, labels)
    model = TableModel(one_hot_logits([4, 14, 16, 92, 65, 36, 89]))
    for micro_batch, batches in ((3, [3, 3, 1]), (7, [7]), (0, [7])):
        model.batches = []
        scores = evaluated(model, split, micro_batch=micro_batch)
        assert scores.top1.tolist() == [False, True, False, True, True, False, True]
        assert model.batches == batches


def test_only_kept_columns_compete(tmp_path):
    """Of 200 columns: image 0 is right though logit 999 outside is larger, image 1 is wrong inside, image 2 is right
    both ways. The loss is over the kept ones, too."""
    kept = list(range(100, 300))
    table = torch.zeros(3, 1000)
    table[0, 999], table[0, 120] = 9.0, 5.0
    table[1, 250], table[1, 101] = 5.0, 4.0
    table[2, 299] = 5.0
    split = coded_split(tmp_path, [120, 101, 299])
    at = TableModel(table), split
    assert evaluated(*at, kept).top1.tolist() == [True, False, True]
    assert evaluated(*at).top1.tolist() == [False, False, True]
    # 199 other logits of 0 in image 2.
    assert evaluated(*at, kept).loss[2] == pytest.approx(np.log(np.exp(5) + 199) - 5, rel=1e-5)


def test_an_unreadable_image_ends_the_evaluation_by_name(tmp_path):
    split = coded_split(tmp_path, [1, 2, 3])
    split.files[1].write_bytes(b"no image")
    with pytest.raises(UserError, match=r"1\.png"):
        evaluated(TableModel(one_hot_logits([1, 2, 3])), split)


def test_logits_that_are_not_finite_give_no_accuracy(tmp_path):
    table = one_hot_logits([0, 1, 2])
    table[1] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        evaluated(TableModel(table), coded_split(tmp_path, [0, 1, 2]))


class Small(TableModel):
    """Lacks memory for more than `room` images."""

    room, error = 2, torch.OutOfMemoryError("too many")

    def forward(self, images):
        if len(images) > self.room:
            raise self.error
        return super().forward(images)


def test_lack_of_memory_halves_what_is_evaluated_at_once(tmp_path):
    labels = [3, 14, 15, 92, 65, 35, 89]
    split, model = coded_split(tmp_path, labels), Small(one_hot_logits([3, 0, 15, 0, 65, 35, 89]))
    scores = evaluated(model, split)
    assert scores.top1.tolist() == [True, False, True, False, True, True, True]
    assert sum(model.batches) == 7
    model.error = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    assert evaluated(model, split).top1.tolist() == scores.top1.tolist()
    model.room = 0
    with pytest.raises(torch.OutOfMemoryError):
        evaluated(model, split)


def test_a_part_of_imagenet_is_scored_among_all_thousand_classes(root):
    """A model that always answers a class outside the folder is never right."""
    model = build_vit(ARCH, num_classes=1000)
    torch.nn.init.zeros_(model.head.weight)
    val, _ = read_split(root / "imagenet" / "val")
    for answer, right in ((999, 0.0), (CLASSES[0], 0.25)):
        torch.nn.init.zeros_(model.head.bias)
        model.head.bias.data[answer] = 1.0
        assert evaluated(model, val, size=48).top1.mean() == right


def test_the_knobs_of_an_evaluation_are_those_of_its_transform():
    """image_size and transform end in eval_transform (test_transforms.py); the sets take them from the recipe."""
    assert {f.name for f in fields(EvalRecipe)} == {"image_size", "transform"}
    with pytest.raises(UserError, match="did you mean resize_crop"):
        EvalRecipe(transform="resize_corp")
