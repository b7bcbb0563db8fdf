"""Fixtures that several test files share."""

import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import warm
from mae_core.autoencoder import MaskedAutoencoder

warm.READ_LATE.add("PYTEST_CURRENT_TEST")  # the children of all tests may be forks of one server
torch.set_num_threads(1)  # several threads sum in another order; and the models here are too small to gain by them
os.environ["MAE_TRANSFER_CACHE"] = ""  # else what one test finds about models that it has altered others would believe
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, for every child too, and some tests send it


@pytest.fixture(scope="session")
def noise_images(tmp_path_factory):
    """A folder of 64 PNGs of 48x48 px, every pixel random."""
    folder = tmp_path_factory.mktemp("noise_images")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 48, 48, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture
def small_mae():
    """Make a MaskedAutoencoder of vit_mini_patch8 with a decoder of one block, 32 wide, and weights that a training
    would have moved: no zero bias, no unit norm, so that swapping or leaving out any of them shows."""

    def make(seed=0, image_size=None, **options):
        torch.manual_seed(seed)
        model = MaskedAutoencoder(
            "vit_mini_patch8", image_size, **{"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2} | options
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        return model

    return make
