"""The KiTS19 challenge's metrics: kidney Dice and tumor Dice of each case, and their means over the cases."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from kitseg.labels import KIDNEY, TUMOR

_SLAB = 64  # slices at a time: enough to be fast in Fortran order, as in a NIfTI file


def dice(pred: NDArray[np.bool_], ref: NDArray[np.bool_]) -> float:
    """Dice coefficient 2 |P ∩ R| / (|P| + |R|) of two masks of one shape; 1 if both are empty.

    Raises:
        ValueError: the shapes differ.
    """
    check_shapes(pred, ref)
    return _ratio(_overlap(pred, ref))


def kits19_scores(pred: NDArray[np.uint8], ref: NDArray[np.uint8]) -> dict[str, float]:
    """Dice of a case's label maps (D, H, W) as the KiTS19 server computes it.

    ``kidney`` is the Dice of labels 1 ∪ 2, ``tumor`` of label 2. Any other value is background, including 3: convert a
    kits23 label map first (``kitseg.labels.to_kits19``). Works in slabs, so it needs little memory besides the maps.

    Raises:
        ValueError: the shapes differ.
    """
    check_shapes(pred, ref)
    kidney, tumor = np.zeros(2, np.int64), np.zeros(2, np.int64)
    for first in range(0, len(ref), _SLAB):
        p, r = pred[first : first + _SLAB], ref[first : first + _SLAB]
        kidney += _overlap((p == KIDNEY) | (p == TUMOR), (r == KIDNEY) | (r == TUMOR))
        tumor += _overlap(p == TUMOR, r == TUMOR)
    return {"kidney": _ratio(kidney), "tumor": _ratio(tumor)}


def mean_scores(cases: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Mean of each score over the cases; ``cases`` maps a case id to its scores by name, the same names in each.

    Raises:
        ValueError: no cases, or cases with different scores.
    """
    scores = list(cases.values())
    if not scores or any(s.keys() != scores[0].keys() for s in scores):
        raise ValueError("the mean needs at least one case, and the same scores in every case")
    return {name: float(np.mean([s[name] for s in scores])) for name in scores[0]}


def _overlap(pred: NDArray[np.bool_], ref: NDArray[np.bool_]) -> NDArray[np.int64]:
    """|P ∩ R| and |P| + |R|."""
    return np.array([np.count_nonzero(pred & ref), np.count_nonzero(pred) + np.count_nonzero(ref)], np.int64)


def _ratio(overlap: NDArray[np.int64]) -> float:
    both, total = overlap.tolist()
    return 2 * both / total if total else 1.0


def check_shapes(pred: NDArray[np.generic], ref: NDArray[np.generic]) -> None:
    """Raise a ValueError if prediction and reference differ in shape."""
    if pred.shape != ref.shape:
        raise ValueError(f"prediction and reference differ in shape: {pred.shape} and {ref.shape}")
