"""Connected components of masks, always 26-connected: voxels that share a corner are connected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cc3d
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from kitseg.types import Box, Triple, triple

SPECK_ML = 0.1  # smaller components are not kidneys


def bounding_box(mask: NDArray[np.bool_]) -> Box | None:
    """The bounding box of a (D, H, W) mask; None for an empty mask."""
    start, stop = [0, 0, 0], list(mask.shape)
    for axis in range(3):
        inside = mask[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))]
        hit = np.flatnonzero(inside.any(axis=tuple({0, 1, 2} - {axis})))
        if not hit.size:
            return None
        start[axis], stop[axis] = int(hit[0]), int(hit[-1]) + 1
    return Box(triple(start), triple(stop))


@dataclass(frozen=True)
class Components:
    """The components of a (D, H, W) mask, numbered from 1 by their first voxel in array order; 0 is background.

    shape: of the mask; box: its bounding box; numbers: component number of each voxel in the box; sizes: voxels by
    number, 0 for number 0.
    """

    shape: Triple
    box: Box
    numbers: NDArray[np.unsignedinteger[Any]]
    sizes: NDArray[np.int64]

    @classmethod
    def of(cls, mask: NDArray[np.bool_]) -> Components:
        """Find the components of a mask."""
        box = bounding_box(mask) or Box((0, 0, 0), (0, 0, 0))
        # as bytes: cc3d 4.1.1 counts too few labels in some small masks of bool, and fails
        inside = np.ascontiguousarray(mask[box.slices]).view(np.uint8)
        numbers, count = cc3d.connected_components(inside, connectivity=26, return_N=True)
        sizes = np.bincount(numbers.reshape(-1), minlength=count + 1)
        sizes[0] = 0
        return cls(triple(mask.shape), box, numbers, sizes)

    def total(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """The sum of an array of the mask's shape over each component, by number."""
        inside = self.numbers > 0
        held = values[self.box.slices][inside]
        return np.bincount(self.numbers[inside], held, self.sizes.size).astype(np.float64)

    def gaps(self, number: int) -> NDArray[np.int64]:
        """Slices (first axis) between each component and that of a number, by number; negative: slices with both.

        There must be one.
        """
        extents = [s[0] if s else slice(0, 0) for s in ndimage.find_objects(self.numbers)]
        start, stop = np.array([(0, 0), *((s.start, s.stop) for s in extents)]).T
        gaps: NDArray[np.int64] = np.maximum(start - stop[number], start[number] - stop)
        return gaps

    def number_at(self, voxel: Triple) -> int:
        """The number of the component that holds a voxel of the mask's grid."""
        inside = triple(np.subtract(voxel, self.box.start))
        held = all(0 <= a < n for a, n in zip(inside, self.numbers.shape, strict=True))
        return int(self.numbers[inside]) if held else 0

    def chosen(self, which: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The mask of the components whose number is True in ``which``."""
        mask = np.zeros(self.shape, np.bool_)
        mask[self.box.slices] = (which & (self.sizes > 0))[self.numbers]
        return mask


def component_at(mask: NDArray[np.bool_], voxel: Triple) -> NDArray[np.bool_]:
    """The component of a mask (D, H, W) that holds one of its voxels."""
    found = Components.of(mask)
    return found.chosen(np.arange(found.sizes.size) == found.number_at(voxel))


def kidneys_among(
    sizes: NDArray[np.int64],
    voxel_ml: float,
    most: int = 2,
    min_ratio: float = 0.05,
    min_ml: float = 20.0,
    tissue: NDArray[np.float64] | None = None,
) -> NDArray[np.bool_]:
    """Which foreground components are kidneys: the largest one, and others that are large enough.

    Two-phase paper, section 5.2, which doesn't specify the case of a single kidney. Here each component after the first
    needs at least ``min_ratio`` of the first one's volume and at least ``min_ml``; at most ``most`` are kept. Among
    components of equal size the first one in array order takes precedence.

    Args:
        sizes: voxels by component number, 0 for number 0.
        voxel_ml: volume of a voxel in millilitres.
        most: maximum number of components to keep.
        min_ratio: smallest volume of a further component, relative to the first.
        min_ml: smallest volume of a further component in millilitres.
        tissue: voxels of kidney without masses by component number. If given, the components that are large enough are
            ranked by it instead of by their size: what is falsely called a mass has hardly any.
    """
    can_be = (sizes >= min_ratio * sizes.max()) & (sizes * voxel_ml >= min_ml)
    can_be[sizes.argmax()] = True
    can_be[sizes == 0] = False
    order = np.argsort(-(sizes if tissue is None else tissue), kind="stable")
    kidneys = np.zeros(sizes.size, np.bool_)
    kidneys[order[can_be[order]][:most]] = True
    return kidneys


def keep_kidneys(
    mask: NDArray[np.bool_],
    voxel_ml: float,
    most: int = 2,
    min_ratio: float = 0.05,
    min_ml: float = 20.0,
) -> NDArray[np.bool_]:
    """The kidneys (with their tumors) of a foreground mask (D, H, W), as ``kidneys_among`` selects them."""
    found = Components.of(mask)
    return found.chosen(kidneys_among(found.sizes, voxel_ml, most, min_ratio, min_ml))
