"""The patient's own axes, from both kidneys, in which scores that are read on axial slices hold for a tilted patient.

A single kidney lies as obliquely as it likes, and a tumor or a hump turns its long axis further. Both together are
steadier: that the upper poles lean towards the spine cancels out, and how far they lean back is known on average.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from kitseg.labels import BACKGROUND
from kitseg.measurement.sides import CODES, NAMES
from kitseg.types import Geometry

_LEANING = np.deg2rad(24)  # of kidneys' long axes, backwards from the patient's: the mean of 157 in KiTS19
_ROUND = 1.15  # ratio of the two longest axes, below which the longest is no long axis
_FEWEST_ML = 5.0  # of a kidney with its lesions
_STEP = 2.0  # mm between the voxels that are looked at
_MOST_OBLIQUE = 0.5  # cosine to the scan's axis, below which a long axis does not follow the patient's

Array = NDArray[np.float64]


def body_axes(labels: NDArray[np.uint8], sides: NDArray[np.uint8], geometry: Geometry) -> Array:
    """Unit vectors (3, 3) to the patient's right, front and head, in RAS+ mm.

    The head is along the longest principal axis of both kidneys with their lesions, each about its own centre and of
    the same weight, turned forward by the angle at which kidneys lean back. Right is from the left kidney's centre to
    the right one's. Where the kidneys disagree, one that lies across the scan does not count. A single kidney, or one
    that is left, is completed by its mirror image. Where nothing is long, or all of it lies across the scan, these are
    the scan's.

    Args:
        labels: (D, H, W).
        sides: of every voxel, see ``sides.side_map``.
        geometry: of both.
    """
    every = [max(round(_STEP / mm), 1) for mm in geometry.spacing]
    thinned = tuple(slice(None, None, n) for n in every)
    step = geometry.affine[:3, :3] * every
    fewest = _FEWEST_ML / geometry.voxel_ml / np.prod(every)
    kidney = labels[thinned] != BACKGROUND
    places = {code: np.argwhere(kidney & (sides[thinned] == code)) @ step.T for code in NAMES}
    found = {code: points for code, points in places.items() if len(points) >= fewest}
    spreads = [spread / np.trace(spread) for spread in (np.cov(points.T) for points in found.values())]
    right = np.array([1.0, 0.0, 0.0])
    if len(spreads) == 2:
        right = places[CODES["right"]].mean(axis=0) - places[CODES["left"]].mean(axis=0)
        right /= np.linalg.norm(right)
        one, other = (_longest(spread) for spread in spreads)
        if abs(one @ _mirror(across(right, _longest(sum(spreads)))) @ other) < _MOST_OBLIQUE:
            spreads = [spread for spread in spreads if abs(_longest(spread)[2]) >= _MOST_OBLIQUE]
    if len(spreads) == 1:
        spreads.append(_mirror(right) @ spreads[0] @ _mirror(right))
    sizes, axes = np.linalg.eigh(np.sum(spreads, axis=0)) if spreads else (np.ones(3), np.eye(3))
    if sizes[2] < _ROUND**2 * sizes[1]:
        return np.eye(3)
    long = axes[:, 2] * np.sign(axes[2, 2])
    right = across(right, long)
    up = Rotation.from_rotvec(-_LEANING * right).apply(long)
    return np.array([right, np.cross(up, right), up]) if up[2] >= _MOST_OBLIQUE else np.eye(3)


def _longest(spread: Array) -> Array:
    """The unit vector (3,) of the longest principal axis of a covariance (3, 3)."""
    return np.asarray(np.linalg.eigh(spread)[1][:, 2])


def across(direction: Array, axis: Array) -> Array:
    """The unit vector (3,) of a direction's part perpendicular to a unit vector; 0 where there is none."""
    part = direction - (direction @ axis) * axis
    return np.asarray(part / max(float(np.linalg.norm(part)), 1e-9))


def _mirror(normal: Array) -> Array:
    """The reflection (3, 3) at the plane of a unit normal (3,)."""
    return np.asarray(np.eye(3) - 2 * np.outer(normal, normal))
