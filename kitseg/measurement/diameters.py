"""The largest diameter of a mask, within a slice and in 3D.

Distances between the centres of the outermost voxels are too short by up to a voxel; distances between their outer
faces (the maximum 3D diameter of the Image Biomarker Standardisation Initiative; Zwanenburg et al., Radiology 2020) are
too long by up to a voxel, which is a whole slice distance for thick slices. Therefore each end is set a quarter of a
voxel beyond the centre. On ellipsoids the error is typically half a voxel and always less than one.

Within a slice this is the longest diameter in the plane of acquisition, as defined by RECIST 1.1 (Eisenhauer et al.,
European Journal of Cancer 2009).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import ConvexHull
from scipy.spatial.distance import cdist

_BEYOND = 0.25  # voxels from the last centre to the assumed end of the shape
_ROWS = 1024  # of the distance matrix computed at a time


def axial_diameter(mask: NDArray[np.bool_], spacing: tuple[float, float, float]) -> float:
    """The largest diameter in mm within a single slice of a (D, H, W) mask; 0 for an empty mask.

    Slices are those of the array, also in a tilted scan. Separate parts within a slice are measured as one.
    """
    return axial_line(mask, spacing)[1] if mask.any() else 0.0


def axial_line(mask: NDArray[np.bool_], spacing: tuple[float, float, float]) -> tuple[int, float, NDArray[np.float64]]:
    """The ``axial_diameter`` of a (D, H, W) mask that is not empty: slice, mm, and ends (2, 2) as row, column."""
    lines = [(index, *_longest(plane, spacing[1:])) for index, plane in enumerate(mask) if plane.any()]
    return max(lines, key=lambda line: line[1])


def diameter(mask: NDArray[np.bool_], spacing: tuple[float, float, float]) -> float:
    """The largest diameter in mm of a (D, H, W) mask in any direction; 0 for an empty mask."""
    return _longest(mask, spacing)[0] if mask.any() else 0.0


def _longest(mask: NDArray[np.bool_], spacing: tuple[float, ...]) -> tuple[float, NDArray[np.float64]]:
    """The largest distance in mm between the ``line_ends`` of a mask with two or three axes, and these, in voxels."""
    ends = np.concatenate([line_ends(mask, axis, _BEYOND) for axis in range(mask.ndim)]) * spacing
    corners = ends[ConvexHull(ends).vertices]
    longest, line = 0.0, corners[:2]
    for start in range(0, len(corners), _ROWS):
        apart = cdist(corners[start : start + _ROWS], corners)
        one, other = np.unravel_index(apart.argmax(), apart.shape)
        if apart[one, other] > longest:
            longest, line = float(apart[one, other]), corners[[start + one, other]]
    return longest, line / spacing


def line_ends(mask: NDArray[np.bool_], axis: int, beyond: float) -> NDArray[np.float64]:
    """Both ends (N, axes), in voxels, of each line of a mask along an axis, ``beyond`` voxels past the last centres.

    The convex hull of the ends along all axes is that of the mask with its voxels as octahedra.
    """
    hit = np.asarray(mask.any(axis=axis))
    first = mask.argmax(axis=axis)[hit] - beyond
    last = mask.shape[axis] - 1 - np.flip(mask, axis).argmax(axis=axis)[hit] + beyond
    lines = np.argwhere(hit)
    return np.concatenate([np.insert(lines.astype(np.float64), axis, ends, axis=1) for ends in (first, last)])
