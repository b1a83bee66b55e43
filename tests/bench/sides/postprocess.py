"""Seconds to keep the two largest components and fill holes in 512 x 512 x 505: postprocess.py kitseg|scipy."""

from __future__ import annotations

import sys
import time

import numpy as np
from scipy import ndimage
from side import say

from kitseg.postprocess.holes import FillHoles
from kitseg.postprocess.kidneys import KeepKidneys
from kitseg.types import Masks

SHAPE, SPACING = (505, 512, 512), (1.0, 0.78, 0.78)
rng = np.random.default_rng(0)
mask = np.zeros(SHAPE, np.bool_)
for middle, radii in (((250, 280, 150), (55, 40, 40)), ((260, 280, 360), (55, 40, 40))):
    z, y, x = np.ogrid[tuple(slice(0, n) for n in SHAPE)]
    mask |= sum(((a - m) / r) ** 2 for a, m, r in zip((z, y, x), middle, radii, strict=True)) < 1
holes = [tuple(int(rng.integers(m - 20, m + 20)) for m in (250, 280, 150)) for _ in range(60)]
for point in holes:
    mask[tuple(slice(p, p + 3) for p in point)] = False
for _ in range(300):  # specks
    mask[tuple(slice(p, p + 3) for p in (rng.integers(0, n - 3) for n in SHAPE))] = True


def with_kitseg() -> np.ndarray:
    masks, hu = Masks(mask, np.zeros_like(mask)), np.zeros(SHAPE, np.int16)
    for step in (KeepKidneys(most=2, min_ratio=0.05, min_ml=20), FillHoles()):
        masks = step(masks, hu, SPACING)
    return masks.foreground


def with_scipy() -> np.ndarray:
    labels, count = ndimage.label(mask, np.ones((3, 3, 3)))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    sizes[0] = 0
    return ndimage.binary_fill_holes(np.isin(labels, np.argsort(sizes)[-2:]))


work = with_kitseg if sys.argv[1] == "kitseg" else with_scipy
begun = time.perf_counter()
found = work()
say(time.perf_counter() - begun, voxels=int(found.sum()))
