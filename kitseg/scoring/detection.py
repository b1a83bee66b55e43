"""Tumor detection: which reference tumors were found, and which predicted tumors are true."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import find_objects
from scipy.optimize import linear_sum_assignment

from kitseg.components import Components
from kitseg.measurement.diameters import axial_diameter
from kitseg.scoring.kits19 import check_shapes
from kitseg.scoring.strata import SIZES, size_of

MIN_IOU = 0.1
ALL = "all"


@dataclass(frozen=True)
class Tumor:
    """A tumor of a prediction or reference. diameter_mm: largest within a slice; matched: whether it has a match."""

    diameter_mm: float
    volume_ml: float
    matched: bool


@dataclass(frozen=True)
class Detection:
    """A case's reference and predicted tumors, in array order."""

    reference: tuple[Tumor, ...]
    predicted: tuple[Tumor, ...]


@dataclass(frozen=True)
class Tally:
    """Tumor counts over many cases. reference: in the references; found: of these; predicted; true: of these."""

    reference: int
    found: int
    predicted: int
    true: int

    @property
    def recall(self) -> float | None:
        """Fraction of the reference tumors that were found; None without reference tumors."""
        return self.found / self.reference if self.reference else None

    @property
    def precision(self) -> float | None:
        """Fraction of the predicted tumors that are true; None without predicted tumors."""
        return self.true / self.predicted if self.predicted else None


def detect(pred: NDArray[np.bool_], ref: NDArray[np.bool_], spacing: tuple[float, float, float]) -> Detection:
    """Match the tumors (26-connected components) of two masks (D, H, W).

    A tumor is found if a predicted tumor has an intersection over union of at least 0.1 with it, as in PI-CAI (Saha et
    al., Lancet Oncology 2024). The matching is one to one, with the maximum number of pairs and then the maximum
    overlap. Unmatched tumors are missed or false; of a tumor predicted in two pieces, one piece is false.

    Raises:
        ValueError: the shapes differ.
    """
    check_shapes(pred, ref)
    found, truth = Components.of(pred), Components.of(ref)
    iou = _overlaps(found, truth)
    rows, columns = linear_sum_assignment(np.where(iou >= MIN_IOU, min(iou.shape) + iou, 0), maximize=True)
    pairs = iou[rows, columns] >= MIN_IOU
    return Detection(_tumors(truth, columns[pairs], spacing), _tumors(found, rows[pairs], spacing))


def tally(detections: Iterable[Detection]) -> dict[str, Tally]:
    """Count the tumors of all cases, in total and by diameter (of predicted tumors, their own diameter)."""
    cases, counts = list(detections), {}
    sides = [t for case in cases for t in case.reference], [t for case in cases for t in case.predicted]
    for size in (ALL, *SIZES[1:]):
        truth, found = ([t.matched for t in side if size in (ALL, size_of(t.diameter_mm))] for side in sides)
        counts[size] = Tally(len(truth), sum(truth), len(found), sum(found))
    return counts


def _overlaps(found: Components, truth: Components) -> NDArray[np.float64]:
    """Intersection over union of each predicted (rows) with each reference component (columns)."""
    sizes, others = found.sizes[1:, None], truth.sizes[None, 1:]
    here, there = (np.zeros(c.shape, c.numbers.dtype) for c in (found, truth))
    here[found.box.slices], there[truth.box.slices] = found.numbers, truth.numbers
    both = (here > 0) & (there > 0)
    pairs = (here[both].astype(np.int64) - 1) * others.size + there[both] - 1
    shared = np.bincount(pairs, minlength=sizes.size * others.size).reshape(sizes.size, others.size)
    return np.asarray(shared / (sizes + others - shared))


def _tumors(
    components: Components, matched: NDArray[np.int64], spacing: tuple[float, float, float]
) -> tuple[Tumor, ...]:
    voxel_ml = float(np.prod(spacing)) / 1000
    boxes = find_objects(components.numbers) if components.sizes.size > 1 else []
    hits = set(matched.tolist())
    return tuple(
        Tumor(
            axial_diameter(components.numbers[box] == index + 1, spacing),
            int(components.sizes[index + 1]) * voxel_ml,
            index in hits,
        )
        for index, box in enumerate(boxes)
    )
