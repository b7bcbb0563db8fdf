from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from mae_core.data import PILLOW_PIXELS
from mae_core.decode import read_image
from mae_core.errors import UserError
from mae_core.files import is_image
from tests.fixtures import SHARED
from tests.fixtures.transfer import CLASSES, coded_set, make_job, one_hot_logits, small_checkpoint, write_c
from transfer.classification import robustness
from transfer.classification.robustness import ALEXNET_ERROR, mce, mce_stderr
from transfer.data.findings import limited
from transfer.data.imagenet import columns, wnids
from transfer.data.transforms import eval_transform, probe_transform, train_transform
from transfer.run import run_job

A, R, SKETCH, C = robustness.TASKS

# Errors of AlexNet among 5 severities x 50000 images, by the names that its authors give the corruptions.
ALEXNET_WRONG = {
    "brightness": 141148, "contrast": 213301, "defocus_blur": 204970, "elastic_transform": 161514, "fog": 204831,
    "frost": 206643, "gaussian_noise": 221607, "glass_blur": 206567, "impulse_noise": 230660,
    "jpeg_compression": 151625, "motion_blur": 196487, "pixelate": 179460, "shot_noise": 223617, "snow": 216704,
    "zoom_blur": 199590,
}  # fmt: skip


def alexnet() -> dict[str, list[float]]:
    """AlexNet's own mean error at every severity."""
    return {c: [n / 250000] * 5 for c, n in ALEXNET_WRONG.items()}


def test_alexnets_errors_are_the_published_counts():
    assert {c: e * 250000 for c, e in ALEXNET_ERROR.items()} == pytest.approx(ALEXNET_WRONG, abs=1e-6)
    assert np.mean(list(ALEXNET_ERROR.values())) == pytest.approx(0.788993, abs=1e-6)


def test_alexnet_has_an_mce_of_100_and_halving_one_corruption_takes_a_thirtieth_off():
    errors = alexnet()
    assert mce(errors) == pytest.approx(100.0, abs=1e-9)
    errors["fog"] = [e / 2 for e in errors["fog"]]
    assert mce(errors) == pytest.approx(100 * (1 - 1 / 30))


def test_severities_are_summed_before_dividing():
    errors = alexnet()
    total = 5 * ALEXNET_WRONG["snow"] / 250000
    errors["snow"] = [0.0, 0.1, 0.2, 0.3, total - 0.6]
    assert mce(errors) == pytest.approx(100.0)


def test_constants_are_found_by_name_not_by_position():
    errors = {c: [0.1 * i / 15] * 5 for i, c in enumerate(ALEXNET_WRONG)}
    by_hand = 100 * np.mean([0.1 * i / 15 / (n / 250000) for i, n in enumerate(ALEXNET_WRONG.values())])
    assert mce(errors) == pytest.approx(by_hand)
    assert mce(dict(reversed(errors.items()))) == pytest.approx(by_hand)


def test_no_mce_over_a_part():
    errors = alexnet()
    del errors["fog"]
    errors["snow"] = errors["snow"][:4]
    with pytest.raises(UserError, match="snow, fog"):
        mce(errors)


def test_the_standard_error_takes_the_versions_of_an_image_together():
    """Four images, two of them wrong in all 75 versions: as four independent draws, not three hundred."""
    wrong = {c: [np.array([True, True, False, False])] * 5 for c in ALEXNET_ERROR}
    stderr = mce_stderr(wrong)
    deviation = np.std([1, 1, 0, 0], ddof=1) / 2
    assert stderr["mean_err"] == pytest.approx(100 * deviation)
    assert stderr["mce"] == pytest.approx(100 * deviation * np.mean([250000 / n for n in ALEXNET_WRONG.values()]))


