"""Area-weighted distances between the surfaces of two masks: surface Dice, robust Hausdorff, average distance."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from scipy.spatial import cKDTree

from kitseg.components import bounding_box
from kitseg.scoring.kits19 import check_shapes

_SLAB = 16  # slices at a time
_NEAR_MM = 20.0
_BITS = np.array([[[128, 64], [32, 16]], [[8, 4], [2, 1]]], np.uint8)  # of a cell's eight corners
_INSIDE = 255

# The classes of marching cubes (Lorensen and Cline 1987) by one neighbour code of each: the triangles of the surface in
# the cell, given by their normals, whose length is the area in eighths of a unit cell's face. Mirrored, rotated and
# inverted cells have the same surface.
_CLASSES = {
    1: [(1, 1, 1)],
    3: [(2, 2, 0), (2, 2, 0)],
    6: [(1, 1, 1), (1, 1, 1)],
    7: [(4, 0, 0), (2, 2, 2), (1, 1, 1)],
    15: [(4, 0, 0), (4, 0, 0)],
    22: [(1, 1, 1), (1, 1, 1), (1, 1, 1)],
    23: [(1, 1, 1), (2, 2, 2), (2, 2, 2), (1, 1, 1)],
    24: [(1, 1, 1), (1, 1, 1)],
    25: [(1, 1, 1), (0, 2, 2), (0, 2, 2)],
    27: [(1, 1, 1), (3, 3, 3), (0, 2, 2), (2, 0, 2)],
    30: [(4, 0, 0), (1, 1, 1), (2, 2, 2), (1, 1, 1)],
    60: [(2, 2, 0), (2, 2, 0), (2, 2, 0), (2, 2, 0)],
    105: [(1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1)],
}


@dataclass(frozen=True)
class Surfels:
    """Surface elements, sorted by distance to the other surface.

    distances: (n,) mm to the other surface, infinite without one; areas: (n,) mm².
    """

    distances: NDArray[np.float64]
    areas: NDArray[np.float64]

    def within(self, tolerance_mm: float) -> float:
        """The area in mm² within the tolerance of the other surface."""
        return float(self.areas[self.distances <= tolerance_mm].sum())

    def mean(self) -> float:
        """Mean distance in mm."""
        return float((self.distances * self.areas).sum() / self.areas.sum())

    def percentile(self, percent: float) -> float:
        """The area-weighted percentile of the distance in mm."""
        part = np.cumsum(self.areas) / self.areas.sum()
        return float(self.distances[min(int(np.searchsorted(part, percent / 100)), len(part) - 1)])


@dataclass(frozen=True)
class Surfaces:
    """The surfaces of a prediction and its reference, each with its distances to the other.

    The metrics are those of DeepMind's ``surface-distance`` (Nikolov et al. 2021, J Med Internet Res 23:e26151).
    """

    pred: Surfels
    ref: Surfels

    def dice(self, tolerance_mm: float) -> float:
        """Surface Dice: the fraction of both surfaces within the tolerance; 1 for two empty masks, 0 for one."""
        total = self.pred.areas.sum() + self.ref.areas.sum()
        return (self.pred.within(tolerance_mm) + self.ref.within(tolerance_mm)) / float(total) if total else 1.0

    def hausdorff_mm(self, percent: float) -> float | None:
        """Robust Hausdorff distance: the larger of both directions' percentiles; None if a mask is empty."""
        return max(side.percentile(percent) for side in (self.pred, self.ref)) if self._defined else None

    def average_mm(self) -> float | None:
        """Average symmetric surface distance: the mean of both directions' means; None if a mask is empty."""
        return (self.pred.mean() + self.ref.mean()) / 2 if self._defined else None

    @property
    def _defined(self) -> bool:
        return bool(self.pred.areas.size and self.ref.areas.size)


def surfaces(pred: NDArray[np.bool_], ref: NDArray[np.bool_], spacing: Sequence[float]) -> Surfaces:
    """Find the surface elements of two masks (D, H, W) and their distances to the other surface.

    spacing: mm per voxel along each axis. An element lies in a cell between eight voxels, some inside and some outside;
    its area is that of marching cubes' triangles, its position the cell's centre, and its distance that to the nearest
    such cell of the other mask. Time and memory depend on the bounding box of both masks.

    Raises:
        ValueError: the shapes differ.
    """
    check_shapes(pred, ref)
    box = bounding_box(pred | ref)
    if box is None:
        nothing = Surfels(np.zeros(0), np.zeros(0))
        return Surfaces(nothing, nothing)
    areas = surfel_areas(spacing)
    (p, p_areas), (r, r_areas) = (_cells(mask[box.slices], areas) for mask in (pred, ref))
    shape = [n + 1 for n in box.size]
    to_ref, to_pred = _distances(p, r, shape, spacing), _distances(r, p, shape, spacing)
    return Surfaces(_sorted(to_ref, p_areas), _sorted(to_pred, r_areas))


