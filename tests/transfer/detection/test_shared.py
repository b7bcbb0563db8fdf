"""What the engines share: the schedule, BatchNorm, the seeded pyramid, validation batches."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mae_core import distributed
from mae_core.machine import Machine
from tests.fixtures.coco import FIRST_ID
from tests.fixtures.detection import job_of
from transfer.detection import shared
from transfer.detection.recipe import recipe
from transfer.detection.shared import RoIBatchNorm


def test_the_schedule_of_the_paper():
    """117,266 images of train2017 have an object: 1832 iterations an epoch, half a cosine after 458 of warm-up."""
    iterations, rate = shared.schedule(recipe("vit_base_patch16", "paper"), 117266)
    assert iterations == 183200
    assert rate(0) == 0
    assert rate(229) == pytest.approx(4e-5)
    assert rate(458) == pytest.approx(8e-5)
    assert rate(458 + (183200 - 458) // 2) == pytest.approx(4e-5)
    assert rate(183199) == pytest.approx(0, abs=1e-12)
    assert all(rate(i) >= rate(i + 1000) for i in range(458, 180000, 1000))


def test_batchnorm_facts_tell_where_it_saw_another_batch():
    r = recipe("vit_base_patch16", "paper")
    facts, notes = shared.batchnorm_facts(r, Machine(processes=32), 2, synchronised=True)
    assert (facts, notes) == ({"batchnorm": "synchronised", "batchnorm_images": 64}, ())
    facts, notes = shared.batchnorm_facts(r, Machine(processes=32), 2, synchronised=False)
    assert facts == {"batchnorm": "plain", "batchnorm_images": 2}
    assert notes == ("BatchNorm saw 2 images at a time, not 64",)


def test_the_new_parts_of_the_pyramid_depend_only_on_the_seed(root, tmp_path):
    job = job_of(root, tmp_path)
    torch.manual_seed(99)
    first, said = shared.build_pyramid(job)
    torch.manual_seed(5)
    second, _ = shared.build_pyramid(job)
    third, _ = shared.build_pyramid(replace(job, seed=1))
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    assert not torch.equal(first.upsample_2x.weight, third.upsample_2x.weight)
    assert torch.equal(first.blocks[3].attn.qkv.weight, job.checkpoint.encoder["blocks.3.attn.qkv.weight"])
    assert "75 tensors loaded (pos_embed resized), 3 dropped" in said
    assert not first.activation_checkpointing
    job = replace(job, machine=Machine(activation_checkpointing=True))
    assert shared.build_pyramid(job)[0].activation_checkpointing


def test_the_square_has_the_image_in_its_upper_left_corner():
    pixels = np.random.default_rng(0).integers(1, 256, (30, 50, 3), dtype=np.uint8)
    square = shared.pad_to_square(Image.fromarray(pixels), 64).permute(1, 2, 0).numpy()
    assert np.array_equal(square[:30, :50], pixels)
    assert not square[30:].any()
    assert not square[:, 50:].any()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_validation_image_is_predicted_once_over_all_processes(root, tmp_path, monkeypatch, world):
    job, seen = job_of(root, tmp_path), []
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        batches = list(shared.validation_batches(job, 2))
        assert all(len(batch) <= 2 for batch in batches)
        for example, image in (pair for batch in batches for pair in batch):
            seen.append(example.id)
            assert image.size == (example.width, example.height)
    assert sorted(seen) == [FIRST_ID["val"] + i for i in range(3)]


def test_batchnorm_lets_an_empty_batch_pass():
    torch.manual_seed(0)
    norm, plain = RoIBatchNorm(5), nn.BatchNorm2d(5)
    x = torch.randn(4, 5, 3, 3)
    for training in (True, False):
        assert torch.equal(norm.train(training)(x), plain.train(training)(x))
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    empty = torch.zeros(0, 5, 3, 3, requires_grad=True)
    out = norm.train()(empty)
    out.sum().backward()
    assert out.shape == (0, 5, 3, 3)
    assert empty.grad.shape == (0, 5, 3, 3)
    assert all(torch.equal(before[name], value) for name, value in norm.state_dict().items())
    for parameter in norm.parameters():  # every process's gradients are averaged: there must be some
        assert not parameter.grad.any()
