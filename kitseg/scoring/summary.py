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
    fewer than ``FEWEST`` cases.
    """

    cases: int
    undefined: int
    mean: float | None = None
    median: float | None = None
    low: float | None = None
    high: float | None = None


def summarize(cases: Sequence[Mapping[str, Mapping[str, float | None]]]) -> dict[str, dict[str, Summary]]:
    """Summarize the metrics of each class over the cases, which all have the same classes and metrics."""
    if not cases:
        return {}
    return {
        name: {metric: _summary([case[name][metric] for case in cases]) for metric in metrics}
        for name, metrics in cases[0].items()
    }


def _summary(scores: Sequence[float | None]) -> Summary:
    """Summarize one metric; the interval is the BCa bootstrap of ``kitseg.scoring.compare``, with its fixed seed."""
    values = np.array([score for score in scores if score is not None], np.float64)
    undefined = len(scores) - values.size
    if not values.size:
        return Summary(0, undefined)
    low, high = mean_interval(values) if values.size >= FEWEST else (None, None)
    return Summary(values.size, undefined, float(values.mean()), float(np.median(values)), low, high)
