"""The contrast phase: an aorta that is found by its looks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kitseg.measurement.phase import ARTERIAL, LATE, NEPHROGRAPHIC, UNENHANCED, aorta_hu, contrast_phase, kidney_hu
from kitseg.types import Geometry, Volume
from kitseg.volumes.nifti import read_image, read_labels

FAT, AIR, BONE, MUSCLE = -90, -1000, 220, 50
AORTA_ROW, AORTA_COLUMN = 102, 8.0  # mm below the top of the frame; mm to the left of its middle


def abdomen(
    aorta: float | None, spacing: tuple[float, float, float] = (4.0, 2.0, 2.0), radius: float = 9.0, noise: float = 8.0
) -> tuple[np.ndarray, np.ndarray, Geometry]:
    """A trunk of fat, 300 mm wide, with a spine, psoas muscles, two kidneys at 150 HU, a vena cava and an aorta."""
    shape = tuple(round(length / step) for length, step in zip((120, 260, 340), spacing, strict=True))
    z, y, x = (np.arange(n) * step for n, step in zip(shape, spacing, strict=True))
    y, x = y[None, :, None], x[None, None, :] - 170

    def disc(row: float, column: float, r: float, wide: float = 1.0) -> np.ndarray:
        return (y - row) ** 2 + ((x - column) / wide) ** 2 < r**2

    hu = np.where((x / 150) ** 2 + ((y - 125) / 100) ** 2 < 1, FAT, AIR) + 0 * z[:, None, None]
    hu[:, disc(140, -38, 15)[0] | disc(140, 38, 15)[0]] = MUSCLE  # psoas
    hu[:, disc(165, 0, 14)[0] | disc(130, 0, 17, wide=1.4)[0]] = BONE
    hu[:, disc(157, 0, 9)[0]] = MUSCLE  # spinal canal
    hu[:, disc(104, -20, 10)[0]] = 90  # vena cava
    if aorta is not None:
        hu[:, disc(AORTA_ROW, AORTA_COLUMN, radius)[0]] = aorta
    labels = np.zeros(shape, np.uint8)
    labels[2:-2, (disc(125, -75, 25) | disc(125, 75, 25))[0]] = 1
    hu[labels == 1] = 150
    hu = hu + np.random.default_rng(0).normal(0, noise, shape)
    return np.rint(hu).astype(np.int16), labels, Geometry(shape, np.diag([*spacing, 1.0]))


@pytest.mark.parametrize("value", [180, 300])
@pytest.mark.parametrize("spacing", [(4.0, 2.0, 2.0), (2.0, 1.2, 1.2), (5.0, 3.0, 3.0)])
def test_an_aorta_brighter_than_the_cava_is_found(value: float, spacing: tuple[float, float, float]) -> None:
    hu, labels, geometry = abdomen(value, spacing)
    found = aorta_hu(hu, labels, geometry)
    assert found == pytest.approx(value, abs=8)


@pytest.mark.parametrize("radius", [7.0, 15.0])
def test_narrow_and_wide_aortas_are_found(radius: float) -> None:
    hu, labels, geometry = abdomen(250, radius=radius)
    assert aorta_hu(hu, labels, geometry) == pytest.approx(250, abs=8)


def test_nothing_is_found_where_there_is_no_spine_or_no_kidney() -> None:
    hu, labels, geometry = abdomen(250)
    assert aorta_hu(hu, np.zeros_like(labels), geometry) is None
    assert aorta_hu(np.full_like(hu, FAT), labels, geometry) is None
    assert aorta_hu(np.where(hu < 0, hu, FAT), labels, geometry) is None


def test_the_kidneys_rim_is_left_out() -> None:
    labels = np.zeros((4, 20, 20), np.uint8)
    labels[:, 2:18, 2:18] = 1
    labels[:, 8:10, 8:10] = 2
    hu = np.full(labels.shape, 150)
    hu[:, 2], hu[:, 17], hu[..., 2], hu[..., 17] = -90, -90, -90, -90
    hu[labels == 2] = 40
    assert kidney_hu(hu, labels) == 150
    assert kidney_hu(hu, np.zeros_like(labels)) is None


def test_a_kidney_that_is_all_rim_counts_as_a_whole() -> None:
    labels = np.zeros((4, 8, 8), np.uint8)
    labels[:, 3:5] = 1
    hu = np.where(labels == 1, 120, -90)
    assert kidney_hu(hu, labels) == 120


@pytest.mark.parametrize(
    ("kidney", "aorta", "phase"),
    [
        (35, 42, UNENHANCED),
        (35, None, UNENHANCED),
        (140, 300, ARTERIAL),
        (60, 320, ARTERIAL),
        (180, 150, NEPHROGRAPHIC),
        (130, 85, LATE),
        (40, 80, None),
        (140, None, None),
        (None, 150, None),
    ],
)
def test_name_of_the_phase(kidney: float | None, aorta: float | None, phase: str | None) -> None:
    assert contrast_phase(kidney, aorta) == phase


def real_body(shared: Path) -> tuple[Volume, np.ndarray, np.ndarray]:
    """A real unenhanced CT, its organs (52 aorta, 63 vena cava) and its kidneys as labels."""
    scan = read_image(shared / "body" / "ct.nii.gz", "body")
    organs = read_labels(shared / "body" / "organs.nii.gz", "body", scheme=None).array
    return scan, organs, np.isin(organs, (2, 3)).astype(np.uint8)


@pytest.mark.parametrize("add", [0, 150, 280])
def test_a_real_aorta_is_found_unenhanced_and_enhanced(shared: Path, add: int) -> None:
    scan, organs, labels = real_body(shared)
    hu = scan.array + np.int16(add) * (organs == 52)
    found = aorta_hu(hu, labels, scan.geometry)
    level = np.flatnonzero(labels.any(axis=(1, 2)))
    seen = slice(level[0], level[-1] + 1)
    assert found == pytest.approx(np.median(hu[seen][organs[seen] == 52]), abs=6)


def test_a_real_body_without_its_great_vessels_has_no_aorta(shared: Path) -> None:
    scan, organs, labels = real_body(shared)
    assert aorta_hu(np.where(np.isin(organs, (52, 63)), FAT, scan.array), labels, scan.geometry) is None
