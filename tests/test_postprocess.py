"""Component rules against plain versions with scipy and loops, and on the challenge's own label maps."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from kitseg.postprocess.components import bounding_box, keep_kidneys, keep_kidneys_labels, remove_low_hu_tumors
from kitseg.postprocess.steps import KeepKidneys, PostStep, RemoveLowHuTumors
from kitseg.types import Box

FULL = np.ones((3, 3, 3), bool)
SHARED = Path(os.environ.get("KITSEG_SHARED", Path(__file__).parents[1] / "../shared"))


def plain_components(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Each component's mask, largest first, then by its first voxel."""
    numbers, count = ndimage.label(mask, FULL)
    parts = [numbers == n for n in range(1, count + 1)]
    return sorted(parts, key=lambda part: (-part.sum(), np.flatnonzero(part)[0]))


def plain_keep(
    mask: NDArray[np.bool_], voxel_ml: float, most: int, min_ratio: float, min_ml: float
) -> NDArray[np.bool_]:
    kept = np.zeros_like(mask)
    parts = plain_components(mask)
    for rank, part in enumerate(parts[:most]):
        if rank == 0 or (part.sum() >= min_ratio * parts[0].sum() and part.sum() * voxel_ml >= min_ml):
            kept |= part
    return kept


def plain_remove(labels: NDArray[np.uint8], hu: NDArray[np.int16], threshold: float) -> NDArray[np.uint8]:
    cleaned = labels.copy()
    for part in plain_components(labels == 2):
        if hu[part].mean() < threshold:
            touches = (ndimage.binary_dilation(part, FULL) & (labels == 1)).any()
            cleaned[part] = 1 if touches else 0
    return cleaned


def scattered(seed: int, density: float, shape: tuple[int, int, int] = (9, 11, 13)) -> NDArray[np.bool_]:
    return np.random.default_rng(seed).random(shape) < density


def two_kidneys(second: int) -> NDArray[np.bool_]:
    """A row of 100 voxels and, apart from it, a row of ``second``."""
    mask = np.zeros((5, 5, 100), bool)
    mask[0, 0] = True
    mask[4, 4, :second] = True
    return mask