def test_imagenet_c_end_to_end(tmp_path, loads):
    """Of the four images of corruption c (in alphabetical order) at severity s, (c + s) % 5 say what is not there."""

    def codes(number, severity):
        wrong = (number + severity) % 5
        return [9] * wrong + [0, 0, 1, 1][wrong:]

    loads(one_hot_logits([CLASSES[0], CLASSES[1], *[999] * 8]))
    record = run_job(make_job(C, write_c(tmp_path, codes=codes), tmp_path / "work"))
    assert record.status == "ok", record.reason
    errors = {c: [(i + s) % 5 / 4 for s in range(1, 6)] for i, c in enumerate(sorted(ALEXNET_WRONG))}
    by_hand = 100 * np.mean([sum(e) / (5 * ALEXNET_WRONG[c] / 250000) for c, e in errors.items()])
    assert record.metrics["mce"] == pytest.approx(by_hand)
    # Five severities run through all five remainders: 0, 1, 2, 3 and 4 of 4 wrong.
    assert record.metrics["mean_err"] == pytest.approx(50.0)
    (table,) = record.tables.values()
    assert table == {c: [100 * e for e in values] for c, values in errors.items()}
    assert record.n_eval == 300
    assert (record.metric, record.resolved["image_size"]) == ("mce", 16)


def test_a_perfect_and_a_hopeless_model_on_imagenet_c(tmp_path, loads):
    root = write_c(tmp_path)
    loads(one_hot_logits([CLASSES[0], CLASSES[1]]))
    assert run_job(make_job(C, root, tmp_path / "right")).metrics == {"mce": 0.0, "mean_err": 0.0}
    loads(one_hot_logits([999, 999]))
    record = run_job(make_job(C, root, tmp_path / "wrong"))
    assert record.metrics["mean_err"] == 100.0
    assert record.metrics["mce"] == pytest.approx(100 * np.mean([250000 / n for n in ALEXNET_WRONG.values()]))


@pytest.mark.parametrize("limit", [0, 3])
def test_imagenet_c_is_that_which_was_found_before(tmp_path, loads, limit):
    root = write_c(tmp_path)
    loads(one_hot_logits([CLASSES[0], CLASSES[1]]))
    job = make_job(C, root, tmp_path / "work")
    job = replace(job, data=limited(job.data, limit))
    assert run_job(job).status == "ok"
    for folder in (root / "imagenet-c").glob("*/*"):
        (folder / wnids()[CLASSES[1]] / "ILSVRC2012_val_00000003.png").rename(
            folder / wnids()[CLASSES[1]] / "ILSVRC2012_val_00000004.png"
        )
    record = run_job(replace(job, work=tmp_path / "again"))
    assert record.status == "failed"
    assert "imagenet-c has changed since it was looked through: start the same command again" in record.reason


def test_a_crop_larger_than_the_files_is_refused(tmp_path, loads):
    loads(one_hot_logits([0, 0]), size=32)
    root = write_c(tmp_path)
    record = run_job(make_job(C, root, tmp_path / "crop", transform="center_crop"))
    assert record.status == "failed"
    assert "transform=resize" in record.reason
    record = run_job(make_job(C, root, tmp_path / "resize"))
    assert record.status == "ok"
    assert record.resolved == {"image_size": 32, "val_pixels": PILLOW_PIXELS}


def test_two_hundred_classes_compete_among_themselves(tmp_path, loads):
    """Code 0: sure of a class outside the 200 and then of the right one; 1: of a wrong one inside; 2: right."""
    inside, outside = CLASSES[0], 999
    assert outside not in columns("imagenet_a")
    table = torch.zeros(3, 1000)
    table[0, outside], table[0, inside] = 9.0, 5.0
    table[1, CLASSES[1]], table[1, inside] = 6.0, 5.0
    table[2, inside] = 5.0
    coded_set(tmp_path / "imagenet-a", {inside: [0, 1, 1, 2]})
    coded_set(tmp_path / "imagenet" / "val", {inside: [0, 0, 1, 2], outside: [0, 0, 0, 0, 0]})
    loads(table)
    record = run_job(make_job(A, tmp_path, tmp_path / "work"))
    assert record.status == "ok", record.reason
    assert record.metrics["top1"] == 50.0
    assert record.metrics["clean_200_top1"] == 75.0  # the class outside the 200 is not asked
    assert record.metrics["top5"] == 100.0
    assert record.n_eval == 4
    assert record.stderr["clean_200_top1"] == pytest.approx(100 * (0.75 * 0.25 / 4) ** 0.5)
    assert record.notes == ()


