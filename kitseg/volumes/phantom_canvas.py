"""The tools of the phantom: the subject, the canvas in mm, smooth random fields and the shapes of organs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
Grid = tuple[Array, ...]  # three axes
Point = tuple[float, float, float]
Corner = Point | Array
Index = tuple[slice, slice, slice]
Paint = Callable[[Grid], Array]

AIR, FAT = -1000.0, -105.0  # HU


class SmoothField:
    """A smooth random field of unit variance: cubic B-splines on a periodic lattice of normal random values."""

    def __init__(self, rng: Generator, mm: float) -> None:
        self.lattice = (3 * rng.standard_normal((16, 16, 16))).astype(np.float32)
        self.mm = mm

    def __call__(self, grid: Grid) -> Array:
        """The field on an open grid (coordinates in mm)."""
        z, y, x = (self._weights(axis.ravel()) for axis in grid)
        planes = np.tensordot(z, self.lattice, axes=1)
        field: Array = (y @ planes) @ x.T
        return field

    def _weights(self, coordinates: Array) -> Array:
        position = coordinates / self.mm
        node = np.floor(position).astype(int)
        t = position - node
        spline = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, 1 + 3 * (t + t**2 - t**3), t**3)
        weights = np.zeros((len(coordinates), 16), np.float32)
        for offset, weight in enumerate(spline):
            weights[np.arange(len(coordinates)), (node + offset) % 16] = weight / 6
        return weights


@dataclass(frozen=True)
class Subject:
    """The simulated patient: cavity half sizes, wall and fat in mm; phase from 0, arterial, to 1, nephrographic."""

    half_depth: float
    half_width: float
    wall: float
    fat: float
    phase: float
    spine_y: float

    @classmethod
    def draw(cls, rng: Generator) -> Subject:
        """Draw a random adult."""
        half_depth, half_width = rng.uniform(80, 100), rng.uniform(112, 138)
        wall, fat = rng.uniform(8, 14), 6 + 32 * rng.beta(1.5, 2.5)
        return cls(half_depth, half_width, wall, fat, rng.uniform(), 0.36 * half_depth)

    def at(self, z: float, y: float, x: float) -> Point:
        """Scale a landmark of a cavity of 90 x 125 mm half size to this subject."""
        return z, y * self.half_depth / 90, x * self.half_width / 125

    def enhanced(self, arterial: float, nephrographic: float) -> float:
        """HU of a tissue in this subject's contrast phase."""
        return arterial + self.phase * (nephrographic - arterial)


class Canvas:
    """The scan being painted: HU, labels and ``cavity``, the signed distance to the abdominal cavity's surface."""

    def __init__(self, axes: Grid, edge: float) -> None:
        shape = tuple(len(axis) for axis in axes)
        self.axes, self.edge = axes, edge
        self.hu = np.full(shape, AIR, np.float32)
        self.label = np.zeros(shape, np.uint8)
        self.cavity = np.empty(shape, np.float32)

    def window(self, low: Corner, high: Corner) -> tuple[Index, Grid]:
        """Index and open grid of the voxels between two corners in mm."""
        start = [int(np.searchsorted(axis, v)) for axis, v in zip(self.axes, low, strict=True)]
        stop = [int(np.searchsorted(axis, v)) for axis, v in zip(self.axes, high, strict=True)]
        z, y, x = (slice(a, b) for a, b in zip(start, stop, strict=True))
        return (z, y, x), np.ix_(self.axes[0][z], self.axes[1][y], self.axes[2][x])

    def around(self, center: Point, reach: float) -> tuple[Index, Grid]:
        """The window within a distance in mm of a centre."""
        return self.window(np.subtract(center, reach), np.add(center, reach))

    def slabs(self) -> Iterator[tuple[Index, Grid]]:
        """The whole scan in slabs, to keep temporary arrays small."""
        for start in range(0, len(self.axes[0]), 16):
            z = slice(start, start + 16)
            yield (z, slice(None), slice(None)), np.ix_(self.axes[0][z], self.axes[1], self.axes[2])

    def paint(self, index: Index, distance: Array, value: float | Array, label: int | None = None) -> None:
        """Fill where the signed distance is negative, with a soft edge as from the partial volume effect."""
        cover = np.clip(0.5 - distance / self.edge, 0, 1)
        self.hu[index] += cover * (value - self.hu[index])
        if label is not None:
            self.label[index][distance < 0] = label

    def tube(self, points: Sequence[Point], radii: float | Sequence[float], value: float | Paint) -> None:
        """Paint a chain of capsules through points, inside the cavity; value may depend on position."""
        sizes = np.broadcast_to(np.asarray(radii, float), len(points))
        for (a, b), radius in zip(pairwise(points), sizes[1:].tolist(), strict=True):
            margin = radius + self.edge
            index, grid = self.window(np.minimum(a, b) - margin, np.maximum(a, b) + margin)
            distance = np.maximum(capsule(grid, a, b) - radius, self.cavity[index])
            self.paint(index, distance, value(grid) if callable(value) else value)

    def blob(self, center: Point, radii: Point, value: float) -> None:
        """Paint an ellipsoid inside the cavity."""
        index, grid = self.around(center, max(radii) + 8)
        distance = ellipsoid(grid, center, radii)
        self.paint(index, np.maximum(distance, self.cavity[index]), value)


def capsule(grid: Grid, a: Point, b: Point) -> Array:
    """Distance to the segment from a to b."""
    along = np.subtract(b, a)
    offset = [axis - start for axis, start in zip(grid, a, strict=True)]
    share = np.clip(sum(o * d for o, d in zip(offset, along, strict=True)) / max(float(along @ along), 1e-6), 0, 1)
    squares = sum((o - share * d) ** 2 for o, d in zip(offset, along, strict=True))
    return np.asarray(np.sqrt(squares), np.float32)


def ellipsoid(grid: Sequence[Array], center: Point, radii: Point) -> Array:
    """Approximate signed distance to an ellipsoid."""
    offset = [axis - np.float32(c) for axis, c in zip(grid, center, strict=True)]
    k0 = np.sqrt(sum((o / r) ** 2 for o, r in zip(offset, radii, strict=True)))
    k1 = np.sqrt(sum((o / r**2) ** 2 for o, r in zip(offset, radii, strict=True)))
    return np.asarray(k0 * (k0 - 1) / np.maximum(k1, 1e-6), np.float32)
