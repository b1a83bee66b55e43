"""A random walk with priors on a grid, and the change of a grid's size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.sparse.linalg import LinearOperator, cg

from kitseg.types import Triple

CONTRAST_HU = 20.0  # between neighbors, from where on the walk avoids the step
LEAST = 0.02  # weight of a step across an edge
PRIOR = 0.2  # weight of the prior beside the steps: 0 smooths without end
CERTAIN = 1e3  # weight of a seed
STEPS, CLOSE = 60, 1e-4  # of the conjugate gradients: at most, and the rest relative to the priors and seeds


def random_walk(
    prior: NDArray[np.float32],
    hu: NDArray[np.float32],
    spacing: Sequence[float],
    seeds: Sequence[tuple[Triple, float]],
) -> NDArray[np.float32]:
    """The probability of each voxel, from its prior and its neighbors' (Grady, CVPR 2005, eq. 11, for two labels).

    Solves (L + PRIOR) x = PRIOR * prior by conjugate gradients; L: the grid's Laplacian, whose weights fall with the
    difference of HU and with the step's length.

    Args:
        prior: (D, H, W), 0 to 1.
        hu: (D, H, W), smooth.
        spacing: mm of a step along each axis.
        seeds: voxels whose probability is known.
    """
    weights = [
        (np.exp(-((np.diff(hu, axis=axis) / CONTRAST_HU) ** 2) / 2) + LEAST) * np.float32((min(spacing) / mm) ** 2)
        for axis, mm in enumerate(spacing)
    ]
    own = np.full(prior.shape, PRIOR, np.float32)
    target = PRIOR * prior
    for voxel, value in seeds:
        own[voxel] += CERTAIN
        target[voxel] += CERTAIN * value
    sides = [_sides(axis) for axis in range(3)]
    for weight, (low, high) in zip(weights, sides, strict=True):
        own[low] += weight
        own[high] += weight

    def applied(flat: NDArray[np.float32]) -> NDArray[np.float32]:
        x = flat.reshape(prior.shape)
        y = own * x
        for weight, (low, high) in zip(weights, sides, strict=True):
            y[low] -= weight * x[high]
            y[high] -= weight * x[low]
        return y.reshape(-1)

    whole = (prior.size, prior.size)
    system = LinearOperator(whole, applied, dtype=np.float32)
    by_own = LinearOperator(whole, lambda x: x / own.reshape(-1), dtype=np.float32)
    found, _ = cg(system, target.reshape(-1), prior.reshape(-1), rtol=CLOSE, maxiter=STEPS, M=by_own)
    return np.asarray(found, np.float32).reshape(prior.shape)


def resized(array: NDArray[Any], shape: Sequence[int], extent: Sequence[float] | None = None) -> NDArray[np.float32]:
    """An array with another number of voxels over the same extent, linearly interpolated.

    extent: the number of the array's voxels that ``shape`` covers, where that is not all of them.
    """
    steps = np.divide(array.shape if extent is None else extent, shape)
    if np.all(steps == 1):
        return array.astype(np.float32)
    found: NDArray[np.float32] = ndimage.affine_transform(
        array.astype(np.float32), steps, (steps - 1) / 2, output_shape=tuple(shape), order=1, mode="nearest"
    )
    return found


def _sides(axis: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Both ends of the steps along an axis."""
    low, high = [slice(None)] * 3, [slice(None)] * 3
    low[axis], high[axis] = slice(None, -1), slice(1, None)
    return tuple(low), tuple(high)