def test_each_set_has_its_own_two_hundred(tmp_path, loads):
    """A model that prefers a class which only A has is right on R and wrong on A."""
    label = CLASSES[0]
    only_in_a = next(c for c in columns("imagenet_a") if c not in columns("imagenet_r"))
    table = torch.zeros(1, 1000)
    table[0, only_in_a], table[0, label] = 9.0, 5.0
    for folder in ("imagenet-a", "imagenet-r"):
        coded_set(tmp_path / folder, {label: [0]})
    loads(table)
    assert run_job(make_job(A, tmp_path, tmp_path / "a")).metrics["top1"] == 0.0
    assert run_job(make_job(R, tmp_path, tmp_path / "r")).metrics["top1"] == 100.0


def test_no_clean_images_is_noted(tmp_path, loads):
    coded_set(tmp_path / "imagenet-r", {CLASSES[0]: [0]})
    loads(one_hot_logits([CLASSES[0]]))
    record = run_job(make_job(R, tmp_path, tmp_path / "work"))
    assert record.metrics["top1"] == 100.0
    assert "clean_200_top1" not in record.metrics
    assert any("no clean accuracy" in note for note in record.notes)


def test_sketch_is_scored_among_a_thousand(tmp_path, loads):
    label = next(c for c in range(1000) if c not in columns("imagenet_a") and c not in columns("imagenet_r"))
    coded_set(tmp_path / "imagenet-sketch", {label: [0, 1]})
    loads(one_hot_logits([label, (label + 1) % 1000]))
    record = run_job(make_job(SKETCH, tmp_path, tmp_path / "work"))
    assert record.metrics["top1"] == 50.0
    assert record.data["counts"] == {"classes": 1, "images": 2}


def test_all_sets_share_one_loading_of_a_classifier(tmp_path, loads):
    for folder in ("imagenet-a", "imagenet-r", "imagenet-sketch"):
        coded_set(tmp_path / folder, {CLASSES[0]: [0]})
    calls = loads(one_hot_logits([CLASSES[0]]))
    first = small_checkpoint()
    for task in (A, R, SKETCH):
        assert run_job(replace(make_job(task, tmp_path, tmp_path / task.name), checkpoint=first)).status == "ok"
    assert calls == [first]
    run_job(replace(make_job(A, tmp_path, tmp_path / "second"), checkpoint=replace(first)))
    assert len(calls) == 2


def test_the_classifier_of_the_job_is_the_one_that_is_loaded(tmp_path, loads):
    coded_set(tmp_path / "imagenet-a", {CLASSES[0]: [0]})
    calls = loads(one_hot_logits([CLASSES[0]]))
    job = make_job(A, tmp_path, tmp_path / "work")
    run_job(replace(job, parent=replace(job.checkpoint, name="fine-tuned")))
    assert [c.name for c in calls] == ["fine-tuned"]


def test_a_classifier_without_a_thousand_classes_is_refused(tmp_path, loads):
    coded_set(tmp_path / "imagenet-a", {CLASSES[0]: [0]})
    loads(torch.zeros(1, 200))
    record = run_job(make_job(A, tmp_path, tmp_path / "work"))
    assert record.status == "failed"
    assert "200 classes" in record.reason


@pytest.mark.skipif(not SHARED.is_dir(), reason="no real images beside this checkout")
def test_real_images_go_through_every_transform():
    """Greyscale and tiny ones among them."""
    files = sorted((SHARED / "imagenet_samples").rglob("*.*"))
    images = [read_image(file) for file in files if is_image(file.name)]
    assert len(images) > 50
    for transform in (
        eval_transform(224),
        eval_transform(224, "resize"),
        eval_transform(224, "center_crop"),
        v2.Compose([v2.PILToTensor(), train_transform(224, 0.08, "rand-m9-mstd0.5-inc1")]),
        v2.Compose([v2.PILToTensor(), probe_transform(224, 0.08)]),
    ):
        for image in images:
            out = transform(image)
            assert (out.shape, out.dtype) == ((3, 224, 224), torch.uint8)
