"""Remove components far from the kidneys."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from kitseg.components import Components, kidneys_among
from kitseg.types import Masks


@dataclass(frozen=True)
class RemoveDistant:
    """Removes components farther than ``max_mm`` from the kidneys, between voxel centres.

    Progressive paper: the two kidneys are found by volume, and objects beyond a threshold are removed; the threshold is
    not specified. Here components are those of foreground ∪ tumor, and the second largest is a kidney only if it is
    large enough (``components.kidneys_among``), so that a speck next to a single kidney does not count as one.
    """

    max_mm: float = 10.0

    def __call__(self, masks: Masks, hu: NDArray[Any], spacing: tuple[float, float, float]) -> Masks:
        """``masks`` without distant components; ``hu`` is not used."""
        found = Components.of(masks.either)
        kidneys = kidneys_among(found.sizes, math.prod(spacing) / 1000)
        if kidneys[1:].all():
            return masks
        far = ~kidneys & (distances_mm(found, kidneys, spacing) > self.max_mm)
        return masks.without(found.chosen(far))


def distances_mm(
    components: Components, targets: NDArray[np.bool_], spacing: tuple[float, float, float]
) -> NDArray[np.float64]:
    """The smallest distance in mm from each component to those in ``targets``, by number; infinite for the targets.

    The nearest voxels of two components lie on their surfaces, so only surface voxels are compared.
    """
    from scipy.spatial import cKDTree  # imported here: predicting a scan can begin without it

    inside = components.numbers > 0
    surface = inside & ~ndimage.binary_erosion(inside)
    number = components.numbers[surface]
    points = np.argwhere(surface) * spacing
    is_target = targets[number]
    nearest, _ = cKDTree(points[is_target]).query(points[~is_target])
    distances = np.full(components.sizes.size, np.inf)
    np.minimum.at(distances, number[~is_target], nearest)
    return distances
