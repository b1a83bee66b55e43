"""Predictions of kidney function after surgery against its measured values, over patients.

docs/explanation/renal_function.md states the rules.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from kitseg.measurement.renal_function import CEILING

#: ``both`` is the mean of the first two; ``fitted`` a constant and a weight for each of them, out of fold.
FORMULAS = ("volume", "clinical", "both", "fitted")
LOW = 45.0  # the eGFR below which function after surgery is called poor
COVERAGE = 0.9
_FOLDS, _SAMPLES, _SEED = 10, 2000, 20
_LEAST = 10  # patients of each operation

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Agreement:
    """Of one formula: Pearson's r, mean absolute error, bias, and AUC for a value below 45 (NaN without any)."""

    r: float
    error: float
    bias: float
    auc: float


@dataclass(frozen=True)
class Difference:
    """A formula's figure minus another's, with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Study:
    """Predictions against measured values of n patients.

    measured: (n,); radical: (n,) bool; predicted: (n,) by formula; half_width: of the 90 % interval around ``both``,
    after radical and after partial nephrectomy; covered: the share of patients within it, out of fold.
    """

    measured: Values
    radical: NDArray[np.bool_]
    predicted: Mapping[str, Values]
    half_width: tuple[float, float]
    covered: float

    def groups(self) -> dict[str, NDArray[np.bool_]]:
        """All patients, and those of each operation."""
        return {"all": np.ones_like(self.radical), "radical": self.radical, "partial": ~self.radical}

    def agreement(self, formula: str, chosen: NDArray[np.bool_] | None = None) -> Agreement:
        """A formula's figures, of all patients or those chosen."""
        of = self.groups()["all"] if chosen is None else chosen
        measured, predicted = self.measured[of], self.predicted[formula][of]
        return Agreement(*(float(figure(measured, predicted)) for figure in _FIGURES.values()))

    def differences(self, formula: str, other: str) -> dict[str, Difference]:
        """A formula's figures minus another's (r, error and auc), over 2000 bootstrap samples of the patients."""
        return {
            name: self._difference(_FIGURES[name], self.predicted[formula], self.predicted[other])
            for name in ("r", "error", "auc")
        }

    def _difference(self, figure: Callable[[Values, Values], Values], one: Values, other: Values) -> Difference:
        def between(measured: Values, first: Values, second: Values, axis: int = -1) -> Values:
            return figure(measured, first) - figure(measured, second)

        data = self.measured, one, other
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # both formulas alike
            found = stats.bootstrap(
                data,
                between,
                n_resamples=_SAMPLES,
                paired=True,
                method="percentile",
                random_state=np.random.default_rng(_SEED),
            ).confidence_interval
        return Difference(float(between(*data)), float(found.low), float(found.high))


def study(measured: Values, radical: NDArray[np.bool_], volume: Values, clinical: Values) -> Study | None:
    """Compare the formulas on patients, in the order of their case ids; None with fewer than ten of an operation.

    Args:
        measured: (n,) new baseline eGFR, at most 90.
        radical: (n,) radical nephrectomies; the others are partial.
        volume: (n,) predictions of the volume formula.
        clinical: (n,) predictions of the clinical formula.
    """
    if min(radical.sum(), (~radical).sum()) < _LEAST:
        return None
    volume, clinical = np.clip(volume, 0, CEILING), np.clip(clinical, 0, CEILING)
    folds, both = _folds(radical), (volume + clinical) / 2
    errors = np.abs(both - measured)
    inside = [
        errors[n] <= conformal(errors[(folds != folds[n]) & (radical == radical[n])]) for n in range(measured.size)
    ]
    return Study(
        measured,
        radical,
        {"volume": volume, "clinical": clinical, "both": both, "fitted": _fitted(volume, clinical, measured, folds)},
        (conformal(errors[radical]), conformal(errors[~radical])),
        float(np.mean(inside)),
    )


def conformal(errors: Values, coverage: float = COVERAGE) -> float:
    """Half the width of a split-conformal interval: the ⌈(n + 1) × coverage⌉-th smallest of n absolute errors.

    The largest error where n is too small for the coverage (Lei et al., JASA 2018, algorithm 2).
    """
    rank = min(ceil((errors.size + 1) * coverage), errors.size)
    return float(np.sort(errors)[rank - 1])


def auc(measured: Values, predicted: Values) -> Values:
    """The share of pairs of a patient below 45 and one not below that the prediction puts in order; ties count half.

    By the ranks of the predictions (Mann and Whitney 1947), over the last axis; NaN without such a pair.
    """
    good = measured >= LOW
    n = good.sum(axis=-1)
    pairs = n * (measured.shape[-1] - n)
    ordered = (stats.rankdata(predicted, axis=-1) * good).sum(axis=-1) - n * (n + 1) / 2
    return np.asarray(np.where(pairs, ordered / np.maximum(pairs, 1), np.nan), np.float64)


def _correlation(measured: Values, predicted: Values) -> Values:
    """Pearson's r over the last axis."""
    one, other = (values - values.mean(axis=-1, keepdims=True) for values in (measured, predicted))
    product = (one * other).sum(axis=-1) / np.sqrt((one**2).sum(axis=-1) * (other**2).sum(axis=-1))
    return np.asarray(product, np.float64)


def _folds(radical: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Each patient's fold: those of each operation are dealt in turn."""
    folds = np.zeros(radical.size, np.int64)
    for operation in (radical, ~radical):
        folds[operation] = np.arange(operation.sum()) % _FOLDS
    return folds


def _fitted(volume: Values, clinical: Values, measured: Values, folds: NDArray[np.int64]) -> Values:
    """Least squares on both formulas, out of fold."""
    terms = np.stack([np.ones_like(volume), volume, clinical], axis=1)
    predicted = np.zeros_like(measured)
    for fold in range(_FOLDS):
        others = folds != fold
        predicted[~others] = terms[~others] @ np.linalg.lstsq(terms[others], measured[others], rcond=None)[0]
    return np.clip(predicted, 0, CEILING)


_FIGURES: Mapping[str, Callable[[Values, Values], Values]] = {
    "r": _correlation,
    "error": lambda measured, predicted: np.asarray(np.abs(predicted - measured).mean(axis=-1)),
    "bias": lambda measured, predicted: np.asarray((predicted - measured).mean(axis=-1)),
    "auc": auc,
}
