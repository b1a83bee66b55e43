"""Tumor detection: which reference tumors were found, how well, and which predicted tumors are true."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import find_objects
from scipy.optimize import linear_sum_assignment

from kitseg.components import Components
from kitseg.measurement.diameters import axial_diameter
from kitseg.scoring.kits19 import check_shapes
from kitseg.scoring.strata import SIZES, size_of
from kitseg.scoring.surface import surfaces

MIN_IOU = 0.1
TOLERANCE_MM = 1.1498198361434828  # of surface Dice: KiTS23's for tumors (Heller et al., arXiv 2307.01984)
ALL = "all"


@dataclass(frozen=True)
class Tumor:
    """A tumor of a prediction or reference.

    diameter_mm: largest within a slice; matched: whether it has a match; dice, surface_dice: with that match, None
    without one.
    """

    diameter_mm: float
    volume_ml: float
    matched: bool
    dice: float | None = None
    surface_dice: float | None = None


@dataclass(frozen=True)
class Detection:
    """A case's reference and predicted tumors, in array order."""

    reference: tuple[Tumor, ...]
    predicted: tuple[Tumor, ...]


@dataclass(frozen=True)
class Tally:
    """Tumor counts over many cases. reference: in the references; found: of these; predicted; true: of these.

    dice, surface_dice: the mean over the tumors found, None without any.
    """

    reference: int
    found: int
    predicted: int
    true: int
    dice: float | None = None
    surface_dice: float | None = None

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
    overlap. Unmatched tumors are missed or false; of a tumor predicted in two pieces, one piece is false. Each pair has
    its own Dice and surface Dice (tolerance 1.15 mm).

    Raises:
        ValueError: the shapes differ.
    """
    check_shapes(pred, ref)
    found, truth = Components.of(pred), Components.of(ref)
    iou = _overlaps(found, truth)
    rows, columns = linear_sum_assignment(np.where(iou >= MIN_IOU, min(iou.shape) + iou, 0), maximize=True)
    pairs = [(int(n), int(m)) for n, m in zip(rows, columns, strict=True) if iou[n, m] >= MIN_IOU]
    scores = [(float(2 * iou[n, m] / (1 + iou[n, m])), _surface_dice(found, n, truth, m, spacing)) for n, m in pairs]
    theirs = {m: score for (_, m), score in zip(pairs, scores, strict=True)}
    ours = {n: score for (n, _), score in zip(pairs, scores, strict=True)}
    return Detection(_tumors(truth, theirs, spacing), _tumors(found, ours, spacing))


def tally(detections: Iterable[Detection]) -> dict[str, Tally]:
    """Count the tumors of all cases, in total and by diameter (of predicted tumors, their own diameter)."""
    cases, counts = list(detections), {}
    sides = [t for case in cases for t in case.reference], [t for case in cases for t in case.predicted]
    for size in (ALL, *SIZES[1:]):
        truth, found = ([t for t in side if size in (ALL, size_of(t.diameter_mm))] for side in sides)
        hits = (sum(t.matched for t in side) for side in (truth, found))
        means = (_mean([getattr(t, key) for t in truth]) for key in ("dice", "surface_dice"))
        counts[size] = Tally(len(truth), next(hits), len(found), next(hits), *means)
    return counts


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _overlaps(found: Components, truth: Components) -> NDArray[np.float64]:
    """Intersection over union of each predicted (rows) with each reference component (columns)."""
    sizes, others = found.sizes[1:, None], truth.sizes[None, 1:]
    here, there = (np.zeros(c.shape, c.numbers.dtype) for c in (found, truth))
    here[found.box.slices], there[truth.box.slices] = found.numbers, truth.numbers
    both = (here > 0) & (there > 0)
    pairs = (here[both].astype(np.int64) - 1) * others.size + there[both] - 1
    shared = np.bincount(pairs, minlength=sizes.size * others.size).reshape(sizes.size, others.size)
    return np.asarray(shared / (sizes + others - shared))


def _surface_dice(found: Components, n: int, truth: Components, m: int, spacing: tuple[float, float, float]) -> float:
    """Surface Dice of a predicted and a reference component, by their indices."""
    box = found.box.union(truth.box)
    one, other = np.zeros(box.size, np.bool_), np.zeros(box.size, np.bool_)
    one[found.box.moved(box.start).slices] = found.numbers == n + 1
    other[truth.box.moved(box.start).slices] = truth.numbers == m + 1
    return surfaces(one, other, spacing).dice(TOLERANCE_MM)


def _tumors(
    components: Components, matches: Mapping[int, tuple[float, float]], spacing: tuple[float, float, float]
) -> tuple[Tumor, ...]:
    """The tumors of a mask; matches: Dice and surface Dice of those with a match, by index."""
    voxel_ml = float(np.prod(spacing)) / 1000
    boxes = find_objects(components.numbers) if components.sizes.size > 1 else []
    return tuple(
        Tumor(
            axial_diameter(components.numbers[box] == index + 1, spacing),
            int(components.sizes[index + 1]) * voxel_ml,
            index in matches,
            *matches.get(index, (None, None)),
        )
        for index, box in enumerate(boxes)
    )
