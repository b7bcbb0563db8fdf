"""Compute each number of a record again from its stored predictions, with code that no task uses.

    mae-transfer verify RECORD...

A record or a file that is not as the run left it is refused by name. The scores are scikit-learn's and pycocotools'.
"""

import argparse
import contextlib
import io
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from sklearn.metrics import accuracy_score, jaccard_score, recall_score

from mae_core.checkpoint import sha256_of
from mae_core.command_line import answered
from mae_core.errors import UserError
from mae_core.flags import named_path, program
from transfer.classification.job import WITHOUT_EMA
from transfer.classification.robustness import ALEXNET_ERROR
from transfer.data.coco import Examples, annotation_file
from transfer.data.coco import read_split as read_coco
from transfer.data.predictions import MAIN, digest_of, names_of, read_predictions
from transfer.run import altered, read_record
from transfer.task import RECORD_FILE, Record

TOLERANCE = 1e-6  # relative: of sums in another order
Rows = Mapping[str, np.ndarray]  # the columns of one set


def verify(path: Path, data: Path | None = None) -> dict[str, float]:
    """The metrics of a record, computed again. UserError by name for what was altered or is missing, or if one differs.

    data: where the record's data lie now, for COCO's annotations; by default where they lay.
    """
    record = read_record(path)
    check_unaltered(record, path)
    if record.status != "ok":
        return {}
    if not record.predictions:
        raise UserError(f"{path} names no predictions: an earlier version made it, whose numbers cannot be verified")
    file = path.parent / Path(record.predictions["file"]).name
    check_hash(file, record.predictions["sha256"], path)
    with told_as_damaged(file):
        again = metrics_of(record, file, path, data)
    for name, value in record.metrics.items():
        if name not in again:
            raise UserError(f"{path}: nothing in {file.name} tells {name}")
        if not math.isclose(value, again[name], rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            raise UserError(f"{path}: {name} is {value:.6f}, but {again[name]:.6f} by {file.name}")
    return {name: again[name] for name in record.metrics}


@contextlib.contextmanager
def told_as_damaged(file: Path) -> Iterator[None]:
    """UserError in place of what a file raises that lacks a column, or has other values there than a run writes."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, ZeroDivisionError) as e:
        what = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        raise UserError(f"{file} does not hold what its task writes ({what})") from None


def check_unaltered(record: Record, path: Path) -> None:
    """UserError if the record or a file that it names is not as the run left it. Weights may have been deleted."""
    if not record.digest:
        raise UserError(
            f"{path} has no digest: an earlier version made it, so it cannot be told whether it was altered"
        )
    if altered(record):
        raise UserError(f"{path} was altered: its fields do not give its digest")
    for name, sha256 in record.artifacts.items():
        if (file := path.parent / Path(name).name).exists():
            check_hash(file, sha256, path)


def check_hash(file: Path, sha256: str, record: Path) -> None:
    try:
        found = sha256_of(file)
    except OSError as e:
        raise UserError(f"{file} cannot be read ({e.strerror}); {record.name} was computed from it") from None
    if found != sha256:
        raise UserError(f"{file} was altered: it is not the file that {record} names")


def metrics_of(record: Record, file: Path, path: Path, data: Path | None) -> dict[str, float]:
    if file.suffix == ".json":
        return coco_metrics(record, file, path, data)
    sets = read_predictions(file)
    if not sets or digest_of(sets) != record.predictions["images"]:
        raise UserError(f"{file} holds other images than {path} names")
    if record.task == "imagenet_c":
        return corruption_metrics(sets)
    if "heads" in record.resolved:
        linear_alone = record.identity.get("task_version", 0) >= 2  # of the best on the test images
        return probe_metrics(sets[MAIN], sets["held_out"], record.resolved["heads"], linear_alone)
    found: dict[str, float] = {}
    for name, rows in sets.items():
        score: Callable[[Rows], dict[str, float]] = accuracies
        if "intersection" in rows:
            score = segmentation_metrics
        elif "squared_error" in rows:
            score = depth_metrics
        elif "neighbours" in rows:
            score = partial(neighbour_metrics, k=record.recipe["k"], temperature=record.recipe["temperature"])
        found |= {named(metric, name): value for metric, value in score(rows).items()}
    return found


def named(metric: str, set_name: str) -> str:
    """What a record calls the metric of a set that is not its main one."""
    others = {MAIN: metric, "clean": f"clean_200_{metric}", WITHOUT_EMA: f"{metric}_{WITHOUT_EMA}"}
    return others.get(set_name, f"{metric}_ms" if set_name == "multi_scale" else f"{metric}@{set_name}")


def right_classes(rows: Rows, classes: np.ndarray) -> np.ndarray:
    """Whether those classes [n] are right for the images: the label, or one of `labels` where there are several."""
    if "labels" not in rows:
        return classes == rows["label"]
    return np.array([str(c) in listed.split(" ") for c, listed in zip(classes, rows["labels"])])


def accuracies(rows: Rows) -> dict[str, float]:
    """top1, top5, loss (the mean) and ece of a classifier; UserError if losses and log-probabilities disagree."""
    label = rows["label"]
    ranked = [rows[name] for name in rows if name.startswith("top")]
    log_probs = [rows[name] for name in rows if name.startswith("log_prob")]
    for classes, log_prob in zip(ranked, log_probs):
        right = classes == label
        if not np.allclose(-log_prob[right], rows["loss"][right], rtol=1e-4, atol=1e-4):
            raise UserError("the losses are not those of the log-probabilities beside them")
    every, first = np.ones(len(label), bool), right_classes(rows, ranked[0])
    in_five = np.any([right_classes(rows, classes) for classes in ranked], axis=0)
    return {
        "top1": 100 * accuracy_score(every, first),
        "top5": 100 * accuracy_score(every, in_five),
        "loss": math.fsum(rows["loss"].tolist()) / len(label),
        "ece": 100 * calibration_error(np.exp(log_probs[0]), first),
    }


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """The share of the images in each bin of confidence, times the gap between their accuracy and mean confidence."""
    total, edges = 0.0, np.linspace(0, 1, bins + 1, dtype=np.float32)
    for low, high in zip(edges, (*edges[1:], np.inf)):
        inside = (low <= confidence) & (confidence < high)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean(dtype=np.float64))
    return float(total)


def corruption_metrics(sets: Mapping[str, Rows]) -> dict[str, float]:
    """mce and mean_err from the sets CORRUPTION/SEVERITY."""
    errors = {name: 1 - accuracy_score(rows["label"], rows["top1"]) for name, rows in sets.items()}
    by_corruption = {c: [e for name, e in errors.items() if name.split("/")[0] == c] for c in ALEXNET_ERROR}
    relative = [np.mean(found) / ALEXNET_ERROR[c] for c, found in by_corruption.items()]
    return {"mce": 100 * float(np.mean(relative)), "mean_err": 100 * float(np.mean(list(errors.values())))}


def probe_metrics(test: Rows, held: Rows, names: Sequence[str], linear_alone: bool) -> dict[str, float]:
    """Of the heads of these names, those that are best on the held-out images, scored on the test images; and the best
    there, of the linear ones or of all. UserError if the classes beside the labels are not of the head that was
    chosen."""

    def scores(rows: Rows) -> list[float]:
        return [float(100 * accuracy_score(rows["label"], classes)) for classes in rows["heads"].T]

    on_held, on_test, found = scores(held), scores(test), {}
    for kind in ("", "linear", "attentive"):
        heads = [i for i, name in enumerate(names) if name.startswith(kind)]
        if heads:
            best = heads[int(np.argmax([on_held[i] for i in heads]))]
            found[f"top1_{kind}" if kind else "top1"] = on_test[best]
            if not kind and (test["heads"][:, best] != test["top1"]).any():
                raise UserError("the classes kept as top1 are not those of the head that was chosen")
    kind, below = ("linear", "top1_linear") if linear_alone else ("", "top1")
    highest = max(score for score, name in zip(on_test, names) if name.startswith(kind))
    return found | {"top1_best_on_test": highest, "optimism": highest - found[below]}


def neighbour_metrics(rows: Rows, k: int, temperature: float) -> dict[str, float]:
    """top1 by a vote of the stored neighbours; at other numbers of them from the stored winners."""
    label = rows["label"]
    voted = []
    for similarities, classes in zip(rows["similarities"][:, :k].astype(np.float64), rows["neighbour_labels"][:, :k]):
        voted.append(int(np.bincount(classes, np.exp((similarities - similarities[0]) / temperature)).argmax()))
    disagree = np.flatnonzero(np.array(voted) != rows["top1"])
    if len(disagree) > len(label) / 1000:  # in float32 a tie may fall to the other class
        raise UserError(
            f"{len(disagree)} winners are not those of their neighbours, first {rows['image'][disagree[0]]}"
        )
    return {name: 100 * accuracy_score(label, rows[name]) for name in rows if name.startswith("top1")}


def segmentation_metrics(rows: Rows) -> dict[str, float]:
    """miou, macc and aacc from pixel counts: of each class, pixels that both have, that only the label has, and that
    only the prediction has, weigh three pairs of truth and prediction."""
    ious, accuracies = [], []
    for c in np.unique(rows["class"]):
        both, union, label = (int(rows[n][rows["class"] == c].sum()) for n in ("intersection", "union", "label_pixels"))
        truth, predicted, weight = [1, 1, 0], [1, 0, 1], [both, label - both, union - label]
        if union:
            ious.append(jaccard_score(truth, predicted, sample_weight=weight))
        if label:
            accuracies.append(recall_score(truth, predicted, sample_weight=weight))
    right = rows["intersection"].sum() / rows["label_pixels"].sum()
    return {"miou": 100 * float(np.mean(ious)), "macc": 100 * float(np.mean(accuracies)), "aacc": 100 * float(right)}


def depth_metrics(rows: Rows) -> dict[str, float]:
    """delta1, rmse and abs_rel: means over the images of what each has from its pixels."""
    images = list(zip(*(rows[name].tolist() for name in ("pixels", "within", "squared_error", "relative_error"))))
    return {
        "delta1": 100 * math.fsum(within / pixels for pixels, within, _, _ in images) / len(images),
        "rmse": math.fsum(math.sqrt(squared / pixels) for pixels, _, squared, _ in images) / len(images),
        "abs_rel": math.fsum(relative / pixels for pixels, _, _, relative in images) / len(images),
    }


def coco_metrics(record: Record, file: Path, path: Path, data: Path | None) -> dict[str, float]:
    """Box and mask AP of a COCO-results file by pycocotools."""
    root = data or Path(record.data.get("root") or "")
    annotations = annotation_file(root, "val")
    if not annotations.exists():
        raise UserError(f"{path}: {annotations} is not there, without which AP cannot be computed: give --data")
    examples = tested_examples(record, root)
    if digest_of({MAIN: {"image": names_of(examples.files)}}) != record.predictions["images"]:
        raise UserError(f"{annotations} lists other images than {path} was scored on: give --data")
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    found: dict[str, float] = {}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth = COCO(str(annotations))
        detections = json.loads(file.read_text(encoding="utf-8"))
        for prefix, kind, without in (("box", "bbox", "segmentation"), ("mask", "segm", "bbox")):
            kept = [{k: v for k, v in entry.items() if k != without} for entry in detections]
            if not kept:  # loadRes cannot read an empty list
                found |= {f"{prefix}_{name}": 0.0 for name in names}
                continue
            scored = COCOeval(truth, truth.loadRes(kept), kind)
            scored.params.imgIds = sorted(examples.ids[examples.rows].tolist())
            scored.evaluate()
            scored.accumulate()
            scored.summarize()
            found |= {f"{prefix}_{name}": 100 * float(value) for name, value in zip(names, scored.stats)}
    return found


def tested_examples(record: Record, root: Path) -> Examples:
    """The validation images of COCO that the record's number is of: with --limit the first ones."""
    examples = read_coco(root, "val").examples
    assert isinstance(examples, Examples)  # or its annotations would not be there
    return examples.few(int(record.data.get("limit") or 0))


def records_at(path: Path) -> list[Path]:
    """The record that a path names, or all below a folder; UserError if there is none."""
    if not path.is_dir() and path.name != RECORD_FILE:
        raise UserError(f"{path} is no {RECORD_FILE}: give one, or a folder that holds some")
    found = sorted(path.rglob(RECORD_FILE)) if path.is_dir() else [path] if path.exists() else []
    if not found:
        raise UserError(f"{path} holds no {RECORD_FILE}" if path.is_dir() else f"{path} does not exist")
    return found


def main(argv: list[str] | None = None) -> int:
    """Exit code 0: every number agrees with what it is made of. 1: one does not, or was altered. 2: no record."""
    parser = argparse.ArgumentParser(
        prog=program("benchmarks.verify"), description="Compute every number again from its stored predictions."
    )
    parser.add_argument(
        "records", nargs="+", type=named_path, metavar="RECORD", help="record.json, or a folder that holds some"
    )
    parser.add_argument("--data", type=named_path, help="where the data lie now, for COCO's annotations")
    return answered(partial(run, parser.parse_args(argv)))


def run(args: argparse.Namespace) -> int:
    bad = 0
    for path in (record for folder in args.records for record in records_at(folder)):
        try:
            found = verify(path, args.data)
        except UserError as e:
            bad += 1
            print(f"error: {e}", file=sys.stderr, flush=True)
        else:
            agreed = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
            print(f"{path}: {agreed or 'no number, as it says'}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
