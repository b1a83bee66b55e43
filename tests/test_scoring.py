"""The KiTS19 score against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from kitseg.scoring.kits19 import dice, kits19_scores, mean_scores


def labels(*values: int) -> np.ndarray:
    """A (2, 1, n/2) label map."""
    return np.array(values, np.uint8).reshape(2, 1, -1)


def test_dice_by_hand() -> None:
    pred = np.array([1, 1, 1, 0, 0], bool)
    ref = np.array([0, 1, 1, 1, 1], bool)
    assert dice(pred, ref) == 2 * 2 / (3 + 4)


@pytest.mark.parametrize(("pred", "ref", "expected"), [(0, 0, 1.0), (1, 0, 0.0), (0, 1, 0.0), (1, 1, 1.0)])
def test_dice_of_empty_and_full(pred: int, ref: int, expected: float) -> None:
    shape = (2, 3, 4)
    assert dice(np.full(shape, pred, bool), np.full(shape, ref, bool)) == expected


def test_scores_by_hand() -> None:
    # kidney: 4 of 4 predicted against 5 in the reference, 3 shared; tumor: 2 against 1, 1 shared
    scores = kits19_scores(labels(1, 1, 2, 2, 0, 0, 0, 0), labels(0, 1, 1, 2, 1, 1, 0, 0))
    assert scores == {"kidney": 2 * 3 / (4 + 5), "tumor": 2 * 1 / (2 + 1)}


def test_kidney_holds_the_tumor() -> None:
    assert kits19_scores(labels(1, 1, 1, 1), labels(1, 1, 2, 2)) == {"kidney": 1.0, "tumor": 0.0}


@pytest.mark.parametrize("other", [3, 7, 255])
def test_other_values_are_background_on_both_sides(other: int) -> None:
    clean, dirty = labels(1, 2, 0, 0), labels(1, 2, other, other)
    assert kits19_scores(dirty, clean) == kits19_scores(clean, dirty) == {"kidney": 1.0, "tumor": 1.0}
    assert kits19_scores(labels(other, 2, 0, 0), clean) == {"kidney": 2 / 3, "tumor": 1.0}


def test_nothing_against_nothing_and_something() -> None:
    nothing, tumor = labels(0, 0, 0, 0), labels(1, 2, 0, 0)
    assert kits19_scores(nothing, nothing) == {"kidney": 1.0, "tumor": 1.0}
    assert kits19_scores(nothing, tumor) == {"kidney": 0.0, "tumor": 0.0}
    assert kits19_scores(labels(1, 0, 0, 0), labels(1, 0, 0, 0)) == {"kidney": 1.0, "tumor": 1.0}


def test_scores_agree_with_whole_volume_masks() -> None:
    rng = np.random.default_rng(0)
    pred, ref = rng.integers(0, 4, (2, 130, 5, 6), dtype=np.uint8)
    scores = kits19_scores(pred, ref)
    assert scores == kits19_scores(np.asfortranarray(pred), ref)
    assert scores["kidney"] == dice(np.isin(pred, (1, 2)), np.isin(ref, (1, 2)))
    assert scores["tumor"] == dice(pred == 2, ref == 2)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="shape"):
        dice(np.ones((2, 3), bool), np.ones((1, 3), bool))
    with pytest.raises(ValueError, match=r"\(2, 1, 2\).*\(2, 1, 3\)"):
        kits19_scores(labels(0, 0, 0, 0), labels(0, 0, 0, 0, 0, 0))


def test_mean_is_per_score() -> None:
    cases = {"a": {"kidney": 1.0, "tumor": 0.0}, "b": {"kidney": 0.5, "tumor": 0.5}}
    assert mean_scores(cases) == {"kidney": 0.75, "tumor": 0.25}


def test_mean_needs_like_cases() -> None:
    with pytest.raises(ValueError, match="at least one case"):
        mean_scores({})
    with pytest.raises(ValueError, match="same scores"):
        mean_scores({"a": {"kidney": 1.0}, "b": {"kidney": 1.0, "tumor": 1.0}})
