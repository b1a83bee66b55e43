"""Tumors kept by volume, probability and contact, checked by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kitseg.components import Components
from kitseg.postprocess.certainty import KeepCertainTumors, contact_shares
from kitseg.types import EARLIER_TUMOR, Masks

SPACING = (10.0, 10.0, 10.0)  # 1 ml a voxel


@pytest.fixture
def masks() -> Masks:
    """A kidney with a tumor of 8 ml inside it (probability 0.9) and one of 1 ml at its surface (0.4)."""
    foreground, tumor = np.zeros((12, 12, 12), np.bool_), np.zeros((12, 12, 12), np.bool_)
    foreground[1:10, 1:10, 1:10] = True
    tumor[4:6, 4:6, 4:6] = tumor[10, 5, 5] = True
    probability = np.where(tumor, 0.9, 0.1).astype(np.float16)
    probability[10, 5, 5] = 0.4
    return Masks(foreground | tumor, tumor, None, {"tumor": probability})


def test_contact_by_hand(masks: Masks) -> None:
    """All 56 voxels around the inner tumor are kidney, 9 of the 26 around the outer one."""
    shares = contact_shares(Components.of(masks.tumor), masks.foreground)
    assert shares == pytest.approx([0, 1, 9 / 26])


def test_at_the_border_of_the_array() -> None:
    whole = np.ones((2, 2, 2), np.bool_)
    assert contact_shares(Components.of(whole), whole)[1] == 0


@pytest.mark.parametrize(
    ("step", "kept"),
    [
        (KeepCertainTumors(), 9),
        (KeepCertainTumors(min_ml=1), 9),
        (KeepCertainTumors(min_ml=1.5), 8),
        (KeepCertainTumors(min_probability=0.5), 8),
        (KeepCertainTumors(min_contact=0.4), 8),
        (KeepCertainTumors(outer_contact=0.4, outer_probability=0.5), 8),
        (KeepCertainTumors(outer_contact=0.3, outer_probability=0.5), 9),
        (KeepCertainTumors(min_probability=0.5, outer_contact=0.4, outer_probability=0.3), 8),
        (KeepCertainTumors(min_probability=0.95, min_earlier=0, confirmed_probability=0.3), 0),
        (KeepCertainTumors(min_ml=9), 0),
        (KeepCertainTumors(min_probability=0.95, large_ml=8, confirmed_probability=0.85), 8),
        (KeepCertainTumors(min_probability=0.95, large_ml=8, confirmed_probability=0.92), 0),
        (KeepCertainTumors(min_probability=0.95, large_ml=8), 0),
        (KeepCertainTumors(min_probability=0.95, large_ml=8.5, confirmed_probability=0.85), 0),
        (KeepCertainTumors(min_contact=0.4, large_ml=1), 8),
        (KeepCertainTumors(min_contact=0.6, large_ml=0.125), 9),  # 0.15 for 1 ml
        (KeepCertainTumors(min_contact=0.6, large_ml=0.5), 8),  # 0.38
    ],
)
def test_what_is_kept(masks: Masks, step: KeepCertainTumors, kept: int) -> None:
    found = step(masks, np.zeros(masks.tumor.shape), SPACING)
    assert found.tumor.sum() == kept
    # a tumor inside becomes kidney, one at the surface background
    assert found.foreground.sum() == 729 + found.tumor[10, 5, 5]
    assert (found.tumor <= masks.tumor).all()


@pytest.mark.parametrize(
    ("step", "kept"),
    [
        (KeepCertainTumors(min_probability=0.95), 0),
        (KeepCertainTumors(min_probability=0.95, min_earlier=0.5, confirmed_probability=0.85), 8),
        (KeepCertainTumors(min_probability=0.95, min_earlier=0.5), 0),
        (KeepCertainTumors(min_probability=0.95, min_earlier=0.75, confirmed_probability=0.85), 0),
        (KeepCertainTumors(min_probability=0.95, min_earlier=0.5, confirmed_probability=0.92), 0),
        (KeepCertainTumors(min_probability=0.5, min_earlier=0.0, confirmed_probability=0.3), 9),
        (KeepCertainTumors(min_probability=0.3, min_earlier=0.5, confirmed_probability=0.92), 9),
        (KeepCertainTumors(outer_contact=0.4, outer_probability=0.5, min_earlier=0, confirmed_probability=0.3), 9),
    ],
)
def test_an_earlier_network_confirms(masks: Masks, step: KeepCertainTumors, kept: int) -> None:
    """Its probability of tumor is 0.5 in the mean in the inner one, and 0 in the outer one."""
    earlier = np.zeros(masks.tumor.shape, np.float16)
    earlier[4:6, 4:6, 4] = 1
    shown = replace(masks, probabilities={**masks.probabilities, EARLIER_TUMOR: earlier})
    assert step(shown, np.zeros(earlier.shape), SPACING).tumor.sum() == kept


def test_a_removed_tumor_becomes_what_is_next_probable(masks: Masks) -> None:
    """Of the tumor of eight voxels, four are rather kidney than background."""
    kidney = np.full(masks.tumor.shape, 0.3, np.float16)
    kidney[4, 4:6, 4:6] = 0.1
    known = {**masks.probabilities, "background": np.full(kidney.shape, 0.2, np.float16), "kidney": kidney}
    found = KeepCertainTumors(min_ml=9)(replace(masks, probabilities=known), np.zeros(kidney.shape), SPACING)
    assert (found.tumor.sum(), found.foreground.sum()) == (0, 730 - 4)


def test_fluid_beside_a_kidney_does_not_become_kidney(masks: Masks) -> None:
    """A cyst is the second most probable class of both removed tumors: only the one inside the kidney stays with it."""
    level = {"background": 0.2, "kidney": 0.1, "cyst": 0.3}
    known = {name: np.full(masks.tumor.shape, value, np.float16) for name, value in level.items()}
    shown = replace(masks, probabilities={**masks.probabilities, **known})
    found = KeepCertainTumors(min_ml=9)(shown, np.zeros(masks.tumor.shape), SPACING)
    assert (found.tumor.sum(), found.foreground.sum()) == (0, 729)


def test_small_cysts_become_kidney(masks: Masks) -> None:
    cyst = np.zeros(masks.tumor.shape, np.bool_)
    cyst[2, 2, 2:4] = cyst[8, 8, 8] = True
    found = KeepCertainTumors(min_cyst_ml=2)(replace(masks, cyst=cyst), np.zeros(cyst.shape), SPACING)
    assert found.cyst is not None
    assert (found.cyst.sum(), found.foreground.sum(), found.tumor.sum()) == (2, 730, 9)


def test_masks_without_probabilities(masks: Masks) -> None:
    bare = Masks(masks.foreground, masks.tumor)
    assert KeepCertainTumors(min_probability=0.99)(bare, np.zeros(bare.tumor.shape), SPACING).tumor.sum() == 9


def test_no_tumor(masks: Masks) -> None:
    none = Masks(masks.foreground, np.zeros_like(masks.tumor))
    assert KeepCertainTumors(min_ml=1)(none, np.zeros(none.tumor.shape), SPACING) is none
