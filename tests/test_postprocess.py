"""Every prior against a plain version with loops, and by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import FULL, Mask, parts_of, plain_keep, two_rows
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.distance import cdist

from kitseg.components import Components, kidneys_among
from kitseg.postprocess import Prior
from kitseg.postprocess.distance import RemoveDistant
from kitseg.postprocess.holes import FillHoles
from kitseg.postprocess.intensity import RemoveLowHuTumors
from kitseg.postprocess.kidneys import KeepKidneys
from kitseg.postprocess.overlap import KeepTumorInKidney
from kitseg.postprocess.shape import KeepTumorShape, eigenvalue_ratios
from kitseg.types import Box, Masks

Mm = tuple[float, float, float]
Plain = Callable[[Masks, NDArray[Any], Mm], Masks]
ML: Mm = (10.0, 10.0, 10.0)  # a spacing where a voxel is 1 ml


def minus(masks: Masks, gone: Mask) -> Masks:
    return Masks(masks.foreground & ~gone, masks.tumor & ~gone)


def plain_kidneys(masks: Masks, hu: NDArray[Any], spacing: Mm) -> Masks:
    kept = plain_keep(masks.foreground, float(np.prod(spacing)) / 1000)
    return minus(masks, masks.foreground & ~kept)


def plain_dark(masks: Masks, hu: NDArray[Any], spacing: Mm) -> Masks:
    foreground, tumor = masks.foreground.copy(), masks.tumor.copy()
    kidney = masks.foreground & ~masks.tumor
    for part in parts_of(masks.tumor):
        if hu[part].mean() < 10:
            tumor[part] = False
            if not (ndimage.binary_dilation(part, FULL) & kidney).any():
                foreground[part] = False
    return Masks(foreground, tumor)


def plain_shape(masks: Masks, hu: NDArray[Any], spacing: Mm) -> Masks:
    tumor = masks.tumor.copy()
    for part in parts_of(masks.tumor):
        _, second, first = np.linalg.eigvalsh(np.cov(np.argwhere(part).T)) if part.sum() > 1 else (0, 0, 0)
        if part.sum() < 10 or not second > 1e-9 * first or not 1.07 <= first / second <= 2.8:
            tumor[part] = False
    return Masks(masks.foreground, tumor)


def plain_overlap(masks: Masks, hu: NDArray[Any], spacing: Mm) -> Masks:
    tumor = masks.tumor.copy()
    for part in parts_of(masks.tumor):
        if (part & masks.foreground).sum() / part.sum() < 0.95:
            tumor[part] = False
    return Masks(masks.foreground, tumor)


def plain_distance(masks: Masks, hu: NDArray[Any], spacing: Mm) -> Masks:
    either = masks.foreground | masks.tumor
    kidneys = plain_keep(either, float(np.prod(spacing)) / 1000)
    gone = np.zeros_like(either)
    for part in parts_of(either & ~kidneys):
        gone |= part & (cdist(np.argwhere(part) * spacing, np.argwhere(kidneys) * spacing).min() > 10)
    return minus(masks, gone)


def plain_fill(mask: Mask) -> Mask:
    """Dilation and erosion by looking at every voxel's neighbors, then a flood from outside in each slice."""
    offsets = [np.zeros(3, int), *np.eye(3, dtype=int), *-np.eye(3, dtype=int)]
    wide = np.pad(mask, 3)
    grown, closed = np.zeros_like(wide), np.zeros_like(wide)
    middle = list(np.ndindex(*(n - 2 for n in wide.shape)))
    for at in middle:
        grown[tuple(np.add(at, 1))] = any(wide[tuple(np.add(at, 1) + o)] for o in offsets)
    for at in middle:
        closed[tuple(np.add(at, 1))] = all(grown[tuple(np.add(at, 1) + o)] for o in offsets)
    for plane in closed:
        open_, todo = np.zeros_like(plane), [(0, 0)]
        while todo:
            y, x = todo.pop()
            if 0 <= y < plane.shape[0] and 0 <= x < plane.shape[1] and not plane[y, x] and not open_[y, x]:
                open_[y, x] = True
                todo += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
        plane[...] = ~open_
    return closed[3:-3, 3:-3, 3:-3]


