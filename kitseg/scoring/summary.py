"""Summary statistics over cases: mean, median and the mean's confidence interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kitseg.scoring.compare import FEWEST, mean_interval


@dataclass(frozen=True)
class Summary:
    """The summary of a metric over the cases where it is defined.

    cases: their number; undefined: number of the other cases; low, high: 95 % confidence interval of the mean, None for
    fewer than ``FEWEST`` patients.
    """

    cases: int
    undefined: int
    mean: float | None = None
    median: float | None = None
    low: float | None = None
    high: float | None = None


def summarize(
    cases: Sequence[Mapping[str, Mapping[str, float | None]]], patients: Sequence[str]
) -> dict[str, dict[str, Summary]]:
    """Summarize the metrics of each class over the cases, which all have the same classes and metrics.

    patients: of the cases; those of one are resampled together.
    """
    if not cases:
        return {}
    return {
        name: {metric: _summary([case[name][metric] for case in cases], patients) for metric in metrics}
        for name, metrics in cases[0].items()
    }


def _summary(scores: Sequence[float | None], patients: Sequence[str]) -> Summary:
    """Summarize one metric; the interval is the BCa bootstrap of ``kitseg.scoring.compare``, with its fixed seed."""
    known = [(score, patient) for score, patient in zip(scores, patients, strict=True) if score is not None]
    values, units = np.array([score for score, _ in known], np.float64), [patient for _, patient in known]
    undefined = len(scores) - values.size
    if not values.size:
        return Summary(0, undefined)
    low, high = mean_interval(values, units) if len(set(units)) >= FEWEST else (None, None)
    return Summary(values.size, undefined, float(values.mean()), float(np.median(values)), low, high)
