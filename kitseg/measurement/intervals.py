"""Intervals for volumes and diameters, from a model's errors on cases that it didn't learn from (split conformal).

Outlines are wrong by millimetres, whatever the size of what they enclose. So an error is a difference of diameters in
mm, reference minus prediction; that of a volume is the difference of the diameters of balls of these volumes.

Errors of one patient are alike, so that patients are counted, not errors: with n patients, each error has the weight
1 / (n + 1) over the number of its patient's errors, and what is left, 1 / (n + 1), counts as an error beyond either
end. The interval reaches to where more than 5 % of the weight lie at or beyond its end. It covers a figure, drawn from
a new patient's, with a probability of at least 90 %, if that patient is like these (Lee, Barber and Willett,
arXiv:2306.06342, 2023; with one error each, the k-th smallest and largest, k = ⌊0.05 (n + 1)⌋, of Vovk et al., 2005).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from kitseg.measurement.findings import Findings, Kidney, Lesion
from kitseg.measurement.followup import match
from kitseg.types import ball_diameter

LEVEL = 0.9
_ROUNDING = 1e-9
_VOLUMES = ("volume_ml", "parenchyma_ml")
QUANTITIES = (*_VOLUMES, "diameter_mm", "axial_mm")


@dataclass(frozen=True)
class SizeError:
    """An error of a quantity such as ``tumor volume_ml``: predicted diameter, and reference minus prediction."""

    quantity: str
    predicted_mm: float
    error_mm: float


@dataclass(frozen=True)
class ErrorRange:
    """The errors of a quantity: the interval's bounds in mm, their number, and the range of predicted diameters.

    patients: whose errors they are; 0 in files of versions that didn't count them.
    """

    low_mm: float
    high_mm: float
    count: int
    predicted_mm: tuple[float, float]
    patients: int = 0


@dataclass(frozen=True)
class Calibration:
    """The errors of a model by quantity, those of fewer than 19 patients left out; slice_mm: of the cases.

    level: part of the cases that an interval is to cover; cases: number of cases; models: names of the runs or bundles
    whose errors they are, empty where unknown.
    """

    level: float
    cases: int
    slice_mm: tuple[float, float]
    quantities: Mapping[str, ErrorRange]
    models: tuple[str, ...] = ()

    def interval(self, name: str, kind: str, value: float, slice_mm: float) -> tuple[float, float] | None:
        """The interval of a measured value, in its unit.

        None where it is outside of what was calibrated: its kind, its size (by more than the interval's width) or the
        slice distance (by more than 1 %).
        """
        found, size = self.quantities.get(f"{kind} {name}"), _diameter(name, value)
        if found is None or not 0.99 * self.slice_mm[0] <= slice_mm <= 1.01 * self.slice_mm[1]:
            return None
        beyond = found.high_mm - found.low_mm
        if not found.predicted_mm[0] - beyond <= size <= found.predicted_mm[1] + beyond:
            return None
        low, high = (max(size + error, 0.0) for error in (found.low_mm, found.high_mm))
        return (_value(name, low), _value(name, high))

    def of(self, part: Kidney | Lesion, slice_mm: float) -> dict[str, tuple[float, float] | None]:
        """The intervals of a kidney's or lesion's figures by their names."""
        values = {name: getattr(part, name) for name in QUANTITIES if hasattr(part, name)}
        return {name: self.interval(name, _kind(part), value, slice_mm) for name, value in values.items()}

    def of_all(self, found: Findings, slice_mm: float) -> tuple[dict[str, tuple[float, float] | None], ...]:
        """The intervals of a case's kidneys, then of its lesions."""
        parts: list[Kidney | Lesion] = [*found.kidneys, *found.lesions]
        return tuple(self.of(part, slice_mm) for part in parts)


def size_errors(found: Findings, truth: Findings, affine: NDArray[np.float64]) -> list[SizeError]:
    """The errors of a case's kidneys (by side) and lesions (those of one kind that lie on each other).

    Args:
        found: of the prediction.
        truth: of the reference, on the same grid.
        affine: of the grid.
    """
    kidneys = {kidney.side: kidney for kidney in truth.kidneys}
    pairs: list[tuple[Kidney | Lesion, Kidney | Lesion]] = [
        (kidney, kidneys[kidney.side]) for kidney in found.kidneys if kidney.side in kidneys
    ]
    centres = (np.array([lesion.centre for lesion in side.lesions]).reshape(-1, 3) for side in (found, truth))
    here, there = (points @ affine[:3, :3].T for points in centres)
    apart = cdist(here, there)
    ours, theirs = (np.array([lesion.kind for lesion in side.lesions], object) for side in (found, truth))
    one_kind = ours[:, None] == theirs[None]
    matches = match(np.where(one_kind, apart, np.inf), found.lesions, truth.lesions, 0.0)
    pairs += [(found.lesions[n], truth.lesions[m]) for n, m in matches.items()]
    return [
        SizeError(f"{_kind(one)} {name}", size, _diameter(name, getattr(other, name)) - size)
        for one, other in pairs
        for name in QUANTITIES
        if hasattr(one, name)
        for size in [_diameter(name, getattr(one, name))]
    ]


def calibrate(
    cases: Sequence[Iterable[SizeError]], slices_mm: Sequence[float], patients: Sequence[str] = ()
) -> Calibration:
    """The error ranges of cases, and the distances of their slices; ValueError without a case.

    patients: whose cases they are; empty where each is a patient of its own.
    """
    by_quantity: dict[str, dict[str, list[SizeError]]] = {}
    for case, patient in zip(cases, patients or map(str, range(len(cases))), strict=True):
        for error in case:
            by_quantity.setdefault(error.quantity, {}).setdefault(patient, []).append(error)
    ranges = {name: _range(list(errors.values())) for name, errors in sorted(by_quantity.items())}
    known = {name: found for name, found in ranges.items() if found}
    return Calibration(LEVEL, len(cases), (min(slices_mm), max(slices_mm)), known)


def _range(patients: Sequence[Sequence[SizeError]]) -> ErrorRange | None:
    """The interval's bounds from the errors of each patient; None for fewer than 19."""
    beyond = (1 - LEVEL) / 2 * (len(patients) + 1) - 1 + _ROUNDING  # in patients
    if beyond < 0:
        return None
    errors = np.array([error.error_mm for part in patients for error in part])
    weights = np.repeat([1 / len(part) for part in patients], [len(part) for part in patients])
    sizes = [error.predicted_mm for part in patients for error in part]
    low, high = _end(errors, weights, beyond), -_end(-errors, weights, beyond)
    return ErrorRange(low, high, errors.size, (min(sizes), max(sizes)), len(patients))


def _end(errors: NDArray[np.float64], weights: NDArray[np.float64], beyond: float) -> float:
    """The first of the errors, in their order, at which the sum of weights exceeds ``beyond``."""
    order = np.argsort(errors, kind="stable")
    return float(errors[order][np.searchsorted(np.cumsum(weights[order]), beyond, side="right")])


def _kind(part: Kidney | Lesion) -> str:
    return part.kind if isinstance(part, Lesion) else "kidney"


def _diameter(name: str, value: float) -> float:
    """A diameter in mm; of a volume in ml that of a ball."""
    return ball_diameter(value) if name in _VOLUMES else value


def _value(name: str, diameter: float) -> float:
    return diameter**3 * float(np.pi) / 6000 if name in _VOLUMES else diameter