def plain_holes(masks: Masks, hu: NDArray[Any], spacing: Mm) -> Masks:
    return Masks(plain_fill(masks.foreground), plain_fill(masks.tumor))


EVERY: list[tuple[Prior, Plain]] = [
    (KeepKidneys(), plain_kidneys),
    (FillHoles(), plain_holes),
    (KeepTumorShape(), plain_shape),
    (KeepTumorInKidney(), plain_overlap),
    (RemoveLowHuTumors(), plain_dark),
    (RemoveDistant(), plain_distance),
]
priors = pytest.mark.parametrize(("prior", "plain"), EVERY, ids=[type(prior).__name__ for prior, _ in EVERY])


def same(found: Masks, expected: Masks) -> None:
    for one, other in ((found.foreground, expected.foreground), (found.tumor, expected.tumor)):
        assert one.dtype == np.bool_
        np.testing.assert_array_equal(one, other)


def blobs(rng: np.random.Generator, shape: tuple[int, int, int], count: int) -> Mask:
    """Boxes of any size, which may touch or overlap, and a sprinkle of single voxels."""
    mask = rng.random(shape) < rng.choice([0, 0.01])
    for _ in range(count):
        start = [int(rng.integers(0, n)) for n in shape]
        mask[tuple(slice(a, a + int(rng.integers(1, 6))) for a in start)] = True
    return mask


