"""Tumors are neither rods nor balls: the ratio between the two largest eigenvalues of their voxels says which."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kitseg.components import Components
from kitseg.types import Masks

MIN_VOXELS = 10
FLAT = 1e-9  # a second eigenvalue below this part of the first is rounding


@dataclass(frozen=True)
class KeepTumorShape:
    """Keeps tumor components whose eigenvalue ratio is that of tumors, ``low`` to ``high``. Dual-unet paper, 2.2.

    The range is the 5th to 95th percentile of true tumors: one in ten of them goes; ``kitseg fit-priors`` finds the
    range of given cases. Components of fewer than ``min_voxels`` have no shape to speak of: the range was measured
    without them, and here they go.
    """

    low: float = 1.07
    high: float = 2.8
    min_voxels: int = MIN_VOXELS

    def __call__(self, masks: Masks, hu: NDArray[Any], spacing: tuple[float, float, float]) -> Masks:
        """``masks`` without tumors of another shape; looks neither at ``hu`` nor at ``spacing``."""
        tumors = Components.of(masks.tumor)
        return Masks(masks.foreground, tumors.chosen(self.keeps(eigenvalue_ratios(tumors), tumors.sizes)))

    def keeps(self, ratios: NDArray[np.float64], sizes: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which components of these ratios and sizes (in voxels) stay."""
        return (self.low <= ratios) & (ratios <= self.high) & (sizes >= self.min_voxels)


def eigenvalue_ratios(components: Components) -> NDArray[np.float64]:
    """λ₁/λ₂ of the covariance of voxel indices (not mm), by component number; infinite for a straight line or a voxel.

    λ₁ and λ₂ are the two largest of the three eigenvalues.
    """
    where = np.nonzero(components.numbers)
    number, sizes = components.numbers[where], np.maximum(components.sizes, 1)

    def mean(values: NDArray[Any]) -> NDArray[np.float64]:
        return np.bincount(number, weights=values, minlength=sizes.size) / sizes

    centred = [index - mean(index)[number] for index in where]
    covariance = np.zeros((sizes.size, 3, 3))
    for i, j in combinations_with_replacement(range(3), 2):
        covariance[:, i, j] = covariance[:, j, i] = mean(centred[i] * centred[j])
    _, second, first = np.linalg.eigvalsh(covariance).T
    ratios: NDArray[np.float64] = np.divide(first, second, out=np.full(sizes.size, np.inf), where=second > FLAT * first)
    return ratios
