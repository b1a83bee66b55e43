"""Compare two methods on the same cases: paired score differences, their mean, its confidence interval and a test."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from kitseg.scoring.strata import in_order

FEWEST = 6  # cases or patients: with fewer, no two-sided signed-rank test can reach p < 0.05
LEVEL = 0.05
RESAMPLES = 9999
_DECIMALS = 12  # differences are rounded, so that 0.8 - 0.7 and 0.9 - 0.8 are equal
_EXACT = 50  # differences other than 0, up to which p is exact

Scores = Mapping[str, Mapping[str, float]]
Verdict = Literal["A", "B", "mixed", "none", "too few"]


@dataclass(frozen=True)
class Paired:
    """The comparison of the scores of B and A on the same cases.

    differences: (n,) B - A; low, high: 95 % confidence interval of their mean; p: two-sided. The last three are None
    for fewer than ``FEWEST`` differences.
    """

    mean_a: float
    mean_b: float
    differences: NDArray[np.float64]
    low: float | None = None
    high: float | None = None
    p: float | None = None

    @property
    def n(self) -> int:
        """Differences."""
        return len(self.differences)

    @property
    def mean(self) -> float:
        """Mean difference, B - A."""
        return round(float(self.differences.mean()), _DECIMALS)

    @property
    def wins(self) -> int:
        """Number of cases where B is better."""
        return int(np.count_nonzero(self.differences > 0))

    @property
    def losses(self) -> int:
        """Number of cases where A is better."""
        return int(np.count_nonzero(self.differences < 0))

    @property
    def ties(self) -> int:
        """Number of cases with equal scores."""
        return self.n - self.wins - self.losses


@dataclass(frozen=True)
class PairedGroup:
    """A class over all cases (``kind`` and ``stratum`` are empty), or over those of one stratum of a kind.

    units: cases, or the patients that several of them show, in the order of ``paired.differences``; cases: how many;
    holm: the p value of a stratum, corrected for all strata's tests.
    """

    name: str
    kind: str
    stratum: str
    units: tuple[str, ...]
    cases: int
    paired: Paired
    holm: float | None = None

    @property
    def counted(self) -> str:
        """What each difference is of."""
        return "cases" if self.cases == len(self.units) else "patients"

    @property
    def p(self) -> float | None:
        """The p value to report: corrected for a stratum, uncorrected for a whole class."""
        return self.holm if self.kind else self.paired.p

    @property
    def verdict(self) -> Verdict:
        """The better method, if the interval, ``p`` and the number of better cases all agree.

        ``none`` if neither interval nor test shows a difference, ``mixed`` if they disagree.
        """
        paired, p = self.paired, self.p
        if paired.low is None or paired.high is None or p is None:
            return "too few"
        by_mean, by_rank = paired.low > 0 or paired.high < 0, p < LEVEL
        if not by_mean and not by_rank:
            return "none"
        if by_mean and by_rank and paired.mean * (paired.wins - paired.losses) > 0:
            return "B" if paired.mean > 0 else "A"
        return "mixed"


def compare(a: Sequence[float], b: Sequence[float]) -> Paired:
    """Compare the scores of A and B, (n,) each, case by case.

    The interval of the mean difference is a BCa bootstrap (Efron 1987; percentiles if BCa is undefined) with a fixed
    seed. The test is Wilcoxon's signed-rank test with Pratt's (1959) treatment of zeros, because two methods often have
    equal scores on a case.

    Raises:
        ValueError: no scores, different numbers of scores, or one that isn't finite.
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError(f"paired scores are needed, not {first.shape} and {second.shape}")
    if not np.isfinite(first).all() or not np.isfinite(second).all():
        raise ValueError("a score is not finite")
    differences = np.round(second - first, _DECIMALS)
    paired = Paired(float(first.mean()), float(second.mean()), differences)
    if paired.n < FEWEST:
        return paired
    low, high = np.round(mean_interval(differences), _DECIMALS).tolist()
    return replace(paired, low=low, high=high, p=_signed_rank(differences))


