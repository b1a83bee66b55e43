"""Connected components the slow and plain way."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Mask = NDArray[np.bool_]
FULL = np.ones((3, 3, 3), bool)


def parts_of(mask: Mask) -> list[Mask]:
    """Each component's mask, largest first, then by its first voxel."""
    numbers, count = ndimage.label(mask, FULL)
    parts = [numbers == n for n in range(1, count + 1)]
    return sorted(parts, key=lambda part: (-part.sum(), np.flatnonzero(part)[0]))


def plain_keep(mask: Mask, voxel_ml: float, most: int = 2, min_ratio: float = 0.05, min_ml: float = 20) -> Mask:
    """The largest component and those that can be another kidney."""
    kept = np.zeros_like(mask)
    parts = parts_of(mask)
    for rank, part in enumerate(parts[:most]):
        if rank == 0 or (part.sum() >= min_ratio * parts[0].sum() and part.sum() * voxel_ml >= min_ml):
            kept |= part
    return kept


def two_rows(second: int) -> Mask:
    """A row of 100 voxels and, apart from it, a row of ``second``."""
    mask = np.zeros((5, 5, 100), bool)
    mask[0, 0] = True
    mask[4, 4, :second] = True
    return mask
