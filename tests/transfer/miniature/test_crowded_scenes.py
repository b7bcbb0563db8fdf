"""Crowded scenes: who owns a pixel."""

import numpy as np
from scipy import ndimage

from transfer.miniature.crowded_scenes import crowded_scene, paint


def test_an_object_painted_later_owns_its_pixels():
    """The last object of a scene shows all of its outline; of the earlier ones at least 60 % is visible."""
    covered = 0
    for index in range(30):
        scene = crowded_scene(64, 48, np.random.default_rng(index))
        owner = paint(scene)[1]
        first = len(scene.regions)
        for i, thing in enumerate(scene.objects):
            alone = paint(type(scene)(64, 48, scene.regions[:1], (thing,)))[1] == 1
            seen = owner == first + i
            assert not (seen & ~alone).any()
            if i == len(scene.objects) - 1:
                assert (seen == alone).all()
            elif i >= scene.crowd:
                assert 0.6 * alone.sum() <= seen.sum() <= alone.sum()
                covered += seen.sum() < alone.sum()
            if i >= scene.crowd:
                assert (ndimage.binary_fill_holes(seen) == seen).all()
    assert covered > 10