def compare_cases(
    a: Scores, b: Scores, strata: Mapping[str, Mapping[str, str]], patients: Mapping[str, str]
) -> list[PairedGroup]:
    """Compare each class over the common cases, and in each stratum of each kind.

    a, b: scores by case and class; strata: stratum by case and kind; patients: of the cases, each its own by default.
    Interval and test need independent differences, so the cases of a group that show one patient are averaged first.
    The p values of all strata, over all classes and kinds, are corrected together by Holm's method. Empty if A and B
    have no class of a case in common.
    """
    names = dict.fromkeys(name for case in sorted(a.keys() & b.keys()) for name in a[case] if name in b[case])
    groups = [group for name in names for group in _groups(name, a, b, strata, patients)]
    corrected = iter(holm([group.paired.p for group in groups if group.kind]))
    return [replace(group, holm=next(corrected)) if group.kind else group for group in groups]


def mean_interval(values: NDArray[np.float64], units: Sequence[str] | None = None) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of (n,) values: BCa (Efron 1987), or percentiles if BCa is undefined.

    units: (n,) patients, whose values are resampled together; each value is one of its own by default.
    """
    of = np.arange(len(values)) if units is None else np.unique(units, return_inverse=True)[1]
    sums, counts = np.bincount(of, values), np.bincount(of)
    for method in ("BCa", "percentile"):
        with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)
            data, rng = (sums, counts), np.random.default_rng(0)
            found = stats.bootstrap(
                data, _mean, paired=True, n_resamples=RESAMPLES, method=method, random_state=rng
            ).confidence_interval
        if np.isfinite(found).all():
            break
    return float(found.low), float(found.high)


def _mean(sums: NDArray[np.float64], counts: NDArray[np.int_], axis: int = -1) -> NDArray[np.float64]:
    mean: NDArray[np.float64] = sums.sum(axis) / counts.sum(axis)
    return mean


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction (1979) of p values; None (not tested) remains None and is not counted.

    Valid for any dependence between the tests.
    """
    tested = sorted((p, index) for index, p in enumerate(ps) if p is not None)
    corrected: list[float | None] = [None] * len(ps)
    largest = 0.0
    for rank, (p, index) in enumerate(tested):
        largest = max(largest, min(1.0, p * (len(tested) - rank)))
        corrected[index] = largest
    return corrected


def _signed_rank(differences: NDArray[np.float64]) -> float:
    """The two-sided p of (n,) differences: exact if few of them are not 0, else by the normal approximation.

    Exact, because the approximation errs where nearly all cases are equal, whatever their number.
    """
    unequal = differences != 0
    if np.count_nonzero(unequal) > _EXACT:
        return float(stats.wilcoxon(differences, zero_method="pratt", method="asymptotic").pvalue)
    doubled = (2 * stats.rankdata(np.abs(differences))).astype(int)  # whole numbers, also for ties
    chances = np.ones(1)  # of each sum of the doubled ranks of positive differences
    for rank in doubled[unequal]:
        chances = (np.pad(chances, (0, rank)) + np.pad(chances, (rank, 0))) / 2
    from_middle = np.abs(2 * np.arange(len(chances)) - (len(chances) - 1))
    return float(chances[from_middle >= from_middle[doubled[differences > 0].sum()]].sum())


def _groups(
    name: str, a: Scores, b: Scores, strata: Mapping[str, Mapping[str, str]], patients: Mapping[str, str]
) -> list[PairedGroup]:
    cases = [case for case in sorted(a.keys() & b.keys()) if name in a[case] and name in b[case]]
    members: dict[tuple[str, str], list[str]] = {("", ""): cases}
    for kind in dict.fromkeys(kind for case in cases for kind in strata.get(case, {})):
        there = [case for case in cases if kind in strata.get(case, {})]
        for stratum in sorted({strata[case][kind] for case in there}, key=in_order):
            part = [case for case in there if strata[case][kind] == stratum]
            if len(part) < len(cases):
                members[kind, stratum] = part
    groups = []
    for (kind, stratum), part in members.items():
        shown: dict[tuple[bool, str], list[str]] = {}
        for case in part:
            shown.setdefault((case in patients, patients.get(case, case)), []).append(case)
        units = tuple(own[0] if len(own) == 1 else patient for (_, patient), own in shown.items())
        first, second = ([float(np.mean([of[c][name] for c in own])) for own in shown.values()] for of in (a, b))
        groups.append(PairedGroup(name, kind, stratum, units, len(part), compare(first, second)))
    return groups
