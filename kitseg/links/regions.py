"""Regions: the box of its grid that a stage processes, given the output of an earlier stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from kitseg.components import Components, bounding_box, kidneys_among
from kitseg.labels import KIDNEY
from kitseg.types import Box, Geometry, Triple, triple

SKIN = -300  # HU: between air with its partial volumes and fat
TABLE, LOOK_EVERY = 9.0, 3.5  # mm: more than the thickness of a table's shell; sampling distance of the body


@dataclass(frozen=True)
class RegionContext:
    """The input of a region: what is known about a case before a stage runs.

    grid: the stage's geometry; hu: the scan on it, (D, H, W); guide: labels (D, H, W) predicted by an earlier stage (in
    training: reference labels), None for a first stage; guide_grid: the guide's geometry, over the same extent.
    """

    grid: Geometry
    guide: NDArray[np.uint8] | None = None
    guide_grid: Geometry | None = None
    hu: NDArray[np.int16] | None = None


class Region(Protocol):
    """Computes the box of its grid that a stage processes."""

    def shape(self, grid: Geometry) -> Triple:
        """The box in voxels of ``grid``."""

    def __call__(self, known: RegionContext) -> Box | None:
        """The box on the stage's grid, which may reach outside; None if there is nothing to process."""


@runtime_checkable
class Confirming(Protocol):
    """A region that also decides, by its guide, which components of its stage's own output count."""

    def confirmed(self, found: NDArray[np.bool_], box: Box, known: RegionContext) -> NDArray[np.bool_]:
        """The part of a foreground (d, h, w) in the region's box that counts."""


@dataclass(frozen=True)
class Body:
    """The bounding box of the patient, without the surrounding air and the table.

    The body is the largest component above ``SKIN`` HU after structures thinner than ``TABLE`` are removed.

    at_least: voxels (slices, rows, columns) to which a smaller box grows around its middle, so that it holds a patch.
    """

    at_least: Sequence[int] = (0, 0, 0)

    def __post_init__(self) -> None:
        _check_voxels(self.at_least)

    def shape(self, grid: Geometry) -> Triple:
        """All of the grid's voxels, since a patient may fill them."""
        return triple(map(max, grid.shape, self.at_least))

    def __call__(self, known: RegionContext) -> Box:
        """The box on the stage's grid; the whole grid without a body."""
        grid, hu = known.grid, known.hu
        if hu is None:
            raise ValueError("the box around the body needs the scan")
        steps = [max(1, int(LOOK_EVERY / mm)) for mm in grid.spacing]
        dense = hu[tuple(slice(None, None, step) for step in steps)] > SKIN
        across = [math.ceil(TABLE / (step * mm)) for step, mm in zip(steps, grid.spacing, strict=True)]
        thick = ndimage.binary_opening(dense, np.ones((1, *across[1:]), np.bool_))
        parts = Components.of(thick)
        found = bounding_box(parts.chosen(np.arange(parts.sizes.size) == parts.sizes.argmax()))
        if found is None:
            return _grown(Box((0, 0, 0), grid.shape), self.at_least)
        start, stop = ([n * step for n, step in zip(ends, steps, strict=True)] for ends in (found.start, found.stop))
        return _grown(Box(triple(start), triple(stop)).clip(grid.shape), self.at_least)


