"""Resampling against scipy, by hand, and there and back."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from kitseg.types import Box, Geometry, Grid, Triple
from kitseg.volumes.resample import box_on, from_grid, grid_geometry, nearest, over, to_grid, to_grid_smooth

few = settings(max_examples=30, deadline=None)
shapes = st.tuples(*[st.integers(1, 9)] * 3)


def image(shape: Triple, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 100, shape).astype(np.float32)


def scipys(array: NDArray[Any], coordinates: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    lattice = np.meshgrid(*coordinates, indexing="ij")
    result: NDArray[np.float64] = ndimage.map_coordinates(array.astype(float), lattice, order=1, mode="nearest")
    return result


def half_voxel(there: int, here: int) -> NDArray[np.float64]:
    """Centres of ``there`` voxels in voxel coordinates of ``here`` over the same extent."""
    return (np.arange(there) + 0.5) * here / there - 0.5


def ramp(grid: Triple, box: Box) -> NDArray[np.float64]:
    """A sum of ramps along the three axes, in fractions of the extent, over the voxels of ``box``, also outside."""
    parts = [(np.arange(a, b) + 0.5) / n for a, b, n in zip(box.start, box.stop, grid, strict=True)]
    z, y, x = np.meshgrid(*parts, indexing="ij")
    return z + 2 * y - 4 * x


def whole(shape: Triple) -> Box:
    return Box((0, 0, 0), shape)


# --- to the grid -----------------------------------------------------------------------------------------------------


@given(shapes, shapes, st.integers(0, 99))
@few
def test_to_grid_is_scipys(source: Triple, target: Triple, seed: int) -> None:
    found = to_grid(image(source, seed), target)
    expected = scipys(image(source, seed), [half_voxel(m, n) for m, n in zip(target, source, strict=True)])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


def test_a_coarser_grid_is_blurred_first() -> None:
    """As scipy's Gaussian and linear interpolation away from the borders; an axis that gets finer is not blurred."""
    source, target = (12, 60, 50), (20, 24, 20)
    sigma = [0, *[0.45 * (2.5**2 - 1) ** 0.5] * 2]
    blurred = ndimage.gaussian_filter(image(source), sigma, truncate=6)
    expected = to_grid(blurred, target)[:, 4:-4, 4:-4]
    np.testing.assert_allclose(to_grid_smooth(image(source), target)[:, 4:-4, 4:-4], expected, rtol=0, atol=0.51)
    assert (to_grid_smooth(np.full(source, -1000, np.int16), target) == -1000).all()


def test_to_grid_by_hand() -> None:
    row = np.array([0, 8, 16], np.int16).reshape(1, 1, 3)
    assert to_grid(row, (1, 1, 6)).ravel().tolist() == [0, 2, 6, 10, 14, 16]  # the edges are held
    assert to_grid(np.array([0, 8, 16, 4], np.int16).reshape(1, 4, 1), (1, 2, 1)).ravel().tolist() == [4, 10]


@given(shapes)
@few
def test_the_same_shape_is_the_identity(shape: Triple) -> None:
    assert np.array_equal(to_grid(image(shape), shape), image(shape))
    labels = image(shape).astype(np.int64).astype(np.uint8)
    assert np.array_equal(nearest(labels, shape), labels)


@pytest.mark.parametrize(
    ("target", "expected"),
    [(2, [1, 3]), (8, [0, 0, 1, 1, 2, 2, 3, 3]), (3, [0, 2, 3]), (1, [2]), (4, [0, 1, 2, 3])],
)
def test_nearest_by_hand(target: int, expected: list[int]) -> None:
    """Centres of 2 of 4 voxels lie on borders, 1 | 3, and take the later voxel; those of 3 lie at 0.67, 2 and 3.33."""
    for axis in range(3):
        shape = [1, 1, 1]
        shape[axis] = 4
        wanted = [1, 1, 1]
        wanted[axis] = target
        found = nearest(np.arange(4, dtype=np.uint8).reshape(shape), (wanted[0], wanted[1], wanted[2]))
        assert found.dtype == np.uint8
        assert found.ravel().tolist() == expected


@given(shapes, shapes)
@few
def test_nearest_takes_the_voxel_that_holds_the_centre(source: Triple, target: Triple) -> None:
    labels = np.arange(np.prod(source)).astype(np.int64).reshape(source)
    found = nearest(labels, target)
    for voxel in np.ndindex(target):
        there = tuple(int(Fraction(2 * i + 1, 2) * n / m) for i, m, n in zip(voxel, target, source, strict=True))
        assert found[voxel] == labels[there]


