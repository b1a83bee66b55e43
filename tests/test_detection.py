"""Tumors matched one by one, on arrays that can be counted."""

from __future__ import annotations

import numpy as np
import pytest

from kitseg.scoring.detection import ALL, Detection, Tally, Tumor, detect, tally

SPACING = (5.0, 1.0, 1.0)


def mask(*bars: tuple[int, int]) -> np.ndarray:
    """Bars along the columns of one row of a slice: start and stop."""
    made = np.zeros((3, 4, 40), bool)
    for start, stop in bars:
        made[1, 1, start:stop] = True
    return made


def matched(pred: np.ndarray, ref: np.ndarray) -> tuple[list[bool], list[bool]]:
    found = detect(pred, ref, SPACING)
    return [tumor.matched for tumor in found.predicted], [tumor.matched for tumor in found.reference]


def test_one_found_one_missed_one_false() -> None:
    assert matched(mask((0, 10), (30, 35)), mask((2, 12), (20, 25))) == ([True, False], [True, False])


@pytest.mark.parametrize(("overlap", "expected"), [(2, True), (1, False)])
def test_a_tenth_of_the_union_is_enough(overlap: int, expected: bool) -> None:
    # 2 shared of 20 in the union is exactly 0.1; 1 of 21 is less
    pred, ref = mask((0, 11)), mask((11 - overlap, 22 - overlap))
    assert matched(pred, ref) == ([expected], [expected])


def test_one_to_one_a_tumor_in_two_pieces_has_one_false_piece() -> None:
    assert matched(mask((0, 4), (5, 12)), mask((0, 12))) == ([False, True], [True])
    assert matched(mask((0, 12)), mask((0, 4), (5, 12))) == ([True], [False, True])


def test_as_many_pairs_as_possible_come_before_overlap() -> None:
    # the first prediction fits the second tumor best, but only it can have the first tumor
    pred, ref = mask((3, 14), (15, 18)), mask((0, 5), (6, 18))
    iou_best = 8 / 15
    assert iou_best > 2 / 14 > 0.1
    assert matched(pred, ref) == ([True, True], [True, True])


def test_each_pair_has_its_own_dice() -> None:
    # the first is exact, the second shares 6 of 10 and 12 voxels, the third is missed
    found = detect(mask((0, 8), (12, 22)), mask((0, 8), (16, 28), (35, 38)), SPACING)
    assert [tumor.dice for tumor in found.reference] == [1, pytest.approx(12 / 22), None]
    assert [tumor.dice for tumor in found.predicted] == [1, pytest.approx(12 / 22)]
    exact, shifted, missed = (tumor.surface_dice for tumor in found.reference)
    assert (exact, missed) == (1, None)
    assert 0.4 < shifted < 0.8  # the ends are apart by 4 and 6 mm
    total = tally([found])[ALL]
    assert (total.dice, total.surface_dice) == (pytest.approx((1 + 12 / 22) / 2), pytest.approx((1 + shifted) / 2))


def test_size_and_volume_of_a_tumor() -> None:
    (tumor,) = detect(mask((0, 31)), mask((0, 31)), SPACING).predicted
    assert tumor.diameter_mm == pytest.approx(30, abs=1)
    assert tumor.volume_ml == pytest.approx(31 * 5 / 1000)


def test_nothing_on_one_side_or_both() -> None:
    nothing, something = mask(), mask((0, 3))
    assert matched(nothing, nothing) == ([], [])
    assert matched(nothing, something) == ([], [False])
    assert matched(something, nothing) == ([False], [])
    with pytest.raises(ValueError, match="shape"):
        detect(nothing, nothing[1:], SPACING)


def test_counts_by_size() -> None:
    small, middle, large = (Tumor(mm, 1.0, matched) for mm, matched in ((40, True), (40.1, False), (70.1, True)))
    counts = tally([Detection((small, middle), (large,)), Detection((large,), (middle, middle))])
    assert counts[ALL] == Tally(3, 2, 3, 1)
    assert counts["up to 4 cm"] == Tally(1, 1, 0, 0)
    assert counts["4 to 7 cm"] == Tally(1, 0, 2, 0)
    assert counts["over 7 cm"] == Tally(1, 1, 1, 1)
    assert (counts[ALL].recall, counts[ALL].precision) == (2 / 3, 1 / 3)
    assert (counts["up to 4 cm"].recall, counts["up to 4 cm"].precision) == (1, None)
    assert tally([])[ALL].recall is None
