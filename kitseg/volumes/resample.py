"""Resample between a scan's own grid and a stage's grid, with exact alignment in both directions.

Both grids cover the same extent: voxel i of n covers the fraction [i/n, (i+1)/n] of the extent on each axis. A grid's
spacing is therefore the extent divided by an integer number of voxels, as close as possible to the requested spacing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kitseg.types import Box, Geometry, Grid, Triple, Volume

Coordinates = NDArray[np.float64]


def grid_geometry(scan: Geometry, grid: Grid) -> Geometry:
    """The geometry over ``scan``'s extent whose spacing is closest to ``grid``'s."""
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
    """The geometry of ``shape`` voxels over ``scan``'s extent."""
    ratio = np.array(scan.shape) / shape
    affine = scan.affine.copy()
    affine[:3, :3] *= ratio
    affine[:3, 3] += scan.affine[:3, :3] @ ((ratio - 1) / 2)
    return Geometry(shape, affine)


def to_grid(image: NDArray[Any], shape: Triple, dtype: type[np.generic] = np.float32) -> NDArray[Any]:
    """Resample a scan (D, H, W) trilinearly to ``shape`` over the same extent, with edge padding.

    Values of an integer ``dtype`` are rounded.
    """
    z, y, x = (_centres(range(m), m, n) for m, n in zip(shape, image.shape, strict=True))
    return sample_linear(image, z, y, x, np.empty(shape, dtype))


def to_grid_smooth(image: NDArray[Any], shape: Triple) -> NDArray[np.int16]:
    """``to_grid`` in whole HU, after a Gaussian blur along the axes that become coarser: 0.45 √(ratio² − 1) voxels."""
    z, y, x = (_blurred(n, m) for n, m in zip(image.shape, shape, strict=True))
    planes = np.stack([y @ plane.astype(np.float32) @ x.T for plane in image])
    limits = np.iinfo(np.int16)
    return np.rint(np.tensordot(z, planes, 1)).clip(limits.min, limits.max).astype(np.int16)


def nearest(array: NDArray[Any], shape: Triple) -> NDArray[Any]:
    """Resample labels or HU (D, H, W) by nearest neighbour to ``shape`` over the same extent."""
    z, y, x = (_nearest(range(m), m, n) for m, n in zip(shape, array.shape, strict=True))
    out = np.empty(shape, array.dtype)
    for target, index in zip(out, z, strict=True):
        array[index][y].take(x, 1, target, "clip")
    return out


def box_on(box: Box, source: Triple, target: Triple) -> Box:
    """The voxels of grid ``target`` whose centres lie in ``box`` of grid ``source``; both cover the same extent.

    A voxel whose centre lies on the border between two boxes belongs to the later box.
    """
    return Box(_first_centres(box.start, source, target), _first_centres(box.stop, source, target)).clip(target)


def from_grid(
    values: NDArray[Any], box: Box, grid: Triple, target: Box, scan: Triple, how: str, out: NDArray[np.float16]
) -> None:
    """Resample probabilities in a box of a grid to the scan's own grid, slab by slab, so that only ``out`` is large.

    Args:
        values: (d, h, w), the values in ``box``.
        box: a box on the grid; it may reach outside.
        grid: the shape of the grid.
        target: voxels of the scan's grid whose centres lie in ``box``, see ``box_on``.
        scan: the shape of the scan's grid, over the same extent.
        how: ``linear`` (with edge padding) or ``nearest``.
        out: the output array, of the size of ``target``.
    """
    axes = list(zip(target.start, target.stop, scan, grid, box.start, values.shape, strict=True))
    if how == "nearest":
        z, y, x = (np.clip(_nearest(range(a, b), n, m) - o, 0, size - 1) for a, b, n, m, o, size in axes)
        for plane, index in zip(out, z, strict=True):
            plane[...] = values[index][y].take(x, 1)
    else:
        z, y, x = (_centres(range(a, b), n, m) - o for a, b, n, m, o, _ in axes)
        sample_linear(values, z, y, x, out)


