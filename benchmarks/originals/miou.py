"""Twin of ADE20K's scores: our mIoU and accuracies beside those of mmsegmentation's IoUMetric."""

import numpy as np
import torch
from PIL import Image

from benchmarks.originals import Call, Difference
from mae_core.errors import UserError
from transfer.data.ade20k import CLASSES, FOLDER, inspect_ade20k, pairs
from transfer.data.miou import class_scores, metrics_of
from transfer.segmentation.mmseg_plugin import register

IMAGES = 100  # at most


def miou(call: Call) -> list[Difference]:
    """Our scores beside IoUMetric's, on predictions stored as files: the labels of the validation images, moved by a
    few pixels, with class 1 where there is none."""
    register()
    from mmengine.logging import MMLogger
    from mmengine.registry import init_default_scope
    from mmseg.datasets import ADE20KDataset
    from mmseg.evaluation import IoUMetric
    from mmseg.registry import METRICS, TRANSFORMS

    MMLogger.get_instance("mmengine", log_level="ERROR")  # or it prints a table of 150 lines
    init_default_scope("mmseg")
    found = inspect_ade20k(call.data)
    if found.status != "found":
        raise UserError(found.detail)
    ours, theirs = METRICS.build({"type": "ImageAreas"}), IoUMetric()
    ours.dataset_meta = theirs.dataset_meta = ADE20KDataset.METAINFO
    read = TRANSFORMS.build({"type": "LoadAnnotations"})
    listed = pairs(call.data / FOLDER, "val")[:IMAGES]
    for image, file in listed:
        stored = call.work / file.name
        moved = np.roll(np.asarray(Image.open(file)), (5, 9), axis=(0, 1))
        Image.fromarray(np.maximum(moved, 1) - 1).save(stored)
        label = read({"seg_map_path": str(file), "seg_fields": [], "reduce_zero_label": True})["gt_seg_map"]
        data = {"gt_sem_seg": torch.from_numpy(label[None].astype(np.int64))}
        data["pred_sem_seg"] = torch.from_numpy(np.asarray(Image.open(stored))[None].astype(np.int64))
        sample = {name: {"data": tensor} for name, tensor in data.items()} | {"img_path": str(image)}
        ours.process({}, [sample])
        theirs.process({}, [sample])
    # In float64: evaluate() divides in float32.
    exact = theirs.total_area_to_metrics(*(sum(counts).double() for counts in zip(*theirs.results)))
    rounded = theirs.evaluate(len(listed))
    ours.evaluate(len(listed))
    return scores_apart(ours.areas.sum(axis=0), exact, rounded)


def scores_apart(areas: np.ndarray, exact: dict[str, np.ndarray], rounded: dict[str, float]) -> list[Difference]:
    """areas [3, C]: our counts. exact: IoU and Acc of each class and aAcc by their code, in 0..1; rounded: the metric's
    answer, in percent to two decimals."""
    mine, rows = metrics_of(areas), []
    for key, name, shown in (("miou", "IoU", "mIoU"), ("macc", "Acc", "mAcc"), ("aacc", "aAcc", "aAcc")):
        one, other, brief = float(mine[key]), 100 * float(np.nanmean(exact[name])), float(rounded[shown])
        rows.append(Difference(f"{shown}, %", one, other, abs(one - other), 1e-9))
        rows.append(Difference(f"{shown}, % to two decimals", one, brief, abs(one - brief), 0.005 + 1e-5))
    for name, by_class in zip(("IoU", "Acc"), class_scores(areas)):
        other_by_class = 100 * exact[name]
        assert np.array_equal(np.isnan(by_class), np.isnan(other_by_class))
        gaps = np.nan_to_num(np.abs(by_class - other_by_class))
        i = int(gaps.argmax())
        what = f"{name}, largest gap of a class ({CLASSES - np.isnan(by_class).sum()} have one), %"
        rows.append(Difference(what, float(by_class[i]), float(other_by_class[i]), float(gaps[i]), 1e-9))
    return rows