@pytest.mark.parametrize("density", [0.0, 0.002, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_bounding_box_is_where_the_voxels_are(seed: int, density: float) -> None:
    mask = scattered(seed, density)
    where = np.argwhere(mask)
    box = bounding_box(mask)
    if not len(where):
        assert box is None
    else:
        assert box == Box(tuple(where.min(0)), tuple(where.max(0) + 1))


@pytest.mark.parametrize("density", [0.0, 0.001, 0.02, 0.05, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("rule", [(1, 0.05, 20.0), (2, 0.05, 20.0), (2, 0.5, 3.0), (4, 0.3, 2.0), (3, 0.0, 0.0)])
def test_keep_kidneys_is_the_plain_rule(seed: int, density: float, rule: tuple[int, float, float]) -> None:
    mask = scattered(seed, density)
    np.testing.assert_array_equal(keep_kidneys(mask, 1.0, *rule), plain_keep(mask, 1.0, *rule))


@pytest.mark.parametrize("second", [19, 20, 21])
def test_a_second_kidney_needs_20_ml(second: int) -> None:
    mask = two_kidneys(second)
    assert keep_kidneys(mask, voxel_ml=1.0).sum() == 100 + (second if second >= 20 else 0)


@pytest.mark.parametrize("second", [4, 5, 6])
def test_a_second_kidney_needs_a_twentieth_of_the_first(second: int) -> None:
    mask = two_kidneys(second)
    assert keep_kidneys(mask, voxel_ml=10.0).sum() == 100 + (second if second >= 5 else 0)


def test_one_small_kidney_stays() -> None:
    mask = two_kidneys(0)
    np.testing.assert_array_equal(keep_kidneys(mask, voxel_ml=1e-6), mask)


def test_of_equals_the_first_in_the_array_stays() -> None:
    mask = np.zeros((5, 5, 5), bool)
    mask[4, 0, 0] = mask[2, 4, 0] = mask[0, 0, 4] = True
    kept = keep_kidneys(mask, voxel_ml=1.0, most=2, min_ml=1.0)
    np.testing.assert_array_equal(np.argwhere(kept), [[0, 0, 4], [2, 4, 0]])
    fortran = keep_kidneys(np.asfortranarray(mask), voxel_ml=1.0, most=2, min_ml=1.0)
    np.testing.assert_array_equal(fortran, kept)


def test_a_corner_joins_two_voxels() -> None:
    mask = np.zeros((4, 4, 4), bool)
    mask[0, 0, 0] = mask[1, 1, 1] = mask[3, 3, 3] = True
    kept = keep_kidneys(mask, voxel_ml=1.0, most=1)
    np.testing.assert_array_equal(np.argwhere(kept), [[0, 0, 0], [1, 1, 1]])


def test_labels_of_kept_kidneys_stay_as_they_are() -> None:
    labels = two_kidneys(8).astype(np.uint8)
    labels[0, 0, 40:50] = labels[4, 4, 2] = 2
    expected = labels.copy()
    expected[4] = 0
    kept = keep_kidneys_labels(labels, voxel_ml=1.0)
    assert kept.dtype == np.uint8
    np.testing.assert_array_equal(kept, expected)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("parts", [(0.0, 0.0), (0.0, 0.05), (0.02, 0.05), (0.3, 0.04), (0.1, 0.4), (0.0, 1.0)])
def test_low_tumors_go_as_in_the_plain_rule(seed: int, parts: tuple[float, float]) -> None:
    rng = np.random.default_rng(seed)
    kidney, tumor = parts
    draw = rng.random((8, 9, 10))
    labels = np.select([draw < tumor, draw < tumor + kidney], [np.uint8(2), np.uint8(1)], np.uint8(0))
    hu = rng.integers(-60, 80, labels.shape).astype(np.int16)
    before = labels.copy()
    cleaned = remove_low_hu_tumors(labels, hu, 10.0)
    np.testing.assert_array_equal(cleaned, plain_remove(labels, hu, 10.0))
    np.testing.assert_array_equal(labels, before)
    assert cleaned.dtype == np.uint8


@pytest.mark.parametrize(("hu", "kidney_at", "becomes"), [(9, (2, 2, 2), 1), (9, (3, 3, 3), 0), (10, (2, 2, 2), 2)])
def test_low_tumor_becomes_kidney_only_beside_it(hu: int, kidney_at: tuple[int, int, int], becomes: int) -> None:
    labels = np.zeros((4, 4, 4), np.uint8)
    labels[1, 1, 1], labels[kidney_at] = 2, 1
    cleaned = remove_low_hu_tumors(labels, np.full(labels.shape, hu, np.int16))
    assert cleaned[1, 1, 1] == becomes
    assert cleaned[kidney_at] == 1


def test_ct_must_have_the_labels_shape() -> None:
    with pytest.raises(ValueError, match="shape"):
        remove_low_hu_tumors(np.zeros((2, 2, 2), np.uint8), np.zeros((2, 2, 3), np.int16))


def test_steps_chain() -> None:
    labels = two_kidneys(8).astype(np.uint8)
    labels[0, 0, 40:50] = 2
    chain: list[PostStep] = [KeepKidneys(min_ml=5.0), RemoveLowHuTumors(threshold=0.0)]
    hu = np.full(labels.shape, -1, np.int16)
    cleaned = labels
    for step in chain:
        cleaned = step(cleaned, hu, 1.0)
    np.testing.assert_array_equal(cleaned, two_kidneys(8))
    np.testing.assert_array_equal(KeepKidneys()(labels, hu, 1.0)[4], 0)
    np.testing.assert_array_equal(RemoveLowHuTumors(threshold=-1.0)(labels, hu, 1.0), labels)


@pytest.mark.parametrize(("case", "kidneys"), [(5, 1), (30, 2), (88, 2), (151, 1), (165, 1)])
def test_keep_kidneys_on_challenge_labels(case: int, kidneys: int) -> None:
    """The number of kidneys is right, and what goes are specks below 1 ml."""
    nibabel = pytest.importorskip("nibabel")
    path = SHARED / "kits19" / f"case_{case:05d}" / "segmentation.nii.gz"
    if not path.exists():
        pytest.skip(f"no challenge labels in {SHARED}")
    image = nibabel.load(path)
    voxel_ml = float(np.prod(image.header.get_zooms()[:3])) / 1000
    mask = np.asanyarray(image.dataobj) > 0
    kept = keep_kidneys(mask, voxel_ml)
    box = bounding_box(mask)
    assert box is not None
    assert ndimage.label(kept[box.slices], FULL)[1] == kidneys
    gone = mask & ~kept
    assert gone.sum() + kept.sum() == mask.sum()
    assert all(part.sum() * voxel_ml < 1 for part in plain_components(gone[box.slices]))