@st.composite
def scenes(draw: Any) -> tuple[Masks, NDArray[np.int16], Mm]:
    """Foreground and tumor that overlap as they like, a CT and a spacing."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (draw(st.integers(1, 9)), draw(st.integers(1, 10)), draw(st.integers(1, 14)))
    foreground = blobs(rng, shape, draw(st.integers(0, 5)))
    tumor = blobs(rng, shape, draw(st.integers(0, 3)))
    inside = draw(st.sampled_from(["as they like", "mostly inside", "inside"]))
    if inside != "as they like":
        foreground |= tumor & (rng.random(shape) < 0.97 if inside == "mostly inside" else True)
    spacing = draw(st.sampled_from([(10.0, 10.0, 10.0), (5.0, 3.0, 3.0), (2.5, 7.0, 9.0)]))
    return Masks(foreground, tumor), rng.integers(-60, 80, shape).astype(np.int16), spacing


@priors
@given(scene=scenes())
@settings(max_examples=60, deadline=None)
def test_a_prior_is_its_plain_version(prior: Prior, plain: Plain, scene: tuple[Masks, NDArray[np.int16], Mm]) -> None:
    masks, hu, spacing = scene
    before = Masks(masks.foreground.copy(), masks.tumor.copy())
    found = prior(masks, hu, spacing)
    same(masks, before)
    same(found, plain(masks, hu, spacing))


@priors
@given(scene=scenes())
@settings(max_examples=30, deadline=None)
def test_background_around_the_masks_makes_no_difference(
    prior: Prior, plain: Plain, scene: tuple[Masks, NDArray[np.int16], Mm]
) -> None:
    masks, hu, spacing = scene
    wide = prior(Masks(np.pad(masks.foreground, 3), np.pad(masks.tumor, 3)), np.pad(hu, 3), spacing)
    same(wide.crop(Box((3, 3, 3), tuple(n + 3 for n in hu.shape))), prior(masks, hu, spacing))
    assert (wide.either.sum(), wide.tumor.sum()) == (wide.either[3:-3, 3:-3, 3:-3].sum(), wide.tumor[3:-3].sum())


@priors
def test_nothing_stays_nothing(prior: Prior, plain: Plain) -> None:
    nothing = Masks(np.zeros((2, 3, 4), bool), np.zeros((2, 3, 4), bool))
    same(prior(nothing, np.zeros((2, 3, 4), np.int16), ML), nothing)


# --- masks --------------------------------------------------------------------------------------------


def test_labels_there_and_back() -> None:
    labels = np.array([[[0, 1, 2, 1]]], np.uint8)
    masks = Masks.from_labels(labels)
    same(masks, Masks(np.array([[[False, True, True, True]]]), np.array([[[False, False, True, False]]])))
    assert masks.labels().dtype == np.uint8
    assert masks.labels().tolist() == labels.tolist()


def test_tumor_outside_the_foreground_is_tumor() -> None:
    masks = Masks(np.array([[[True, True, False, False]]]), np.array([[[False, True, True, False]]]))
    assert masks.labels().tolist() == [[[1, 2, 2, 0]]]


def test_masks_have_one_shape() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        Masks(np.zeros((1, 2, 3), bool), np.zeros((1, 2, 2), bool))


# --- kidneys ---------------------------------------------------------------------------------------------------------


def test_tumor_goes_with_its_kidney_and_stays_without_one() -> None:
    tumor = np.zeros((5, 5, 100), bool)
    tumor[0, 0, 40:50] = tumor[4, 4, 2] = tumor[2, 2, 7] = True
    found = KeepKidneys()(Masks(two_rows(8), tumor), np.zeros(tumor.shape), ML)
    np.testing.assert_array_equal(found.foreground, two_rows(0))
    tumor[4, 4, 2] = False
    np.testing.assert_array_equal(found.tumor, tumor)


def test_a_false_tumor_takes_no_kidneys_place() -> None:
    foreground, hu = two_rows(30), np.zeros((5, 5, 100))
    foreground[2, 2, :20] = True  # the only kidney: the rows of 100 and 30 voxels are tumor
    masks = Masks(foreground, two_rows(30))
    assert KeepKidneys(most=1)(masks, hu, ML).foreground.sum() == 100
    found = KeepKidneys(most=1, by_tissue=True)(masks, hu, ML)
    assert (found.foreground.sum(), found.tumor.sum()) == (20, 0)


@pytest.mark.parametrize(("least", "stays"), [(0.0, [100, 0]), (0.65, [100, 0]), (0.75, [0, 4]), (0.85, [0, 0])])
def test_an_improbable_part_is_no_kidney(least: float, stays: list[int]) -> None:
    """Rows of 100 and 4 voxels (less than 5 %) with mean probabilities of 0.7 and 0.8."""
    foreground, hu = two_rows(4), np.zeros((5, 5, 100))
    background = np.full(foreground.shape, 0.9, np.float16)
    background[0, 0, :50], background[0, 0, 50:] = 0.1, 0.5
    background[4, 4, :2], background[4, 4, 2:4] = 0.0, 0.4
    masks = Masks(foreground, foreground & (np.arange(100) < 2), probabilities={"background": background})
    found = KeepKidneys(min_ml=0, min_probability=least)(masks, hu, ML)
    assert [int(found.foreground[row, row].sum()) for row in (0, 4)] == stays
    assert [int(found.tumor[row, row].sum()) for row in (0, 4)] == [min(n, 2) for n in stays]
    for unknown in (replace(masks, probabilities={}), replace(masks, probabilities={"kidney": 1 - background})):
        kept = KeepKidneys(min_ml=0, min_probability=least)(unknown, hu, ML)
        np.testing.assert_array_equal(kept.foreground, two_rows(0))


@pytest.mark.parametrize("turn", [1, -1])
@pytest.mark.parametrize(("gap", "kept"), [(math.inf, "abc"), (130.0, "ab"), (70.0, "ab"), (69.0, "a")])
def test_kidneys_lie_beside_each_other(gap: float, kept: str, turn: int) -> None:
    """A kidney in slices 0 to 8, another in slice 16, 70 mm away, and a larger bag of tumor from slice 30 on."""
    foreground, parts = np.zeros((40, 5, 20), bool), {"a": slice(0, 9), "b": slice(16, 17), "c": slice(30, 40)}
    foreground[parts["a"], 0, :10] = foreground[parts["b"], 4] = foreground[parts["c"], 1:4] = True
    tumor = foreground & (np.arange(40) >= 30)[:, None, None]
    step = KeepKidneys(most=3, by_tissue=True, min_ml=0, min_ratio=0, max_gap=gap)
    found = step(Masks(foreground[::turn], tumor[::turn]), np.zeros(foreground.shape), (10.0, 1.0, 1.0))
    assert "".join(name for name, part in parts.items() if found.foreground[::turn][part].any()) == kept
    assert bool(found.tumor.any()) == ("c" in kept)


def test_what_was_removed_takes_no_kidneys_place() -> None:
    sizes, tissue = np.array([0, 5, 0, 4]), np.array([0.0, 5.0, 9.0, 1.0])
    assert kidneys_among(sizes, 1.0, 2, 0.0, 0.0, tissue).tolist() == [False, True, False, True]


def test_no_kidney_has_no_distance() -> None:
    empty = np.zeros((4, 4, 4), bool)
    assert not KeepKidneys(max_gap=10)(Masks(empty, empty), np.zeros(empty.shape), ML).foreground.any()


# --- tumors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hu", "kidney_at", "becomes"), [(9, (2, 2, 2), 1), (9, (3, 3, 3), 0), (10, (2, 2, 2), 2)])
def test_low_tumor_becomes_kidney_only_beside_it(hu: int, kidney_at: tuple[int, int, int], becomes: int) -> None:
    labels = np.zeros((4, 4, 4), np.uint8)
    labels[1, 1, 1], labels[kidney_at] = 2, 1
    cleaned = RemoveLowHuTumors()(Masks.from_labels(labels), np.full(labels.shape, hu, np.int16), ML).labels()
    assert (cleaned[1, 1, 1], cleaned[kidney_at]) == (becomes, 1)


def test_ct_must_have_the_masks_shape() -> None:
    with pytest.raises(ValueError, match="shape"):
        RemoveLowHuTumors()(Masks.from_labels(np.zeros((2, 2, 2), np.uint8)), np.zeros((2, 2, 3), np.int16), ML)


def bricks(*sizes: tuple[int, int, int]) -> Mask:
    """Bricks in a row along the columns, one voxel of background between them."""
    mask = np.zeros((20, 20, sum(size[2] + 1 for size in sizes)), bool)
    at = 0
    for z, y, x in sizes:
        mask[:z, :y, at : at + x] = True
        at += x + 1
    return mask


def test_ratios_by_hand() -> None:
    """An edge of n voxels has a variance of (n² − 1) / 12."""
    found = eigenvalue_ratios(Components.of(bricks((2, 4, 8), (3, 3, 3), (9, 1, 1), (5, 3, 1), (1, 1, 1))))
    assert found[1:].tolist() == pytest.approx([63 / 15, 1, np.inf, 24 / 8, np.inf])


def test_a_slanted_rod_is_a_rod() -> None:
    mask = np.zeros((12, 12, 12), bool)
    mask[range(12), range(12), range(12)] = True
    assert eigenvalue_ratios(Components.of(mask))[1] == np.inf


@pytest.mark.parametrize(
    ("size", "stays"),
    [((3, 4, 5), True), ((4, 4, 4), False), ((2, 4, 8), False), ((1, 3, 4), True), ((1, 2, 3), False)],
)
def test_shapes_of_tumors(size: tuple[int, int, int], stays: bool) -> None:
    """Ratios 24/15 and 15/8 are in the range, 1 and 63/15 are not; 8/3 is, but of 6 voxels."""
    tumor = bricks(size)
    found = KeepTumorShape()(Masks(tumor, tumor), np.zeros(tumor.shape), ML)
    np.testing.assert_array_equal(found.tumor, tumor & stays)
    np.testing.assert_array_equal(found.foreground, tumor)


@pytest.mark.parametrize(("least", "stays"), [(10, True), (11, False)])
def test_ten_voxels_have_a_shape(least: int, stays: bool) -> None:
    tumor = bricks((1, 2, 5))
    found = KeepTumorShape(high=9, min_voxels=least)(Masks(tumor, tumor), np.zeros(tumor.shape), ML)
    assert found.tumor.any() == stays


@pytest.mark.parametrize("inside", [18, 19, 20])
def test_a_tumor_overlaps_by_19_in_20(inside: int) -> None:
    tumor, foreground = np.zeros((3, 3, 24), bool), np.zeros((3, 3, 24), bool)
    tumor[1, 1, 2:22] = True
    foreground[1, 1, 2 : 2 + inside] = True
    found = KeepTumorInKidney()(Masks(foreground, tumor), np.zeros(tumor.shape), ML)
    assert found.tumor.any() == (inside >= 19)
    np.testing.assert_array_equal(found.foreground, foreground)


# --- holes -----------------------------------------------------------------------------------------------------------


def test_a_ring_in_one_slice_is_filled_where_the_next_slice_is_open() -> None:
    mask = np.zeros((2, 7, 7), bool)
    mask[0, 1:6, 1:6] = True
    mask[0, 2:5, 2:5] = False
    found = FillHoles()(Masks(mask, np.zeros_like(mask)), np.zeros(mask.shape), ML)
    assert found.foreground[0].sum() == 25
    assert not found.foreground[1].any()
    assert not found.tumor.any()


def test_a_gap_of_one_voxel_closes_and_borders_keep_their_voxels() -> None:
    mask = np.ones((3, 3, 5), bool)
    mask[:, :, 2] = False
    found = FillHoles()(Masks(mask, mask), np.zeros(mask.shape), ML)
    assert found.foreground[1, 1, 2]
    assert (found.foreground | ~mask).all()


@given(scene=scenes())
@settings(max_examples=30, deadline=None)
def test_filled_tumors_stay_in_the_filled_foreground(scene: tuple[Masks, NDArray[np.int16], Mm]) -> None:
    masks, hu, spacing = scene
    found = FillHoles()(Masks(masks.either, masks.tumor), hu, spacing)
    assert not (found.tumor & ~found.foreground).any()
    assert not (masks.tumor & ~found.tumor).any()


# --- distance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("apart", "stays"), [((2, 0, 0), True), ((3, 0, 0), False), ((0, 0, 10), True), ((0, 7, 8), False)]
)
def test_ten_millimetres(apart: tuple[int, int, int], stays: bool) -> None:
    """A speck of tumor beside the corner of a kidney, on slices of 5 mm and pixels of 1 mm."""
    foreground, tumor = np.zeros((8, 30, 60), bool), np.zeros((8, 30, 60), bool)
    foreground[:3, :20, :40] = True
    at = (2 + apart[0], 19 + apart[1], 39 + apart[2])
    tumor[at] = True
    found = RemoveDistant()(Masks(foreground, tumor), np.zeros(tumor.shape), (5.0, 1.0, 1.0))
    assert found.tumor[at] == stays
    np.testing.assert_array_equal(found.foreground, foreground)


@pytest.mark.parametrize(("second", "stays"), [(19, False), (20, True)])
def test_a_speck_is_no_second_kidney(second: int, stays: bool) -> None:
    mask = two_rows(second)
    found = RemoveDistant(max_mm=10)(Masks(mask, np.zeros_like(mask)), np.zeros(mask.shape), ML)
    assert found.foreground[4].any() == stays
