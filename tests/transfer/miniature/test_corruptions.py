"""The 15 corruptions: their names, and that severity grows."""

from itertools import pairwise

import numpy as np
import pytest

from tests.fixtures.miniature import PUBLISHED_CORRUPTIONS
from transfer.miniature import scenes
from transfer.miniature.corruptions import CORRUPTIONS, SEVERITIES, corrupt


def test_corruption_names_are_the_published_ones():
    assert list(CORRUPTIONS) == PUBLISHED_CORRUPTIONS
    assert SEVERITIES == (1, 2, 3, 4, 5)


@pytest.mark.parametrize("name", PUBLISHED_CORRUPTIONS)
def test_severity_grows(name):
    """The mean squared difference to the clean image rises with every step of severity."""
    clean = [
        scenes.photograph(scenes.plain_scene(kind, np.random.default_rng(i)), np.random.default_rng(i))
        for i, kind in enumerate(scenes.CLASSES)
    ]

    def distance(severity: int) -> float:
        changed = [corrupt(image, name, severity, np.random.default_rng(i)) for i, image in enumerate(clean)]
        return float(np.mean([np.square(a.astype(float) - b).mean() for a, b in zip(changed, clean)]))

    distances = [distance(severity) for severity in SEVERITIES]
    assert distances[0] > 1
    assert all(low < high for low, high in pairwise(distances)), distances
