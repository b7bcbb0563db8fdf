"""The configuration that a recipe becomes, and what mmsegmentation builds from it."""

import inspect
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mae_core.errors import UserError
from mae_core.machine import Machine
from tests.fixtures.image import odd_files
from tests.fixtures.segmentation import make_config, make_job
from transfer.data.ade20k import FOLDER, check_pair
from transfer.segmentation.mmseg_config import LOAD_IMAGE, multi_scale_pipeline
from transfer.segmentation.mmseg_config import test_loader as make_loader
from transfer.segmentation.train import make_runner


def test_every_key_of_the_configuration_is_one_that_the_runner_takes(root, tmp_path, mmseg):
    """mmengine ignores the others without a word; it reads none of ours from elsewhere."""
    from mmengine.runner import Runner

    config = make_config(make_job(root, tmp_path))
    assert set(config) <= set(inspect.signature(Runner.__init__).parameters)


@pytest.mark.slow
def test_a_key_that_a_part_does_not_take_is_an_error(root, tmp_path, mmseg):
    """Below the top level mmengine is strict: so nothing in our configuration is ignored there either."""
    job = make_job(root, tmp_path)

    for part in ("model", "test_dataloader", "test_cfg", "test_evaluator"):
        config = make_config(job)
        config[part].get("dataset", config[part])["fp16"] = True
        with pytest.raises(TypeError, match="fp16"):
            make_runner(config, job).test()


def test_taps_beyond_the_last_block_are_refused(root, tmp_path):
    with pytest.raises(UserError, match="taps=1,2,3,6: the last block of vit_mini_patch8 is 5"):
        make_config(make_job(root, tmp_path, taps=(1, 2, 3, 6)))


def test_the_parts_are_those_of_the_recipe(start):
    model = start[0]
    assert model.backbone.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)
    decode, auxiliary = model.decode_head, model.auxiliary_head
    assert type(decode).__name__ == "LossOnlyUPerHead"
    assert [type(p[0]).__name__ for p in decode.psp_modules] == ["AdaptiveAvgPool2d"] * 4
    assert [p[0].output_size for p in decode.psp_modules] == [1, 2, 3, 6]
    assert (decode.num_classes, decode.dropout.p, decode.loss_decode.loss_weight) == (150, 0.1, 1.0)
    assert (auxiliary.in_index, len(auxiliary.convs), auxiliary.loss_decode.loss_weight) == (2, 1, 0.4)
    assert type(model.backbone.upsample_4x[1]) is nn.BatchNorm2d


def test_several_gpus_share_their_batch_norm_statistics(root, tmp_path, mmseg):
    """In the model that is trained and in the multi-scale test of it, whose Runner mmengine makes anew."""
    norms = {}
    for machine in (Machine(), Machine(device="cuda:0", processes=8)):
        job = make_job(root, tmp_path / str(machine.processes), machine)
        model = make_runner(config := make_config(job), job).model
        runners = model, make_runner(config | {"model": {"type": "SegTTAModel", "module": model}}, job).model
        for runner in runners:
            found = Counter(type(m) for m in runner.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
            norms.setdefault(machine.processes, []).append(found)
    assert norms == {1: [{nn.BatchNorm2d: 14}] * 2, 8: [{nn.SyncBatchNorm: 14}] * 2}


def test_several_scales_are_twelve_views(root, tmp_path, mmseg):
    """Six sizes, each as it is and flipped, but none smaller than the window; the label at its own size in all."""
    from mmengine.registry import init_default_scope
    from mmseg.registry import DATASETS

    init_default_scope("mmseg")
    job = make_job(root, tmp_path)
    loader = make_loader(root / FOLDER, multi_scale_pipeline(job.recipe), job.machine, 0)
    views = DATASETS.build(loader["dataset"])[0]  # 52 x 52 px, to be shown at 56
    shown = [(3, side, side) for side in (48, 48, 56, 70, 84, 98) for _ in range(2)]
    assert [tuple(view.shape) for view in views["inputs"]] == shown
    assert [bool(sample.flip) for sample in views["data_samples"]] == [False, True] * 6
    for plain, flipped in zip(views["inputs"][::2], views["inputs"][1::2]):
        assert torch.equal(plain, flipped.flip(2))
    assert {tuple(sample.gt_sem_seg.shape) for sample in views["data_samples"]} == {(52, 52)}


def test_images_are_read_as_their_labels_are_stored(tmp_path):
    """Of any mode, and not turned by an orientation in the EXIF."""
    from mmcv.transforms import LoadImageFromFile

    read = LoadImageFromFile(**{key: value for key, value in LOAD_IMAGE.items() if key != "type"})
    label = tmp_path / "label.png"
    Image.fromarray(np.full((4, 8), 7, np.uint8)).save(label)
    for name, (content, colour) in odd_files().items():
        (tmp_path / name).write_bytes(content)
        assert check_pair(tmp_path / name, label)
        pixels = read({"img_path": str(tmp_path / name)})["img"]
        assert pixels.shape == (4, 8, 3), name
        np.testing.assert_allclose(pixels.reshape(-1, 3).mean(axis=0)[::-1], colour, atol=2, err_msg=name)
