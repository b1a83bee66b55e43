"""A patient of few voxels, whose every part has its place."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from kitseg.patches.registration import Labelled
from kitseg.patches.warp import AIR
from kitseg.types import Geometry, Volume

SHAPE, SPACING = (30, 44, 52), 5.0


def volume(array: np.ndarray, spacing: float = SPACING) -> Volume:
    geometry = Geometry(array.shape, np.diag([spacing, spacing, spacing, 1.0]))
    return Volume(array, geometry, geometry, "case")


def patient() -> Labelled:
    """A body with a spine, two kidneys and a tumor in the left one, and fat of uneven density."""
    z, y, x = np.indices(SHAPE)

    def blob(middle: tuple[int, int, int], radii: tuple[int, int, int]) -> np.ndarray:
        return sum(((a - m) / r) ** 2 for a, m, r in zip((z, y, x), middle, radii, strict=True)) < 1

    uneven = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=SHAPE), 2) * 400
    hu = np.where(blob((15, 22, 26), (60, 17, 22)), -80 + uneven, AIR)
    hu[blob((15, 30, 26), (60, 4, 4))] = 240
    label = np.zeros(SHAPE, np.uint8)
    for middle in ((14, 25, 15), (16, 25, 37)):
        label[blob(middle, (8, 5, 4))] = 1
    label[blob((16, 25, 38), (3, 3, 2))] = 2
    hu[label == 1], hu[label == 2] = 160, 60
    return Labelled(volume(np.rint(hu).astype(np.int16)), volume(label))
