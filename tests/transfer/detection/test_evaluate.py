"""COCO's metrics against COCOeval run by hand, and their standard errors against a closed form."""

import contextlib
import copy
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tests.fixtures import SHARED
from tests.fixtures.coco import COLOURS, FIRST_ID, NAMES, crowd, detection, filled, rectangle, write_split
from tests.fixtures.detection import by_hand, summarize
from transfer.data.coco import annotation_file, read_split
from transfer.detection.evaluate import RESAMPLES, Matches, bootstrap, evaluate
from transfer.detection.shared import to_results

VAL = FIRST_ID["val"]


def write(path: Path, found: list[dict]) -> Path:
    path.write_text(json.dumps(found))
    return path


@pytest.fixture(scope="module")
def crowded(tmp_path_factory) -> Path:
    """Twelve images of four categories with a crowd in every third."""
    rng, objects, sizes = np.random.default_rng(0), [], [(160, 128)] * 12
    for i in range(12):
        for k in range(3):
            x, y, w, h = (int(v) for v in (rng.integers(0, 60), rng.integers(0, 60), *rng.integers(12, 64, 2)))
            objects.append(rectangle(VAL + i, list(COLOURS)[(i + k) % 4], x, y, w, h))
        if i % 3 == 0:
            objects.append(crowd(VAL + i, 44, filled([100, 20, 50, 80], (128, 160))))
    return write_split(tmp_path_factory.mktemp("crowded"), "val", sizes, objects)


def truth_as_detections(annotations: Path, crowds: bool = False) -> list[dict]:
    """The file's objects, or its crowds, the first with the highest score."""
    truth = COCO(str(annotations))
    objects = enumerate(a for a in truth.anns.values() if a["iscrowd"] == crowds)
    scored = ((a, 1.0 - i / 1000) for i, a in objects)
    return [detection(a["image_id"], a["category_id"], a["bbox"], s, truth.annToMask(a)) for a, s in scored]


@pytest.fixture(scope="module")
def noisy(crowded) -> list[dict]:
    """Shifted boxes with masks of another shape, some of a wrong class, some twice, some inside the crowds."""
    rng, found = np.random.default_rng(1), []
    for one in truth_as_detections(crowded):
        for _ in range(rng.integers(0, 3)):
            x, y, w, h = one["bbox"] + rng.normal(0, 4, 4)
            category = one["category_id"] if rng.random() < 0.8 else 18
            box = [float(v) for v in (x, y, max(w, 2), max(h, 2))]
            # Equal between images, never within one: there the copies of a resample could be ranked in two ways.
            score = round(float(rng.random()), 1) + 0.001 * sum(f["image_id"] == one["image_id"] for f in found)
            mask = filled(box, (128, 160))
            mask[::2, : rng.integers(1, 40)] = 0
            found.append(detection(one["image_id"], category, box, score, mask))
    inside = [105, 25, 12, 12]
    return found + [detection(VAL + i, 44, inside, 0.7, filled(inside, (128, 160))) for i in range(12)]


def test_ground_truth_fed_back_gives_100_and_crowds_are_respected(crowded, tmp_path):
    """Also with detections inside the crowds, which are neither right nor wrong; the same elsewhere are wrong."""
    inside, outside = [105, 25, 12, 12], [0, 110, 12, 12]
    found = [detection(image, 44, inside, 1.0, filled(inside, (128, 160))) for image in (VAL, VAL + 3)]
    found = truth_as_detections(crowded) + found
    metrics = evaluate(crowded, write(tmp_path / "found.json", found)).metrics
    assert metrics["box_ap"] == metrics["mask_ap"] == 100.0
    assert metrics["box_ap75"] == metrics["mask_ap50"] == 100.0
    for box, image in ((outside, VAL), (inside, VAL + 1)):
        worse = [*found, detection(image, 44, box, 1.0, filled(box, (128, 160)))]
        metrics = evaluate(crowded, write(tmp_path / "worse.json", worse)).metrics
        assert metrics["box_ap"] < 100.0
        assert metrics["mask_ap"] < 100.0


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "coco").is_dir(), reason="the real subset is not here")
def test_ground_truth_of_the_real_subset_gives_100(tmp_path):
    """Boxes and masks as the reader gives them to the detectors, and one detection in each crowd."""
    found, annotations = [], annotation_file(SHARED, "val")
    for example in read_split(SHARED, "val").examples:
        found += to_results(example, example.boxes, np.full(len(example.labels), 0.5), example.labels, example.masks())
    crowds = truth_as_detections(annotations, crowds=True)
    assert crowds
    found += [{**crowd, "score": 1.0} for crowd in crowds]
    metrics = evaluate(annotations, write(tmp_path / "found.json", found)).metrics
    for name in ("box_ap", "mask_ap", "box_ap_large"):
        assert metrics[name] == pytest.approx(100.0)


