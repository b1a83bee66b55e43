"""The patient's axes from painted kidneys, whose angles are known."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from shapes import lattice

from kitseg.measurement.body_axes import body_axes
from kitseg.measurement.sides import side_map
from kitseg.types import Geometry

LEAN = 24.0  # degrees backwards, of a usual kidney's upper pole
RADII = (25.0, 22.0, 52.0)


def kidney(
    geometry: Geometry, x: float, back: float, inward: float, radii: tuple[float, ...] = RADII
) -> NDArray[np.bool_]:
    """An ellipsoid whose upper pole leans back and towards the midline by so many degrees."""
    turn = Rotation.from_euler("yx", [-np.sign(x) * inward, back], degrees=True).as_matrix()
    voxels = np.moveaxis(np.indices(geometry.shape), 0, -1)
    offsets = voxels @ geometry.affine[:3, :3].T + geometry.affine[:3, 3] - (x, -10, 0)
    return np.asarray((((offsets @ turn) / radii) ** 2).sum(axis=-1) <= 1)


def axes(
    *kidneys: tuple[float, ...], tilt: tuple[float, float, float] = (0, 0, 0), **more: tuple[float, ...]
) -> NDArray[np.float64]:
    geometry = lattice(spacing=(4, 3, 3), size=(240, 140, 150), degrees=tilt)
    straight = Geometry(geometry.shape, lattice(spacing=(4, 3, 3), size=(240, 140, 150)).affine)
    labels = np.zeros(geometry.shape, np.uint8)
    for x, back, inward in kidneys:
        labels[kidney(geometry, x, back, inward, **more)] = 1
    return body_axes(labels, side_map(labels, straight, 0.0), straight)


def degrees(found: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    """The angle between two sets of axes."""
    return float(np.rad2deg(Rotation.from_matrix(found @ expected.T).magnitude()))


def test_usual_kidneys_of_a_straight_patient() -> None:
    found = axes((60, LEAN, 12), (-60, LEAN, 12))
    assert degrees(found, np.eye(3)) < 3
    assert found @ found.T == pytest.approx(np.eye(3), abs=1e-9)


def test_one_oblique_kidney_counts_half() -> None:
    up = axes((60, LEAN + 20, 12), (-60, LEAN, 12))[2]
    assert np.rad2deg(np.arctan2(-up[1], up[2])) == pytest.approx(10, abs=2)


def test_axes_follow_the_patient() -> None:
    straight = axes((60, LEAN, 12), (-60, LEAN, 12))
    for tilt in ((20, 0, 0), (0, -20, 0), (0, 0, 20)):
        scan = Rotation.from_euler("xyz", tilt, degrees=True).as_matrix()
        assert degrees(axes((60, LEAN, 12), (-60, LEAN, 12), tilt=tilt) @ scan.T, straight) < 2


def test_a_single_kidney_and_one_too_round() -> None:
    assert degrees(axes((60, LEAN, 12)), np.eye(3)) < 3
    assert (axes((60, LEAN, 12), radii=(30, 30, 30)) == np.eye(3)).all()
    assert (axes() == np.eye(3)).all()


def test_a_kidney_that_lies_across_does_not_count() -> None:
    """A right kidney of the same volume whose upper pole leans back by 95°; tilted patients turn with the scan."""
    for tilt in ((0, 0, 0), (15, 0, 0), (0, 15, 0)):
        scan = Rotation.from_euler("xyz", tilt, degrees=True).as_matrix()
        found = axes((60, 95, 12), (-60, LEAN, 12), tilt=tilt) @ scan.T
        assert np.rad2deg(np.arccos(found[2, 2])) < 3


def test_what_lies_across_the_scan_is_not_the_patients_axis() -> None:
    assert (axes((0, 0, 0), radii=(70, 22, 25)) == np.eye(3)).all()


@pytest.mark.filterwarnings("error")
def test_both_kidneys_across_the_scan() -> None:
    labels, affine = np.zeros((30, 40, 200), np.uint8), np.eye(4)[[2, 1, 0, 3]]
    for start in (10, 110):
        labels[5:25, 5:35, start : start + 80] = 1
    geometry = Geometry(labels.shape, affine)
    assert (body_axes(labels, side_map(labels, geometry, 100.0), geometry) == np.eye(3)).all()