def surfel_areas(spacing: Sequence[float]) -> NDArray[np.float64]:
    """The area in mm² of the surface in a cell, by the neighbour code of its corners (256,).

    Each corner inside the mask adds its bit: 128 for (0, 0, 0), 64 for (0, 0, 1), … 1 for (1, 1, 1).
    """
    z, y, x = spacing
    table = np.zeros(256)
    for code, normals in _CLASSES.items():
        corners = (_BITS & code) > 0
        for order in itertools.permutations(range(3)):
            turned = np.abs(np.array(normals, float))[:, order] / 8 * (y * x, z * x, z * y)
            area = np.linalg.norm(turned, axis=1).sum()
            for flips in itertools.product((1, -1), repeat=3):
                cell = corners.transpose(order)[:: flips[0], :: flips[1], :: flips[2]]
                here = int(_BITS[cell].sum())
                table[here] = table[_INSIDE - here] = area
    return table


def _cells(mask: NDArray[np.bool_], areas: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The flat indices of the cells with a surface, and the area in each."""
    padded = np.pad(mask.view(np.uint8), 1)
    plane = (padded.shape[1] - 1) * (padded.shape[2] - 1)
    where, area = [], []
    for first in range(0, len(padded) - 1, _SLAB):
        codes = _neighbour_codes(padded[first : first + _SLAB + 1]).ravel()
        surface = np.flatnonzero(codes - np.uint8(1) < _INSIDE - 1)  # neither 0 nor 255: 0 - 1 is 255 in bytes
        where.append(surface + first * plane)
        area.append(areas[codes[surface]])
    return np.concatenate(where), np.concatenate(area)


def _neighbour_codes(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The neighbour code (``_BITS``) of each cell: (D, H, W) voxels, (D - 1, H - 1, W - 1) cells."""
    one, two, four = np.uint8(1), np.uint8(2), np.uint8(4)
    pairs = mask[..., :-1] << one | mask[..., 1:]
    squares = pairs[:, :-1] << two | pairs[:, 1:]
    return squares[:-1] << four | squares[1:]


def _distances(
    cells: NDArray[np.int64], others: NDArray[np.int64], shape: Sequence[int], spacing: Sequence[float]
) -> NDArray[np.float64]:
    """The distance in mm of each cell to the nearest of the others; both in ascending order.

    Uses a k-d tree, which is fast for small distances, and distance transforms for large ones.
    """
    if not others.size:
        return np.full(cells.size, np.inf)
    here, there = (np.stack(np.unravel_index(found, shape), axis=1) for found in (cells, others))
    apart, step = np.flatnonzero(np.isin(cells, others, assume_unique=True, invert=True)), np.asarray(spacing)
    reach, nearest = cKDTree(there * step).query(here[apart] * step, distance_upper_bound=_NEAR_MM)
    found = np.isfinite(reach)
    near, far = apart[found], apart[~found]
    distances = np.zeros(cells.size)
    distances[near] = np.sqrt((((here[near] - there[nearest[found]]) * step) ** 2).sum(1))
    distances[far] = _far_distances(here[far], there, shape, spacing)
    return distances


def _far_distances(
    cells: NDArray[np.int64], others: NDArray[np.int64], shape: Sequence[int], spacing: Sequence[float]
) -> NDArray[np.float64]:
    """The same for rows of (slice, row, column), by exact distance transforms of the slices that contain others."""
    best = np.full(len(cells), np.inf)
    rows, columns = np.ogrid[: shape[1], : shape[2]]
    for number in np.unique(others[:, 0]) if best.size else ():
        across = ((cells[:, 0] - number) * spacing[0]) ** 2
        active = np.flatnonzero(across < best)
        outside = np.ones(shape[1:], np.bool_)
        outside[tuple(others[others[:, 0] == number, 1:].T)] = False
        y, x = distance_transform_edt(outside, sampling=spacing[1:], return_distances=False, return_indices=True)
        within = ((y - rows) * spacing[1]) ** 2 + ((x - columns) * spacing[2]) ** 2
        found = across[active] + within[tuple(cells[active, 1:].T)]
        best[active] = np.minimum(best[active], found)
    return np.asarray(np.sqrt(best))


def _sorted(distances: NDArray[np.float64], areas: NDArray[np.float64]) -> Surfels:
    order = np.lexsort((areas, distances))
    return Surfels(distances[order], areas[order])