# --- the lattice -----------------------------------------------------------------------------------------------------

TURN = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))[0]


def oblique(shape: Triple, spacing: tuple[float, float, float]) -> Geometry:
    affine = np.eye(4)
    affine[:3, :3] = TURN * spacing
    affine[:3, 3] = (-120.5, 33.25, 800)
    return Geometry(shape, affine)


def in_mm(geometry: Geometry, index: Any) -> NDArray[np.float64]:
    return geometry.affine[:3, :3] @ np.asarray(index, float) + geometry.affine[:3, 3]


def test_grid_geometry_takes_the_nearest_number_of_voxels() -> None:
    grid = grid_geometry(oblique((611, 512, 512), (0.5, 0.92, 0.92)), Grid(3, 0.78162497))
    assert grid.shape == (102, 603, 603)  # 305.5 / 3 = 101.8, 471.04 / 0.7816 = 602.6
    np.testing.assert_allclose(grid.spacing, (305.5 / 102, 471.04 / 603, 471.04 / 603))


def test_grid_geometry_keeps_at_least_one_voxel() -> None:
    grid = grid_geometry(oblique((1, 4, 8), (1, 1, 1)), Grid(5, 8))
    assert grid.shape == (1, 1, 1)  # 4 / 8 of a voxel
    np.testing.assert_allclose(grid.spacing, (1, 4, 8))
    assert grid_geometry(oblique((3, 1, 999), (1, 1, 1)), Grid(pixels=10)).shape == (3, 1, 10)


@pytest.mark.parametrize(
    ("grid", "shape"),
    [
        (Grid(), (40, 512, 796)),
        (Grid(5), (24, 512, 796)),
        (Grid(5, 1.6), (24, 224, 348)),  # 358.4 / 1.6 and 557.2 / 1.6
        (Grid(inplane=1.6), (40, 224, 348)),
        (Grid(pixels=256), (40, 165, 256)),  # the longer side; 512 · 256 / 796 = 164.7
        (Grid(5, pixels=256), (24, 165, 256)),
        (Grid(pixels=1592), (40, 1024, 1592)),
        (Grid(image="nearest", back="nearest"), (40, 512, 796)),
    ],
)
def test_what_a_grid_asks_for(grid: Grid, shape: Triple) -> None:
    """In mm or in pixels; what it says nothing about stays the scan's own."""
    scan = oblique((40, 512, 796), (3, 0.7, 0.7))
    assert grid_geometry(scan, grid).shape == shape
    turned = oblique((40, 796, 512), (3, 0.7, 0.7))
    assert grid_geometry(turned, grid).shape == (shape[0], shape[2], shape[1])


def test_the_scans_own_lattice_is_left_as_it_is() -> None:
    scan = oblique((7, 8, 9), (3, 0.7, 0.8))
    assert grid_geometry(scan, Grid()).same_as(scan, 1e-12)


@given(shapes, st.tuples(*[st.floats(0.5, 5)] * 3), shapes)
@few
def test_both_lattices_cover_the_same_block(shape: Triple, spacing: tuple[float, float, float], wanted: Triple) -> None:
    scan = oblique(shape, spacing)
    grid = over(scan, wanted)
    assert grid.shape == wanted
    for corner in np.ndindex(2, 2, 2):
        here, there = (np.array(corner) * g.shape - 0.5 for g in (scan, grid))
        np.testing.assert_allclose(in_mm(grid, there), in_mm(scan, here), atol=1e-9)
    for voxel in np.ndindex(grid.shape):
        index = [half_voxel(m, n)[i] for i, m, n in zip(voxel, grid.shape, shape, strict=True)]
        np.testing.assert_allclose(in_mm(grid, voxel), in_mm(scan, index), atol=1e-9)


# --- boxes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "stop", "source", "target", "expected"),
    [
        (1, 3, 4, 8, (2, 6)),
        (1, 3, 8, 4, (0, 1)),  # centres at 1, 3, 5, 7: the one on the first border is in, the one on the last is not
        (0, 4, 4, 3, (0, 3)),
        (1, 2, 4, 3, (1, 1)),  # centres at 0.67, 2, 3.33: none
        (-5, 2, 4, 4, (0, 2)),
        (3, 9, 4, 4, (3, 4)),
    ],
)
def test_box_on_by_hand(start: int, stop: int, source: int, target: int, expected: tuple[int, int]) -> None:
    found = box_on(Box((start, 0, 0), (stop, 2, 5)), (source, 2, 5), (target, 2, 5))
    assert (found.start[0], found.stop[0]) == expected
    assert (found.start[1:], found.stop[1:]) == ((0, 0), (2, 5))