def test_metrics_are_those_of_cocoeval(crowded, noisy, tmp_path):
    found = evaluate(crowded, write(tmp_path / "found.json", noisy))
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium")
    for name, kind in (("box", "bbox"), ("mask", "segm")):
        stats = by_hand(crowded, noisy, kind).stats
        assert 0.01 < stats[0] < 0.9
        expected = {f"{name}_{metric}": 100 * value for metric, value in zip(names, stats)}
        assert {k: v for k, v in found.metrics.items() if k.startswith(name)} == pytest.approx(expected)
        assert stats[5] == -1  # no object above 96 x 96 px: no metric, not -100
    assert found.metrics["box_ap"] != found.metrics["mask_ap"]


def test_only_some_images_count_as_in_a_file_of_those_alone(crowded, noisy, tmp_path):
    some = [VAL + i for i in (1, 4, 5, 9)]
    content = json.loads(crowded.read_text())
    content["images"] = [image for image in content["images"] if image["id"] in some]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in some]
    (tmp_path / "some.json").write_text(json.dumps(content))
    theirs = [one for one in noisy if one["image_id"] in some]
    expected = evaluate(tmp_path / "some.json", write(tmp_path / "theirs.json", theirs))
    found = evaluate(crowded, write(tmp_path / "found.json", theirs), only=some)
    assert found == expected
    assert found.metrics != evaluate(crowded, tmp_path / "found.json").metrics


def test_ap_per_class_is_that_of_cocoeval_on_that_class(crowded, noisy, tmp_path):
    found = evaluate(crowded, write(tmp_path / "found.json", noisy)).per_class
    for name, kind in (("box_ap", "bbox"), ("mask_ap", "segm")):
        assert set(found[name]) == {NAMES[category] for category in COLOURS}
        evaluator = by_hand(crowded, noisy, kind)
        for category in COLOURS:
            evaluator.params.catIds = [category]
            summarize(evaluator)
            assert found[name][NAMES[category]] == pytest.approx(100 * evaluator.stats[0], abs=0.006)


def test_the_size_of_a_mask_is_its_area_not_its_box(tmp_path):
    """A false positive of two small squares far apart counts among the small masks: precision 1/2 there."""
    annotations = write_split(tmp_path, "val", [(200, 200)], [rectangle(VAL, 1, 10, 10, 20, 20)])
    right = [10, 10, 20, 20]
    scattered = filled([40, 40, 10, 10], (200, 200)) + filled([180, 180, 10, 10], (200, 200))
    found = [detection(VAL, 1, right, 0.5, filled(right, (200, 200)))]
    found.append(detection(VAL, 1, [40, 40, 150, 150], 0.9, scattered))
    metrics = evaluate(annotations, write(tmp_path / "found.json", found)).metrics
    assert metrics["mask_ap_small"] == pytest.approx(50.0)
    assert metrics["box_ap_small"] == pytest.approx(100.0)  # its box is large
    assert metrics["box_ap"] == metrics["mask_ap"] == pytest.approx(50.0)


def test_nothing_detected_is_0(crowded, tmp_path):
    found = evaluate(crowded, write(tmp_path / "found.json", []))
    assert found.metrics["box_ap"] == found.metrics["mask_ap"] == found.metrics["box_ap50"] == 0.0
    assert found.stderr == {"box_ap": 0.0, "mask_ap": 0.0}
    assert set(found.per_class["box_ap"].values()) == {0.0}


def test_nothing_is_printed_and_the_results_file_stays(crowded, noisy, tmp_path, capsys):
    path = write(tmp_path / "found.json", noisy)
    before = path.read_bytes()
    evaluate(crowded, path)
    assert capsys.readouterr().out == ""
    assert path.read_bytes() == before


# The bootstrap


