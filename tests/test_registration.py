"""Registration of arrays whose true map is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
from patients import SHAPE, SPACING, patient, volume

from kitseg.patches.registration import Copy, Labelled, Settings, coarse, register, register_copy
from kitseg.patches.warp import AIR, RegistrationQuality, Warp, judge, problem, warped
from kitseg.types import Geometry

FAST = Settings(spacing=SPACING)
IDENTITY = np.zeros((3, 4, 4, 4), np.float32)
GOOD = RegistrationQuality(0.5, 0.8, 0.0, 0.1, 0.3, 0.0, 1.1, 1.2, 0.99)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)


def bent(scan: Labelled, warp: Warp) -> Labelled:
    geometry = scan.image.geometry
    return Labelled(volume(warped(warp, scan.image, geometry)), volume(warped(warp, scan.label, geometry)))


def wave(height: float) -> Warp:
    """A smooth displacement along all axes, in mm."""
    axes = [np.sin(2 * np.pi * (np.arange(n) + 0.5) / n) for n in SHAPE]
    product = height * axes[0][:, None, None] * axes[1][:, None] * axes[2]
    return Warp(np.stack([product, product, -product]).astype(np.float32), np.full(3, SPACING))


def grown() -> Warp:
    """8 % larger along the slices, 10 % smaller along the columns, moved by 6 mm along the rows."""
    middle = np.array(SHAPE) * SPACING / 2
    z, y, x = ((np.indices(SHAPE).transpose(1, 2, 3, 0) + 0.5) * SPACING - middle).transpose(3, 0, 1, 2)
    return Warp(np.stack([0.08 * z, np.full_like(y, 6), -0.1 * x]).astype(np.float32), np.full(3, SPACING))


@pytest.mark.parametrize("warp", [grown(), wave(14.0)], ids=["affine", "smooth"])
def test_a_known_warp_is_found(warp: Warp) -> None:
    floating = patient()
    copy = register_copy(bent(floating, warp), floating, FAST)
    quality = copy.quality
    assert quality.dice_after > max(0.9, quality.dice_before + 0.03)
    assert quality.tumor_after > 0.75
    assert quality.least > 0
    assert quality.folded == 0
    assert problem(quality) is None


def test_an_identity_stays_one() -> None:
    copy = register_copy(patient(), patient(), FAST)
    assert copy.quality.dice_before == 1
    assert copy.quality.dice_after > 0.99
    assert copy.quality.least > 0.8
    assert abs(copy.quality.volume - 1) < 0.01
    inside = patient().label.array > 0
    assert np.abs(copy.image[inside].astype(int) - patient().image.array[inside]).mean() < 5


def test_the_same_call_gives_the_same_warp() -> None:
    floating = patient()
    seen = coarse(bent(floating, wave(14.0)), FAST), coarse(floating, FAST)
    few = replace(FAST, affine=5, demons=5)
    assert np.array_equal(register(*seen, few).field, register(*seen, few).field)


def test_the_copy_lies_on_the_references_own_lattice() -> None:
    reference, floating = patient(), patient()
    thin = Geometry((60, 88, 104), np.diag([2.5, 2.5, 2.5, 1.0]))
    finer = Labelled(*(replace(v, array=v.array.repeat(2, 0).repeat(2, 1).repeat(2, 2), geometry=thin, native=thin)
                       for v in (reference.image, reference.label)))  # fmt: skip
    copy = register_copy(finer, floating, replace(FAST, affine=5, demons=5))
    assert isinstance(copy, Copy)
    assert copy.image.shape == copy.label.shape == thin.shape
    assert (copy.image.dtype, copy.label.dtype) == (np.int16, np.uint8)
    assert copy.quality.dice_after > 0.9
    assert abs(copy.quality.volume - 1) < 0.1


def test_the_grid_of_the_search_stays_bounded() -> None:
    scan = coarse(patient(), replace(FAST, spacing=1.0, voxels=9000))
    assert 6000 < scan.image.size < 12000
    assert np.allclose(scan.spacing * scan.image.shape, np.array(SHAPE) * SPACING)


def test_a_scan_without_a_kidney_is_refused() -> None:
    empty = Labelled(patient().image, volume(np.zeros(SHAPE, np.uint8)))
    with pytest.raises(ValueError, match="no kidney"):
        register_copy(empty, patient(), FAST)


def test_a_shift_moves_whole_voxels_and_brings_air_in() -> None:
    field = IDENTITY.copy()
    field[0] = 2 * SPACING
    scan = patient()
    image, label = (warped(Warp(field, np.ones(3)), v, v.geometry) for v in (scan.image, scan.label))
    assert np.array_equal(image[:-2], scan.image.array[2:])
    assert np.array_equal(label[:-2], scan.label.array[2:])
    assert (image[-2:] == AIR).all()
    assert not label[-2:].any()


def test_images_are_linear_and_labels_nearest_between_voxels() -> None:
    field = IDENTITY.copy()
    field[2] = 0.3 * SPACING
    image = volume(np.arange(8, dtype=np.int16).reshape(1, 1, 8) * 10)
    label = volume(np.array([[[0, 0, 1, 1, 2, 2, 0, 0]]], np.uint8))
    assert warped(Warp(field, np.ones(3)), image, image.geometry)[0, 0, :7].tolist() == [3, 13, 23, 33, 43, 53, 63]
    assert np.array_equal(warped(Warp(field, np.ones(3)), label, label.geometry), label.array)


def test_jacobian_by_hand() -> None:
    z, y, x = np.indices((6, 7, 8)).astype(np.float32)
    spacing = np.array([2.0, 1.0, 0.5])
    field = np.stack([0.1 * 2 * z, -0.5 * y + 3, 0.2 * 0.5 * x + 0.7 * y])
    assert np.allclose(Warp(field, spacing).jacobian, 1.1 * 0.5 * 1.2, atol=1e-5)
    mixed = np.stack([0.3 * y, 0.4 * 2 * z, 0 * x])
    assert np.allclose(Warp(mixed, spacing).jacobian, 1 - 0.3 * 0.4, atol=1e-5)
    assert np.allclose(Warp(IDENTITY, spacing).jacobian, 1)


def test_a_fold_is_seen_and_refused() -> None:
    field = np.zeros((3, *SHAPE), np.float32)
    field[1, :, 20:24] = -2 * SPACING * np.arange(4)[None, :, None]
    folding = Warp(field, np.full(3, SPACING))
    assert folding.jacobian[:, 21].max() == pytest.approx(-1)
    scan = patient()
    label = warped(folding, scan.label, scan.label.geometry)
    quality = judge(folding, (label, label), scan.label, scan.label)
    assert quality.least <= -1
    assert 0 < quality.folded < 0.2
    assert "folding" in str(problem(quality))


def test_a_kidney_that_is_cut_off_is_seen() -> None:
    field = IDENTITY.copy()
    field[0] = 16 * SPACING
    scan, away = patient(), Warp(field, np.full(3, SPACING))
    label = warped(away, scan.label, scan.label.geometry)
    quality = judge(away, (scan.label.array, label), scan.label, scan.label)
    assert quality.covered == pytest.approx((label > 0).sum() / (scan.label.array > 0).sum())
    assert quality.covered < 0.6
    assert "is in the copy" in str(problem(quality))


@pytest.mark.parametrize(
    ("flaw", "word"),
    [
        ({"least": 0.0}, "folding"),
        ({"volume": 0.49}, "volume"),
        ({"volume": 2.01}, "volume"),
        ({"covered": 0.89}, "89%"),
        ({"tumor": 0.0}, "tumor is lost"),
        ({"dice_after": 0.49}, "overlap fell"),
    ],
)
def test_each_limit(flaw: dict[str, float], word: str) -> None:
    assert problem(GOOD) is None
    assert problem(replace(GOOD, tumor=None)) is None
    assert word in str(problem(replace(GOOD, **flaw)))
