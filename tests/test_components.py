"""Component rules against plain versions with scipy and loops, and on the challenge's own label maps."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from loops import FULL, parts_of, plain_keep, two_rows
from scipy import ndimage

from kitseg.components import Components, bounding_box, keep_kidneys, kidneys_among
from kitseg.types import Box


@pytest.mark.parametrize("density", [0.0, 0.002, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_bounding_box_is_where_the_voxels_are(seed: int, density: float) -> None:
    mask = np.random.default_rng(seed).random((9, 11, 13)) < density
    where = np.argwhere(mask)
    box = bounding_box(mask)
    if not len(where):
        assert box is None
    else:
        assert box == Box(tuple(where.min(0)), tuple(where.max(0) + 1))


def test_two_voxels_of_a_row() -> None:
    """The smallest mask on which cc3d 4.1.1 fails when it is given bool instead of bytes."""
    found = Components.of(np.array([[[True, False, True]]]))
    assert found.numbers.tolist() == [[[1, 0, 2]]]
    assert found.sizes.tolist() == [0, 1, 1]


def test_a_corner_joins_two_voxels() -> None:
    mask = np.zeros((4, 4, 4), bool)
    mask[0, 0, 0] = mask[1, 1, 1] = mask[3, 3, 3] = True
    found = Components.of(mask)
    assert found.sizes.tolist() == [0, 2, 1]
    assert found.total(np.arange(64).reshape(4, 4, 4)).tolist() == [0, 21, 63]
    np.testing.assert_array_equal(np.argwhere(found.chosen(np.array([True, True, False]))), [[0, 0, 0], [1, 1, 1]])


@pytest.mark.parametrize("density", [0.0, 0.001, 0.02, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rule", [(1, 0.05, 20.0), (2, 0.05, 20.0), (2, 0.5, 3.0), (4, 0.3, 2.0), (3, 0.0, 0.0)])
def test_keep_kidneys_is_the_plain_rule(seed: int, density: float, rule: tuple[int, float, float]) -> None:
    mask = np.random.default_rng(seed).random((9, 11, 13)) < density
    np.testing.assert_array_equal(keep_kidneys(mask, 1.0, *rule), plain_keep(mask, 1.0, *rule))


@pytest.mark.parametrize(("voxel_ml", "second", "stays"), [(1, 19, 0), (1, 20, 20), (10, 4, 0), (10, 5, 5)])
def test_a_second_kidney_needs_20_ml_and_a_twentieth_of_the_first(voxel_ml: float, second: int, stays: int) -> None:
    assert keep_kidneys(two_rows(second), voxel_ml).sum() == 100 + stays


def test_one_small_kidney_stays() -> None:
    np.testing.assert_array_equal(keep_kidneys(two_rows(0), voxel_ml=1e-6), two_rows(0))


def test_of_equals_the_first_in_the_array_stays() -> None:
    mask = np.zeros((5, 5, 5), bool)
    mask[4, 0, 0] = mask[2, 4, 0] = mask[0, 0, 4] = True
    kept = keep_kidneys(mask, voxel_ml=1.0, most=2, min_ml=1.0)
    np.testing.assert_array_equal(np.argwhere(kept), [[0, 0, 4], [2, 4, 0]])
    np.testing.assert_array_equal(keep_kidneys(np.asfortranarray(mask), 1.0, most=2, min_ml=1.0), kept)


def test_kidneys_by_their_tissue() -> None:
    """Rows of 9, 7, 5 and 2 voxels with 1, 3, 5 and 2 of tissue: the two of at least 3 with the most tissue stay."""
    mask, tissue = np.zeros((7, 1, 10), bool), np.zeros((7, 1, 10), bool)
    for z, size, share in ((0, 9, 1), (2, 7, 3), (4, 5, 5), (6, 2, 2)):
        mask[z, 0, :size] = tissue[z, 0, :share] = True
    found = Components.of(mask)
    kept = found.chosen(kidneys_among(found.sizes, 1.0, 2, 0.05, 3.0, found.total(tissue)))
    assert kept.sum(axis=(1, 2)).tolist() == [0, 0, 7, 0, 5, 0, 0]
    assert keep_kidneys(mask, 1.0, 2, 0.05, 3.0).sum(axis=(1, 2)).tolist() == [9, 0, 7, 0, 0, 0, 0]


@pytest.mark.parametrize(("case", "kidneys"), [(5, 1), (30, 2), (88, 2), (165, 1)])
def test_keep_kidneys_on_challenge_labels(shared: Path, case: int, kidneys: int) -> None:
    """The number of kidneys is right, and what goes are specks below 1 ml."""
    image = nibabel.load(shared / "kits19" / f"case_{case:05d}" / "segmentation.nii.gz")
    voxel_ml = float(np.prod(image.header.get_zooms()[:3])) / 1000
    mask = np.asanyarray(image.dataobj) > 0
    box = bounding_box(mask)
    assert box is not None
    kept = keep_kidneys(mask[box.slices], voxel_ml)
    assert ndimage.label(kept, FULL)[1] == kidneys
    assert all(part.sum() * voxel_ml < 1 for part in parts_of(mask[box.slices] & ~kept))
