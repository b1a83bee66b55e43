"""Rigid alignment of the same kidney in two label maps, whatever their grids and the patient's position."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import edt
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.optimize import least_squares
from scipy.spatial.transform import Rotation

from kitseg.components import bounding_box
from kitseg.labels import BACKGROUND, KIDNEY
from kitseg.measurement.findings import KIDNEY_ML
from kitseg.measurement.sides import NAMES, side_map
from kitseg.types import Geometry

_ROUGH, _POINTS = 200, 2000  # points of a surface: in the search and in the refinement
_TURN = 20.0  # degrees about each axis, from which the search also starts
_NEAR_MM = 1.0  # beyond it a distance counts less than squared, so that a grown tumor doesn't pull
_UNIT_MM = 10.0  # of a shift, for an optimum at the scale of rotations in radians
_MARGIN_MM = 15.0  # around a kidney, in which distances are known
_FEWEST = 50  # points of a surface

Points = NDArray[np.float64]


@dataclass(frozen=True)
class Alignment:
    """A rigid motion from the first date to the second: ``rotation @ point + shift``, points in mm (RAS+).

    residual_mm: the median distance of the kidney's surface to that at the second date.
    """

    rotation: Points
    shift: Points
    residual_mm: float = float("inf")

    def __call__(self, points: Points) -> Points:
        """The places at the second date of points (N, 3) of the first one."""
        return np.asarray(points @ self.rotation.T + self.shift)

    def back(self, points: Points) -> Points:
        """The places at the first date of points (N, 3) of the second one."""
        return np.asarray((points - self.shift) @ self.rotation)


@dataclass(frozen=True)
class Surface:
    """A kidney of a label map.

    points: (N, 3) in mm (RAS+), the voxels of parenchyma beside background; distance: to the edge of kidney and
    lesions in mm, negative outside, on a box of the grid; affine: of that box, RAS+.
    """

    points: Points
    distance: NDArray[np.float32]
    affine: NDArray[np.float64]

    def at(self, points: Points) -> Points:
        """The distance at points (N, 3)."""
        index = np.linalg.inv(self.affine)
        places = index[:3, :3] @ points.T + index[:3, 3:]
        return np.asarray(ndimage.map_coordinates(self.distance, places, order=1, mode="nearest"), np.float64)


def kidney_surfaces(labels: NDArray[np.uint8], geometry: Geometry, midline: float) -> dict[str, Surface]:
    """The kidneys of a label map (D, H, W) of a plausible size, by side; midline: see ``sides.side_map``.

    What is smaller, such as a speck where a kidney was removed, is none.
    """
    box = bounding_box(labels != BACKGROUND)
    if box is None:
        return {}
    inside, grid = labels[box.slices], geometry.crop(box)
    sides, found = side_map(inside, grid, midline), {}
    for code, name in NAMES.items():
        mask = sides == code
        near = bounding_box(mask)
        if near is None or np.count_nonzero(mask) * grid.voxel_ml < KIDNEY_ML:
            continue
        pad = [(int(_MARGIN_MM / mm) + 1,) * 2 for mm in grid.spacing]
        own = np.pad(np.where(mask, inside, np.uint8(BACKGROUND))[near.slices], pad)
        start = np.subtract(near.start, [before for before, _ in pad])
        affine = grid.affine.copy()
        affine[:3, 3] += affine[:3, :3] @ start
        edge = ndimage.binary_dilation(own == BACKGROUND) & (own == KIDNEY)
        points = np.argwhere(edge) @ affine[:3, :3].T + affine[:3, 3]
        if len(points) >= _FEWEST:
            distance = edt.sdf(own != BACKGROUND, anisotropy=grid.spacing, parallel=1)
            found[name] = Surface(points, distance, affine)
    return found


def align(before: Surface, after: Surface) -> Alignment:
    """Align a kidney by the distances of its surface's points to its edge at the second date.

    Nonlinear least squares (``scipy.optimize``) with a soft L1 loss. The search starts from seven rotations about the
    surface's centre with few points; the best one is refined with many.
    """
    rng = np.random.default_rng(0)
    rough, fine = (before.points[rng.permutation(len(before.points))[:count]] for count in (_ROUGH, _POINTS))
    turns = [Rotation.identity()]
    turns += [
        Rotation.from_rotvec(turn * np.eye(3)[axis], degrees=True) for turn, axis in product((-_TURN, _TURN), range(3))
    ]
    middle, to = before.points.mean(axis=0), after.points.mean(axis=0)
    starts = (Alignment(turn.as_matrix(), to - turn.apply(middle)) for turn in turns)
    best = min((_refined(start, rough, after) for start in starts), key=lambda found: found[1])[0]
    return _refined(best, fine, after)[0]


def _refined(start: Alignment, points: Points, after: Surface) -> tuple[Alignment, float]:
    """The best alignment near another one, and its cost."""
    placed = start(points)
    middle = placed.mean(axis=0)

    def distances(motion: Points) -> Points:
        moved = Rotation.from_rotvec(motion[:3]).apply(placed - middle) + middle + _UNIT_MM * motion[3:]
        return after.at(moved)

    found = least_squares(distances, np.zeros(6), loss="soft_l1", f_scale=_NEAR_MM)
    turn = Rotation.from_rotvec(found.x[:3])
    shift = turn.apply(start.shift - middle) + middle + _UNIT_MM * found.x[3:]
    return Alignment(turn.as_matrix() @ start.rotation, shift, float(np.median(np.abs(found.fun)))), float(found.cost)