def sample_linear(
    array: NDArray[Any], z: Coordinates, y: Coordinates, x: Coordinates, out: NDArray[Any] | None = None
) -> NDArray[Any]:
    """Linear interpolation of ``array`` (D, H, W) at the voxel coordinates ``z`` × ``y`` × ``x``.

    Coordinates outside are clipped to the edge. Works slice by slice, so that only ``out`` (by default float32) has the
    size of the result; for an integer ``out`` the values are rounded and clipped to its range.
    """
    if out is None:
        out = np.empty((len(z), len(y), len(x)), np.float32)
    whole = np.iinfo(out.dtype) if out.dtype.kind in "iu" else None
    rows, columns = _neighbours(y, array.shape[1]), _neighbours(x, array.shape[2])
    for target, low, high, share in zip(out, *_neighbours(z, len(array)), strict=True):
        plane = _between(array[low].astype(np.float32), array[high], share)
        plane = _between(plane[rows[0]], plane[rows[1]], rows[2][:, None])
        plane = _between(plane.take(columns[0], 1), plane.take(columns[1], 1), columns[2])
        target[:] = plane if whole is None else np.rint(plane, plane).clip(whole.min, whole.max, plane)
    return out


def _first_centres(border: Triple, source: Triple, target: Triple) -> Triple:
    """On each axis, the first voxel of ``target`` whose centre is at or after a border in voxels of ``source``."""
    z, y, x = (int(np.ceil(p * m / n - 0.5)) for p, n, m in zip(border, source, target, strict=True))
    return z, y, x


def _centres(voxels: range, there: int, here: int) -> Coordinates:
    """Centres of ``voxels`` of an axis with ``there`` voxels, in voxel coordinates of an axis with ``here`` voxels."""
    return (np.array(voxels) + 0.5) * here / there - 0.5


def _nearest(voxels: range, there: int, here: int) -> NDArray[np.int64]:
    return np.minimum(((np.array(voxels) + 0.5) * here / there).astype(np.int64), here - 1)


def _neighbours(coordinates: Coordinates, n: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """The voxels below and above each coordinate on an axis of n voxels, and the distance to the lower one."""
    held = np.clip(coordinates, 0, n - 1)
    low = np.floor(held).astype(np.int64)
    return low, np.minimum(low + 1, n - 1), (held - low).astype(np.float32)


def _blurred(n: int, m: int) -> NDArray[np.float32]:
    """Weights (m, n) that blur an axis of n voxels where it becomes coarser, and interpolate it to m voxels."""
    low, high, share = _neighbours(_centres(range(m), m, n), n)
    between = np.zeros((m, n), np.float32)
    between[np.arange(m), low] += 1 - share
    between[np.arange(m), high] += share
    if n <= m:
        return between
    sigma, index = 0.45 * ((n / m) ** 2 - 1) ** 0.5, np.arange(n, dtype=np.float32)
    blur = np.exp(-0.5 * ((index[:, None] - index) / sigma) ** 2)
    weights: NDArray[np.float32] = between @ (blur / blur.sum(1, keepdims=True))
    return weights


def _between(
    low: NDArray[np.float32], high: NDArray[Any], share: NDArray[np.float32] | np.float32
) -> NDArray[np.float32]:
    """``low`` + ``share`` (``high`` - ``low``), computed in ``low``'s memory."""
    step: NDArray[np.float32] = high - low
    step *= share
    low += step
    return low


def image_on_grid(scan: Volume, grid: Grid) -> tuple[NDArray[np.int16], Geometry]:
    """A scan's HU on a grid, rounded to whole HU, for training and prediction alike."""
    lattice, limits = grid_geometry(scan.geometry, grid), np.iinfo(np.int16)
    if grid.image == "smooth":
        return to_grid_smooth(scan.array, lattice.shape), lattice
    if grid.image == "linear":
        return to_grid(scan.array, lattice.shape, np.int16), lattice
    values = nearest(scan.array, lattice.shape)
    if values.dtype != np.int16:
        values = np.clip(np.rint(values), limits.min, limits.max).astype(np.int16)
    return values, lattice
