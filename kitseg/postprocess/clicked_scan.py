"""A scan and its labels around a click, on grids that are small enough to be solved in less than a second."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from kitseg.components import Components, bounding_box
from kitseg.labels import BACKGROUND, KIDNEY
from kitseg.postprocess.random_walk import resized
from kitseg.types import Box, Geometry, Triple, triple

FINE, ROUGH = 300_000, 150_000  # voxels of the grids that are solved
SMOOTH_MM = (0.6, 1.5)  # of the HU that are compared: for edges, for faint differences
UNKNOWN = 2.0  # log odds of not being background where no model states its probability


@dataclass(frozen=True)
class Aim:
    """What a click or a box points at: an ellipsoid about a voxel, or a point between voxels; its radii in mm."""

    voxel: tuple[float, float, float]
    radii: tuple[float, ...]

    @property
    def reach(self) -> float:
        """The smallest radius, mm."""
        return min(self.radii)


@dataclass(frozen=True)
class Crop:
    """A box of the scan on a grid of its own. now: where the class is; odds: log odds of not being background."""

    box: Box
    spacing: tuple[float, ...]
    hu: tuple[NDArray[np.float32], ...]
    now: NDArray[np.bool_]
    odds: NDArray[np.float32]

    def at(self, voxel: tuple[float, float, float]) -> Triple:
        """The voxel of this grid that holds one of the scan."""
        inside = (np.subtract(voxel, self.box.start) + 0.5) * self.now.shape / self.box.size
        return triple(np.clip(inside.astype(int), 0, np.subtract(self.now.shape, 1)))

    def distance(self, aim: Aim) -> NDArray[np.float32]:
        """The distance of each voxel from an aim's voxel, in units of its radii."""
        middle = (np.subtract(aim.voxel, self.box.start) + 0.5) * self.now.shape / self.box.size - 0.5
        steps = np.divide(self.spacing, aim.radii)
        axes = zip(np.ogrid[tuple(map(slice, self.now.shape))], middle, steps, strict=True)
        return np.asarray(np.sqrt(sum(((axis - at) * step) ** 2 for axis, at, step in axes)), np.float32)

    def lesion(self, aim: Aim, within: float) -> NDArray[np.bool_]:
        """The components of the class that come near an aim."""
        parts = Components.of(self.now)
        near = np.unique(parts.numbers[(self.now & (self.distance(aim) < within))[parts.box.slices]])
        return parts.chosen(np.isin(np.arange(parts.sizes.size), near))

    def widened(self, mask: NDArray[np.bool_], mm: float) -> Box:
        """The box of a mask on this grid with a margin, on the scan's grid; it may reach outside."""
        inside = bounding_box(mask)
        if inside is None:
            return Box(self.box.start, self.box.start)
        scale = np.divide(self.box.size, self.now.shape)
        side = mm * scale / self.spacing
        low, high = (np.multiply(end, scale) + self.box.start for end in (inside.start, inside.stop))
        return Box(triple(np.floor(low - side)), triple(np.ceil(high + side)))


@dataclass
class ClickedScan:
    """The labels, which one click changes in place, with what decides how."""

    labels: NDArray[np.uint8]
    hu: NDArray[Any]
    geometry: Geometry
    background: NDArray[Any] | None

    def around(self, voxel: Triple, mm: float) -> Box:
        """The box around a voxel, within the scan."""
        sides = [int(np.ceil(mm / step)) for step in self.geometry.spacing]
        return Box(triple(np.subtract(voxel, sides)), triple(np.add(voxel, sides) + 1)).clip(self.labels.shape)

    def crop(self, box: Box, of: int, most: int) -> Crop:
        """A box on a grid of about cubes, about ``most`` of them at most, none smaller than the scan's voxels."""
        size, side = np.multiply(box.size, self.geometry.spacing), 0.0
        for _ in range(4):  # axes that keep the scan's step leave more voxels to the others
            steps = np.maximum(side, self.geometry.spacing)
            shape = triple(np.clip(np.rint(size / steps), 1, box.size))
            if np.prod(shape) <= most:
                break
            side = float(steps.min() * (np.prod(shape) / most) ** (1 / 3) * 1.02)
        inside, spacing = self.labels[box.slices], size / shape
        clipped = np.clip(self.hu[box.slices], -400, 500).astype(np.float32)
        by = np.maximum(1, np.divide(box.size, shape).astype(int))
        rough = resized(_blocks(clipped, by), shape, np.divide(box.size, by))
        levels = tuple(ndimage.gaussian_filter(rough, mm / spacing) for mm in SMOOTH_MM)
        if self.background is None:
            odds = UNKNOWN + resized(inside != BACKGROUND, shape)
        else:
            doubt = np.clip(resized(self.background[box.slices], shape), 0, 1)
            odds = np.log((1.02 - doubt) / (0.02 + doubt))
        return Crop(box, tuple(spacing), levels, resized(inside == of, shape) > 0.5, odds)

    @cached_property
    def kidneys(self) -> tuple[NDArray[np.float32], list[NDArray[np.float32]]]:
        """Places in the kidneys, mm, and their HU at each smoothing."""
        box = bounding_box(self.labels == KIDNEY)
        if box is None:
            return np.zeros((0, 3), np.float32), [np.zeros(0, np.float32) for _ in SMOOTH_MM]
        crop = self.crop(box, KIDNEY, ROUGH)
        inside = ndimage.binary_erosion(crop.now)
        places = np.argwhere(inside) * crop.spacing + np.multiply(box.start, self.geometry.spacing)
        return places.astype(np.float32), [hu[inside] for hu in crop.hu]


def _blocks(array: NDArray[np.float32], by: NDArray[np.int_]) -> NDArray[np.float32]:
    """The means of blocks of voxels, of smaller ones at the end."""
    for axis, n in enumerate(by):
        starts = np.arange(0, array.shape[axis], n)
        sizes = np.diff(np.append(starts, array.shape[axis])).reshape([-1 if a == axis else 1 for a in range(3)])
        array = np.asarray(np.add.reduceat(array, starts, axis) / sizes, np.float32)
    return array
