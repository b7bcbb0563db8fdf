"""Seeds from several integers."""

import random

import numpy as np
import torch


def seed_for(*parts: int) -> int:
    """One 64-bit seed from several integers; neighbouring inputs give unrelated seeds."""
    low, high = np.random.SeedSequence(parts).generate_state(2)
    return int(low) | int(high) << 32


def seed_all(*parts: int, device: str = "cpu") -> None:
    """Seed every generator that an augmentation or a layer may draw from; the GPU's too where that is the device."""
    seed = seed_for(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # Not torch.manual_seed: until CUDA is initialised it queues every call with its stack, without end.
    torch.default_generator.manual_seed(seed % 2**63)
    if device.startswith("cuda"):
        torch.cuda.manual_seed(seed % 2**63)
