"""Planning a partial nephrectomy: the parenchyma that goes with the tumor at a margin."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from kitseg.components import bounding_box
from kitseg.labels import KIDNEY
from kitseg.measurement.mesh import surface
from kitseg.types import Box, Geometry, triple

MARGINS = (2.0, 5.0, 10.0)
_STEP_MM = 1.0  # slices are divided to about this size, since a margin may be thinner than a slice
_SAMPLES = 40_000  # most points of parenchyma that are compared with the lesion's surface


def parenchyma_lost(
    labels: NDArray[np.uint8], geometry: Geometry, lesion: NDArray[np.bool_], margins: Sequence[float] = MARGINS
) -> tuple[float, ...]:
    """The parenchyma in ml within each margin of a lesion, by the distance in 3D from its smooth surface.

    Args:
        labels: (D, H, W): label 1 is parenchyma.
        geometry: of the labels.
        lesion: its mask (D, H, W).
        margins: in mm.
    """
    box = bounding_box(lesion)
    if box is None:
        return (0.0,) * len(margins)
    reach = np.ceil(max(margins) / np.array(geometry.spacing)).astype(int) + 1
    start, stop = np.subtract(box.start, reach), np.add(box.stop, reach)
    near = Box(triple(start), triple(stop)).clip(triple(labels.shape))
    grid = geometry.crop(near)
    vertices, faces = surface(lesion[near.slices], grid)
    voxels = np.argwhere(labels[near.slices] == KIDNEY)
    if not len(faces) or not len(voxels):
        return (0.0,) * len(margins)
    corners = vertices[faces]
    middles = (corners + np.roll(corners, 1, axis=1)).reshape(-1, 3) / 2
    tree = cKDTree(np.concatenate([vertices, corners.mean(axis=1), middles]))
    parts = [max(round(mm / _STEP_MM), 1) for mm in grid.spacing]
    chosen = voxels[:: -(-len(voxels) * int(np.prod(parts)) // _SAMPLES)]
    within = (np.stack(np.meshgrid(*map(_middles, parts), indexing="ij"), -1)).reshape(-1, 3)
    points = (chosen[:, None] + within).reshape(-1, 3) @ grid.affine[:3, :3].T + grid.affine[:3, 3]
    distance = tree.query(points, distance_upper_bound=max(margins) + 1)[0]
    ml = len(voxels) * geometry.voxel_ml
    return tuple(float(np.mean(distance <= margin)) * ml for margin in margins)


def _middles(parts: int) -> NDArray[np.float64]:
    """The centres of a voxel's parts along an axis, relative to its own centre."""
    return (np.arange(parts) + 0.5) / parts - 0.5