def resampled(evaluator: COCOeval, drawn: list[int]) -> float:
    """COCOeval's own accumulation over those images, one that is drawn twice standing there twice."""
    again, p, images = copy.deepcopy(evaluator), evaluator.params, len(evaluator.params.imgIds)
    blocks = range(len(p.catIds) * len(p.areaRng))
    again.evalImgs = [evaluator.evalImgs[block * images + i] for block in blocks for i in drawn]
    for parameters in (again.params, again._paramsEval):
        parameters.imgIds = list(range(len(drawn)))
    with contextlib.redirect_stdout(io.StringIO()):
        again.accumulate()
        again.summarize()
    return again.stats[0]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_accumulation_over_a_resample_is_cocoeval_s(crowded, noisy, kind):
    evaluator = by_hand(crowded, noisy, kind)
    matches = Matches(evaluator)
    assert matches.ap(np.ones(12, int)) == pytest.approx(evaluator.stats[0], abs=1e-12)
    rng, seen = np.random.default_rng(5), set()
    for _ in range(8):
        drawn = sorted(rng.integers(12, size=12).tolist())
        expected = resampled(evaluator, drawn)
        assert matches.ap(np.bincount(drawn, minlength=12)) == pytest.approx(expected, abs=1e-12)
        seen.add(expected)
    assert len(seen) == 8
    # Without an object of a category, AP is over the others; without any, there is none.
    assert matches.ap(np.eye(12, dtype=int)[0]) == pytest.approx(resampled(evaluator, [0]), abs=1e-12)
    assert math.isnan(matches.ap(np.zeros(12, int)))


def test_more_detections_than_count_are_left_out_of_the_accumulation_too(tmp_path):
    """Of an image COCOeval takes the 100 best of a category."""
    objects = [rectangle(VAL, 1, 10, 10, 20, 20), rectangle(VAL + 1, 1, 10, 10, 20, 20)]
    annotations = write_split(tmp_path, "val", [(64, 48)] * 2, objects)
    wrong, right = filled([40, 10, 9, 9], (48, 64)), filled([10, 10, 20, 20], (48, 64))
    found = [detection(VAL, 1, [40, 10, 9, 9], 0.9 - i / 1000, wrong) for i in range(110)]
    found += [detection(image, 1, [10, 10, 20, 20], 0.1, right) for image in (VAL, VAL + 1)]
    evaluator = by_hand(annotations, found, "bbox")
    assert Matches(evaluator).ap(np.ones(2, int)) == pytest.approx(evaluator.stats[0], abs=1e-12)


def half_found(folder: Path, images: int, right: int) -> tuple[Path, list[dict]]:
    """One object an image, of which the first `right` are found exactly and nothing else is."""
    objects = [rectangle(VAL + i, 1, 10, 10, 20, 20) for i in range(images)]
    annotations = write_split(folder, "val", [(64, 48)] * images, objects)
    return annotations, truth_as_detections(annotations)[:right]


def test_the_standard_error_is_that_of_200_resamples(tmp_path):
    """Precision is 1 up to the recall d/n, 0 beyond: AP is the share of the 101 recalls up to it."""
    annotations, found = half_found(tmp_path, 20, 9)
    path = write(tmp_path / "found.json", found)
    rng, values = np.random.default_rng(7), []
    for _ in range(200):
        recall = (rng.integers(20, size=20) < 9).sum() / 20
        values.append(100 * (np.linspace(0, 1, 101) <= recall).mean() if recall else 0.0)
    evaluation = evaluate(annotations, path, seed=7)
    assert evaluation.metrics["box_ap"] == pytest.approx(100 * 46 / 101)
    assert evaluation.stderr["box_ap"] == pytest.approx(np.std(values, ddof=1), rel=1e-6)
    # About the binomial's: sqrt(0.45 * 0.55 / 20) = 11.1 %.
    assert 9.5 < evaluation.stderr["box_ap"] < 12.7
    assert evaluation.stderr["mask_ap"] == evaluation.stderr["box_ap"]
    assert evaluate(annotations, path, seed=8).stderr != evaluation.stderr
    assert evaluate(annotations, path, seed=7) == evaluation


def test_images_that_are_all_alike_have_no_standard_error(tmp_path):
    annotations, found = half_found(tmp_path, 6, 6)
    evaluation = evaluate(annotations, write(tmp_path / "found.json", found))
    assert evaluation.metrics["box_ap"] == 100.0
    assert evaluation.stderr == {"box_ap": 0.0, "mask_ap": 0.0}


def test_resamples_without_an_object_do_not_count(tmp_path):
    """One image of two has the only object, found exactly: AP is 100 or none."""
    annotations = write_split(tmp_path, "val", [(64, 48)] * 2, [rectangle(VAL, 1, 10, 10, 20, 20)])
    evaluator = by_hand(annotations, truth_as_detections(annotations), "bbox")
    assert bootstrap(evaluator, 0) == 0.0
    assert RESAMPLES == 200