@given(st.integers(1, 40), st.integers(1, 40), st.data())
@few
def test_box_on_holds_just_the_centres_inside(source: int, target: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(-3, source))
    stop = data.draw(st.integers(start, source + 3))
    found = box_on(Box((start, 0, 0), (stop, 1, 1)), (source, 1, 1), (target, 1, 1))
    inside = [i for i in range(target) if start <= Fraction(2 * i + 1, 2) * source / target < stop]
    assert list(range(found.start[0], found.stop[0])) == inside


# --- and back --------------------------------------------------------------------------------------------------------


def returned(values: NDArray[Any], box: Box, grid: Triple, scan: Triple, how: str = "linear") -> tuple[Any, Box]:
    """What ``from_grid`` writes, and the box of the scan that it fills."""
    filled = box_on(box, grid, scan)
    found = np.empty(filled.size, np.float16)
    from_grid(values, box, grid, filled, scan, how, found)
    return found, filled


@given(shapes, shapes)
@few
def test_ramps_come_back_on_any_lattice(grid: Triple, scan: Triple) -> None:
    box = whole(grid).grown(1)
    found, filled = returned(ramp(grid, box), box, grid, scan)
    assert filled == whole(scan)
    np.testing.assert_allclose(found, ramp(scan, filled), rtol=0, atol=4 * 2**-11)


@given(shapes, shapes, st.data())
@few
def test_from_grid_is_scipys_inside_its_box(grid: Triple, scan: Triple, data: st.DataObject) -> None:
    """Also for boxes that reach outside the grid."""
    starts = [data.draw(st.integers(-2, n - 1)) for n in grid]
    stops = [data.draw(st.integers(max(a, 0) + 1, n + 2)) for a, n in zip(starts, grid, strict=True)]
    box = Box((starts[0], starts[1], starts[2]), (stops[0], stops[1], stops[2]))
    values = np.random.default_rng(0).random(box.size).astype(np.float32)
    found, filled = returned(values, box, grid, scan)
    axes = zip(scan, grid, filled.start, filled.stop, box.start, strict=True)
    lattice = [half_voxel(n, m)[a:b] - start for n, m, a, b, start in axes]
    np.testing.assert_allclose(found, scipys(values, lattice), rtol=0, atol=2**-11)


def test_from_grid_in_a_box_partly_outside_by_hand() -> None:
    """Box [-1, 1) of a grid of 2 holds 0 and 1 at the centres -0.5 and 0.5; a scan of 4 voxels has 2 centres in it."""
    values = np.array([0.0, 1.0]).reshape(2, 1, 1)
    found, filled = returned(values, Box((-1, 0, 0), (1, 1, 1)), (2, 1, 1), (4, 1, 1))
    assert filled == Box((0, 0, 0), (2, 1, 1))
    assert found.ravel().tolist() == [0.75, 1.0]  # centre 0.25 of the grid, and 0.75 held at the edge


@given(shapes, shapes, st.data())
@few
def test_back_by_nearest_neighbour_takes_the_voxel_that_holds_the_centre(
    grid: Triple, scan: Triple, data: st.DataObject
) -> None:
    starts = [data.draw(st.integers(-2, n - 1)) for n in grid]
    stops = [data.draw(st.integers(max(a, 0) + 1, n + 2)) for a, n in zip(starts, grid, strict=True)]
    box = Box((starts[0], starts[1], starts[2]), (stops[0], stops[1], stops[2]))
    values = np.arange(np.prod(box.size)).reshape(box.size) % 2039  # whole in float16
    found, filled = returned(values, box, grid, scan, "nearest")
    for voxel in np.ndindex(filled.size):
        index = tuple(
            int(Fraction(2 * (i + a) + 1, 2) * n / m) - start
            for i, a, n, m, start in zip(voxel, filled.start, grid, scan, box.start, strict=True)
        )
        assert found[voxel] == values[index]


def test_from_grid_of_single_slices() -> None:
    values = np.arange(6).reshape(1, 2, 3) / 8
    found, filled = returned(values, whole((1, 2, 3)), (1, 2, 3), (4, 2, 3))
    assert filled.size == (4, 2, 3)
    assert np.array_equal(found, np.repeat(values, 4, axis=0))
    back, _ = returned(found, filled, (4, 2, 3), (1, 2, 3))
    assert np.array_equal(back, values)
