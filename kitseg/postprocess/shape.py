"""Keep tumors of plausible shape, by the ratio of the two largest eigenvalues of their voxel covariance."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kitseg.components import Components
from kitseg.types import Masks

MIN_VOXELS = 10
FLAT = 1e-9  # a second eigenvalue below this fraction of the first is a rounding error


@dataclass(frozen=True)
class KeepTumorShape:
    """Keeps tumor components with an eigenvalue ratio of ``low`` to ``high``. Dual-unet paper, section 2.2.

    The range is the 5th to 95th percentile of true tumors, so one in ten of them is removed; ``kitseg fit-priors``
    measures the range of given cases. Components of fewer than ``min_voxels`` have no meaningful shape: they are not
    included in the range, and are removed.
    """

    low: float = 1.07
    high: float = 2.8
    min_voxels: int = MIN_VOXELS

    def __call__(self, masks: Masks, hu: NDArray[Any], spacing: tuple[float, float, float]) -> Masks:
        """``masks`` without tumors of other shapes; ``hu`` and ``spacing`` are not used."""
        tumors = Components.of(masks.tumor)
        return replace(masks, tumor=tumors.chosen(self.keeps(eigenvalue_ratios(tumors), tumors.sizes)))

    def keeps(self, ratios: NDArray[np.float64], sizes: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which components are kept, by their ratios and sizes (in voxels)."""
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
