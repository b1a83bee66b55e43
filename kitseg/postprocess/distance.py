"""Nothing that belongs to the kidneys lies far from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from kitseg.components import Components, kidneys_among
from kitseg.types import Masks


@dataclass(frozen=True)
class RemoveDistant:
    """Removes what is farther than ``max_mm`` from the kidneys, from one voxel's centre to another's.

    Progressive paper: the two kidneys are found by volume, and objects farther than a threshold go; it doesn't say
    which threshold. Here components are those of foreground ∪ tumor, and the second largest is a kidney only where it
    can be one (``components.kidneys_among``), so that a speck beside a single kidney isn't taken for the other.
    """

    max_mm: float = 10.0

    def __call__(self, masks: Masks, hu: NDArray[Any], spacing: tuple[float, float, float]) -> Masks:
        """``masks`` without distant components; doesn't look at ``hu``."""
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

    Of two components the nearest voxels lie on their surfaces, so that only these are looked at.
    """
    inside = components.numbers > 0
    surface = inside & ~ndimage.binary_erosion(inside)
    number = components.numbers[surface]
    points = np.argwhere(surface) * spacing
    is_target = targets[number]
    nearest, _ = cKDTree(points[is_target]).query(points[~is_target])
    distances = np.full(components.sizes.size, np.inf)
    np.minimum.at(distances, number[~is_target], nearest)
    return distances
