"""Connected components of kidneys and tumors. All components are 26-connected: voxels touch by a corner too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cc3d
import numpy as np
from numpy.typing import NDArray

from kitseg.types import Box, Triple


def bounding_box(mask: NDArray[np.bool_]) -> Box | None:
    """The smallest box that holds every True voxel of a (D, H, W) mask; None for an empty mask."""
    start, stop = [0, 0, 0], list(mask.shape)
    for axis in range(3):
        inside = mask[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))]
        hit = np.flatnonzero(inside.any(axis=tuple({0, 1, 2} - {axis})))
        if not hit.size:
            return None
        start[axis], stop[axis] = int(hit[0]), int(hit[-1]) + 1
    return Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))


@dataclass(frozen=True)
class Components:
    """The components of a (D, H, W) mask, numbered from 1 by their first voxel in array order; 0 is no component.

    shape: of the mask; box: where its True voxels are; numbers: of each voxel in the box; sizes: voxels by number,
    0 for number 0.
    """

    shape: Triple
    box: Box
    numbers: NDArray[np.unsignedinteger[Any]]
    sizes: NDArray[np.int64]

    @classmethod
    def of(cls, mask: NDArray[np.bool_]) -> Components:
        """Find the components of a mask."""
        depth, height, width = mask.shape
        box = bounding_box(mask)
        if box is None:
            nowhere = Box((0, 0, 0), (0, 0, 0))
            return cls((depth, height, width), nowhere, np.zeros((0, 0, 0), np.uint8), np.zeros(1, np.int64))
        inside = np.ascontiguousarray(mask[box.slices])
        # as bytes: cc3d 4.1.1 counts too few labels in some small masks of bool, and fails
        numbers, count = cc3d.connected_components(inside.view(np.uint8), connectivity=26, return_N=True)
        sizes = np.bincount(numbers[inside], minlength=count + 1)
        return cls((depth, height, width), box, numbers, sizes)

    def total(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """The sum by number of what an array of the mask's shape holds there."""
        inside = self.numbers > 0
        weights = values[self.box.slices][inside]
        sums: NDArray[Any] = np.bincount(self.numbers[inside], weights=weights, minlength=self.sizes.size)
        return sums

    def chosen(self, which: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The mask of the components whose numbers are True in ``which``."""
        mask = np.zeros(self.shape, np.bool_)
        mask[self.box.slices] = (which & (self.sizes > 0))[self.numbers]
        return mask


def kidneys_among(
    sizes: NDArray[np.int64], voxel_ml: float, most: int = 2, min_ratio: float = 0.05, min_ml: float = 20.0
) -> NDArray[np.bool_]:
    """Which foreground components are kidneys: the largest one and those that can be another kidney.

    Two-phase paper, section 5.2; the paper is silent on when one kidney is all there is. Here each component after the
    first needs at least ``min_ratio`` of the first one's volume and at least ``min_ml``; at most ``most`` are kept.
    Of equally large components the one that comes first in the array goes first.

    Args:
        sizes: voxels by component number, 0 for number 0.
        voxel_ml: volume of a voxel in millilitres.
        most: how many components to keep at most.
        min_ratio: smallest volume of a further component, as a part of the first.
        min_ml: smallest volume of a further component in millilitres.
    """
    order = np.argsort(-sizes[1:], kind="stable")[:most] + 1
    large = (sizes[order] >= min_ratio * sizes[order[:1]]) & (sizes[order] * voxel_ml >= min_ml)
    large[:1] = True
    kidneys = np.zeros(sizes.size, np.bool_)
    kidneys[order[large]] = True
    return kidneys


def keep_kidneys(
    mask: NDArray[np.bool_], voxel_ml: float, most: int = 2, min_ratio: float = 0.05, min_ml: float = 20.0
) -> NDArray[np.bool_]:
    """The kidneys (with their tumors) of a foreground mask (D, H, W); ``kidneys_among`` says which those are."""
    found = Components.of(mask)
    return found.chosen(kidneys_among(found.sizes, voxel_ml, most, min_ratio, min_ml))
