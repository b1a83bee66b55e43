"""Connected components of masks, always 26-connected: voxels that share a corner are connected."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import cc3d
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from kitseg.types import Box, Triple, triple

SPECK_ML = 0.1  # smaller components are not kidneys
TILE = 8  # voxels along each axis; as bytes, 8 of them are a 64-bit word


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


def clusters(mask: NDArray[np.bool_]) -> list[Box]:
    """Disjoint boxes, in no order, that contain every True voxel of a (D, H, W) mask, to speed up work on sparse masks.

    Two True voxels at most ``TILE`` apart along each axis lie in the same box, together with all that they touch.
    """
    numbers = cc3d.connected_components(_tiles(mask).view(np.uint8), connectivity=26)
    parts = (part for part in ndimage.find_objects(numbers) if part is not None)
    boxes: list[Box] = []
    for z, y, x in parts:
        box, apart = Box((z.start, y.start, x.start), (z.stop, y.stop, x.stop)), False
        while not apart:  # a union may touch boxes that its parts do not touch
            near = [other for other in boxes if _overlap(box, other)]
            boxes = [other for other in boxes if other not in near]
            box, apart = reduce(Box.union, near, box), not near
        boxes.append(box)
    corners = ((triple(TILE * n for n in box.start), triple(TILE * n for n in box.stop)) for box in boxes)
    return [Box(start, stop).clip(triple(mask.shape)) for start, stop in corners]


@dataclass(frozen=True)
class Components:
    """The components of a (D, H, W) mask, numbered from 1 by their first voxel in array order; 0 is background.

    shape: of the mask; box: its bounding box; numbers: component number of each voxel in the box; sizes: voxels by
    number, 0 for number 0; parts: boxes outside which ``numbers`` is 0, relative to ``box``.
    """

    shape: Triple
    box: Box
    numbers: NDArray[np.unsignedinteger[Any]]
    sizes: NDArray[np.int64]
    parts: tuple[Box, ...] = ()

    @classmethod
    def of(cls, mask: NDArray[np.bool_]) -> Components:
        """Find the components of a mask."""
        shape, box = triple(mask.shape), bounding_box(mask)
        if box is None:
            nowhere = Box((0, 0, 0), (0, 0, 0))
            return cls(shape, nowhere, np.zeros((0, 0, 0), np.uint8), np.zeros(1, np.int64))
        inside = mask[box.slices]
        parts = clusters(inside)
        found = [_numbered(inside[part.slices]) for part in parts]
        first = np.concatenate([_moved(voxels, part, box) for part, (_, voxels) in zip(parts, found, strict=True)])
        rank = np.empty(first.size, np.int64)
        rank[np.argsort(first)] = np.arange(1, first.size + 1)
        numbers = np.zeros(box.size, np.min_scalar_type(first.size))
        sizes, done = np.zeros(first.size + 1, np.int64), 0
        for part, (local, voxels) in zip(parts, found, strict=True):
            names = np.insert(rank[done : done + voxels.size], 0, 0)
            sizes[names[1:]] = np.bincount(local.reshape(-1))[1:]
            numbers[part.slices] = names.astype(numbers.dtype)[local]
            done += voxels.size
        return cls(shape, box, numbers, sizes, tuple(parts))

    def total(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """The sum of an array of the mask's shape over each component, by number."""
        sums, held = np.zeros(self.sizes.size), values[self.box.slices]
        for part in self.parts:
            numbers = self.numbers[part.slices]
            inside = numbers > 0
            sums += np.bincount(numbers[inside], weights=held[part.slices][inside], minlength=sums.size)
        return sums

    def chosen(self, which: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The mask of the components whose number is True in ``which``."""
        mask, there = np.zeros(self.shape, np.bool_), which & (self.sizes > 0)
        inside = mask[self.box.slices]
        for part in self.parts:
            inside[part.slices] = there[self.numbers[part.slices]]
        return mask


def kidneys_among(
    sizes: NDArray[np.int64], voxel_ml: float, most: int = 2, min_ratio: float = 0.05, min_ml: float = 20.0
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
    """The kidneys (with their tumors) of a foreground mask (D, H, W), as ``kidneys_among`` selects them."""
    found = Components.of(mask)
    return found.chosen(kidneys_among(found.sizes, voxel_ml, most, min_ratio, min_ml))


def _numbered(mask: NDArray[np.bool_]) -> tuple[NDArray[np.unsignedinteger[Any]], NDArray[np.int64]]:
    """The components of a mask, numbered from 1, and the flat index of the first voxel of each, by number."""
    # as bytes: cc3d 4.1.1 counts too few labels in some small masks of bool, and fails
    bytes_ = np.ascontiguousarray(mask).view(np.uint8)
    numbers, count = cc3d.connected_components(bytes_, connectivity=26, return_N=True)
    voxels = np.flatnonzero(bytes_)
    first = np.empty(count + 1, np.int64)
    first[numbers.reshape(-1)[voxels[::-1]]] = voxels[::-1]  # the last value written is the first in array order
    return numbers, first[1:]


def _moved(voxels: NDArray[np.int64], part: Box, box: Box) -> NDArray[np.int64]:
    """Convert flat indices in a part of a box to flat indices in the box."""
    z, y, x = np.unravel_index(voxels, part.size)
    index = (z + part.start[0], y + part.start[1], x + part.start[2])
    return np.ravel_multi_index(index, box.size)


def _tiles(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which cubes of ``TILE``³ voxels contain a True voxel."""
    depth, height, width = mask.shape
    rows, words = range(0, height, TILE), -(-width // TILE)
    tiles = np.zeros((-(-depth // TILE), len(rows), words), np.bool_)
    line = np.zeros((height, words * TILE), np.bool_)
    for tile, start in zip(tiles, range(0, depth, TILE), strict=True):
        mask[start : start + TILE].any(axis=0, out=line[:, :width])
        tile[...] = np.bitwise_or.reduceat(line.view(np.uint64), rows, axis=0) != 0
    return tiles


def _overlap(one: Box, other: Box) -> bool:
    sides = zip(one.start, one.stop, other.start, other.stop, strict=True)
    return all(a < d and c < b for a, b, c, d in sides)