@dataclass(frozen=True)
class Square:
    """Every slice as a square of ``pixels``, or some of its rows; other slices are centred in the square.

    rows: first and last row as fractions of the square's height; (0.5, 1) is the posterior half of the body
    (dual-unet, "the lower half"). slices: to which a shorter stack grows around its middle.
    """

    pixels: int
    rows: Sequence[float] = (0.0, 1.0)
    slices: int = 0

    def __post_init__(self) -> None:
        if not (1 <= self.pixels <= 2048 and 0 <= self.rows[0] < self.rows[1] <= 1):
            raise ValueError("a square has 1 to 2048 pixels, and rows from 0 to 1")
        _check_voxels((self.slices, 1, 1))

    def __call__(self, known: RegionContext) -> Box:
        """The box on the stage's grid; the guide is not used."""
        (depth, height, width), (_, rows, columns) = known.grid.shape, self.shape(known.grid)
        top = -((self.pixels - height) // 2) + round(self.pixels * self.rows[0])
        left = -((columns - width) // 2)
        return _grown(Box((0, top, left), (depth, top + rows, left + columns)), (self.slices, 0, 0))

    def shape(self, grid: Geometry) -> Triple:
        """All slices; the rows and columns of the square."""
        first, last = (round(self.pixels * share) for share in self.rows)
        return max(grid.shape[0], self.slices), last - first, self.pixels


@dataclass(frozen=True)
class FixedAroundForeground:
    """A box of fixed extent around the guide's foreground (two-phase paper, section 3.2).

    Centred on the bounding box of the foreground, after removing components too small to be kidneys; shifted inside the
    volume if that is larger than the box, else centred on it.

    size: voxels of the stage's grid (slices, rows, columns); 80 × 240 × 384 in the paper.
    """

    size: Sequence[int]

    def __post_init__(self) -> None:
        _check_voxels(self.size, fewest=1)

    def __call__(self, known: RegionContext) -> Box | None:
        """The box on the stage's grid; None if the guide has no foreground."""
        found, grid, guide_grid = _foreground(known), known.grid, known.guide_grid
        if found is None or guide_grid is None:
            return None
        size = self.shape(grid)
        middle = [
            (a + b) / 2 * n / m
            for a, b, n, m in zip(found.start, found.stop, grid.shape, guide_grid.shape, strict=True)
        ]
        start = [_start(c, k, n) for c, k, n in zip(middle, size, grid.shape, strict=True)]
        return Box(triple(start), triple(np.add(start, size)))

    def shape(self, grid: Geometry) -> Triple:
        """The size of the box, which does not depend on the grid."""
        return triple(self.size)


@dataclass(frozen=True)
class AroundForeground:
    """The bounding box of the guide's kidneys and masses with a margin, inside the volume.

    Of more than two components that are large enough, the two largest and the two with the most kidney tissue may be
    the kidneys: a tumor leaves little tissue, and a false mass has hardly any. What the stage then finds counts where
    it overlaps with them.

    margin: millimetres on each side; components too small to be kidneys are removed before; at_least: voxels (slices,
    rows, columns) to which a smaller box is grown.
    """

    margin: float
    at_least: Sequence[int]

    def __post_init__(self) -> None:
        if self.margin < 0:
            raise ValueError("a margin is 0 mm or more")
        _check_voxels(self.at_least)

    def __call__(self, known: RegionContext) -> Box | None:
        """The box on the stage's grid; None if the guide has no foreground."""
        found = _foreground(known, or_by_tissue=True)
        if found is None or known.guide_grid is None:
            return None
        step = np.divide(known.grid.shape, known.guide_grid.shape)
        margin = np.divide(self.margin, known.grid.spacing)
        start, stop = np.floor(found.start * step - margin), np.ceil(found.stop * step + margin)
        inside = Box(triple(start.astype(int)), triple(stop.astype(int))).clip(known.grid.shape)
        return _grown(inside, self.at_least)

    def shape(self, grid: Geometry) -> Triple:
        """The largest that it may be: the whole grid, or a patch."""
        return triple(np.maximum(grid.shape, self.at_least))

    def confirmed(self, found: NDArray[np.bool_], box: Box, known: RegionContext) -> NDArray[np.bool_]:
        """The components of a foreground (d, h, w) that overlap most with the guide's kidneys, one of each, or two.

        Overlap with kidney tissue counts first, then with masses; without any overlap all remain.
        """
        kidneys = _kidneys(known, or_by_tissue=True)
        if known.guide is None or known.guide_grid is None:
            raise ValueError("to confirm a foreground takes a guide")
        parts, steps = Components.of(found), np.divide(known.guide_grid.shape, known.grid.shape)
        voxels = (np.arange(a, b) for a, b in zip(box.start, box.stop, strict=True))
        near = np.ix_(
            *(
                np.clip((at + 0.5) * step, 0, n - 1).astype(int)
                for at, step, n in zip(voxels, steps, kidneys.shape, strict=True)
            )
        )
        best: list[int] = []
        for kidney in (*_components(kidneys), kidneys):  # the best of each, then of what is left
            overlap, tissue = parts.total(kidney[near]), parts.total((kidney & (known.guide == KIDNEY))[near])
            order = np.lexsort((-overlap, -tissue))
            left = [int(number) for number in order if overlap[number] > 0 and number not in best]
            best += left[: max(0, 2 - len(best)) if kidney is kidneys else 1]
        return parts.chosen(np.isin(np.arange(parts.sizes.size), best)) if best else found


def _check_voxels(size: Sequence[int], fewest: int = 0) -> None:
    """Refuse (ValueError) a box of a configuration that has more voxels than a scan."""
    if not (len(size) == 3 and min(size) >= fewest and max(size) <= 2048 and math.prod(size) <= 2**27):
        raise ValueError(f"a box has {fewest} to 2048 voxels on each axis, and at most 2**27 in all")


def _foreground(known: RegionContext, or_by_tissue: bool = False) -> Box | None:
    """The bounding box of the guide's kidneys and masses on the guide's grid."""
    return bounding_box(_kidneys(known, or_by_tissue))


def _kidneys(known: RegionContext, or_by_tissue: bool) -> NDArray[np.bool_]:
    """The guide's kidneys with their masses, on the guide's grid.

    or_by_tissue: also the two components with the most kidney tissue, where they aren't the largest.
    """
    if known.guide is None or known.guide_grid is None:
        raise ValueError("the box around the foreground needs a guide")
    parts, ml = Components.of(known.guide > 0), known.guide_grid.voxel_ml
    kept = kidneys_among(parts.sizes, ml)
    if or_by_tissue:
        kept |= kidneys_among(parts.sizes, ml, tissue=parts.total(known.guide == KIDNEY))
    return parts.chosen(kept)


def _components(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    parts = Components.of(mask)
    numbers = np.arange(parts.sizes.size)
    return [parts.chosen(numbers == number) for number in numbers[1:]]


def _grown(box: Box, at_least: Sequence[int]) -> Box:
    """The box, grown around its middle on axes that are shorter; the samplers place such a patch alike."""
    size = np.maximum(box.size, at_least)
    start = np.array(box.start) + (np.array(box.size) - size) // 2
    return Box(triple(start), triple(start + size))


def _start(middle: float, size: int, n: int) -> int:
    """The start of an interval of ``size`` voxels on an axis of ``n`` voxels."""
    if n <= size:
        return -((size - n) // 2)
    return int(np.clip(round(middle - size / 2), 0, n - size))
