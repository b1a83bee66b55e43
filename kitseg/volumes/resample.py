"""Between a scan's own lattice and a grid of another spacing, with an exact way back.

Both lattices cover the same block of space: voxel i of n covers the share [i/n, (i+1)/n] of the extent on each axis.
A grid's spacing is therefore the extent divided by a whole number of voxels, the nearest to the spacing asked for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kitseg.types import Box, Geometry, Grid, Triple

Coordinates = NDArray[np.float64]
SLAB = 16


def grid_geometry(scan: Geometry, grid: Grid) -> Geometry:
    """The lattice over ``scan``'s extent whose voxels come nearest to what ``grid`` asks for."""
    (depth, height, width), (z, y, x) = scan.shape, scan.spacing
    if grid.slices is not None:
        depth = round(depth * z / grid.slices)
    if grid.pixels is not None:
        factor = grid.pixels / max(height, width)
        height, width = round(height * factor), round(width * factor)
    elif grid.inplane is not None:
        height, width = round(height * y / grid.inplane), round(width * x / grid.inplane)
    return over(scan, (max(1, depth), max(1, height), max(1, width)))


def over(scan: Geometry, shape: Triple) -> Geometry:
    """The lattice of ``shape`` voxels over ``scan``'s extent."""
    ratio = np.array(scan.shape) / shape
    affine = scan.affine.copy()
    affine[:3, :3] *= ratio
    affine[:3, 3] += scan.affine[:3, :3] @ ((ratio - 1) / 2)
    return Geometry(shape, affine)


def to_grid(image: NDArray[Any], shape: Triple) -> NDArray[np.float32]:
    """A scan (D, H, W) resampled trilinearly to ``shape``, both covering the same extent; edges are held."""
    z, y, x = (_centres(range(m), m, n) for m, n in zip(shape, image.shape, strict=True))
    return sample_linear(image, z, y, x)


def nearest(array: NDArray[Any], shape: Triple) -> NDArray[Any]:
    """Labels or HU (D, H, W) on a lattice of ``shape`` over the same extent, by nearest neighbour."""
    index = [_nearest(range(m), m, n) for m, n in zip(shape, array.shape, strict=True)]
    return array[np.ix_(*index)]


def box_on(box: Box, source: Triple, target: Triple) -> Box:
    """The voxels of lattice ``target`` whose centres lie in ``box`` of lattice ``source``; both cover the same extent.

    A voxel whose centre lies on the border between two boxes belongs to the later one.
    """
    return Box(_first_centres(box.start, source, target), _first_centres(box.stop, source, target)).clip(target)


def from_grid(
    values: NDArray[Any], box: Box, grid: Triple, scan: Triple, how: str = "linear"
) -> tuple[NDArray[np.float16], Box]:
    """Probabilities in a box of a grid, returned to the scan's own lattice.

    Args:
        values: (K, d, h, w), the contents of ``box``.
        box: a box on the grid; it may reach outside.
        grid: the shape of the grid.
        scan: the shape of the scan's lattice, over the same extent.
        how: ``linear`` (edges are held) or ``nearest``.

    Returns:
        (K, D, H, W) float16 and the box of the scan that they fill: the voxels whose centres lie in ``box``.
    """
    target = box_on(box, grid, scan)
    if how == "nearest":
        index = [
            np.clip(_nearest(range(a, b), n, m) - start, 0, size - 1)
            for a, b, n, m, start, size in zip(
                target.start, target.stop, scan, grid, box.start, values.shape[1:], strict=True
            )
        ]
        return np.stack([block[np.ix_(*index)].astype(np.float16) for block in values]), target
    axes = zip(target.start, target.stop, scan, grid, box.start, strict=True)
    z, y, x = (_centres(range(a, b), n, m) - start for a, b, n, m, start in axes)
    out = np.empty((len(values), *target.size), np.float16)
    for channel, block in zip(out, values, strict=True):
        sample_linear(block, z, y, x, channel)
    return out, target


def sample_linear(
    array: NDArray[Any], z: Coordinates, y: Coordinates, x: Coordinates, out: NDArray[Any] | None = None
) -> NDArray[Any]:
    """Linear interpolation of ``array`` (D, H, W) on the lattice of voxel coordinates ``z`` × ``y`` × ``x``.

    Coordinates outside are held at the edge. Works slab by slab, so that only ``out`` (float32 where none is given)
    has the size of the result.
    """
    rows, columns = _weights(y, array.shape[1]), _weights(x, array.shape[2]).T
    if out is None:
        out = np.empty((len(z), len(y), len(x)), np.float32)
    for first in range(0, len(z), SLAB):
        part = z[first : first + SLAB]
        low = int(np.clip(np.floor(part.min()), 0, len(array) - 1))
        high = int(np.clip(np.floor(part.max()) + 2, low + 1, len(array)))
        source = array[low:high].astype(np.float32, copy=False)
        slab = np.tensordot(_weights(part - low, len(source)), source, axes=1)
        out[first : first + SLAB] = np.matmul(np.matmul(rows, slab), columns)
    return out


def _first_centres(border: Triple, source: Triple, target: Triple) -> Triple:
    """On each axis, the first voxel of ``target`` whose centre isn't before a border given in voxels of ``source``."""
    z, y, x = (int(np.ceil(p * m / n - 0.5)) for p, n, m in zip(border, source, target, strict=True))
    return z, y, x


def _centres(voxels: range, there: int, here: int) -> Coordinates:
    """Centres of ``voxels`` of an axis with ``there`` voxels, in voxel coordinates of one with ``here``."""
    return (np.array(voxels) + 0.5) * here / there - 0.5


def _nearest(voxels: range, there: int, here: int) -> NDArray[np.int64]:
    return np.minimum(((np.array(voxels) + 0.5) * here / there).astype(np.int64), here - 1)


def _weights(coordinates: Coordinates, n: int) -> NDArray[np.float32]:
    """(len(coordinates), n) matrix of linear interpolation along an axis of n voxels."""
    held = np.clip(coordinates, 0, n - 1)
    low = np.minimum(np.floor(held).astype(np.int64), max(n - 2, 0))
    fraction = held - low
    matrix = np.zeros((len(held), n), np.float32)
    index = np.arange(len(held))
    matrix[index, low] = 1 - fraction
    matrix[index, np.minimum(low + 1, n - 1)] += fraction
    return matrix
