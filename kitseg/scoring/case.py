"""All metrics of a case under a protocol: official scores, surface distances, volume errors and tumor detection."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kitseg.components import bounding_box
from kitseg.labels import TUMOR
from kitseg.scoring.detection import Detection, detect
from kitseg.scoring.kits19 import check_shapes, dice
from kitseg.scoring.protocols import Protocol, Target
from kitseg.scoring.surface import surfaces
from kitseg.types import Box

#: The metrics of a class by name; None if undefined, such as the distance to an empty mask.
Metrics = dict[str, float | None]
PERCENT = 95


@dataclass(frozen=True)
class CaseScore:
    """A case's metrics by class, and the detection of each tumor."""

    metrics: dict[str, Metrics]
    detection: Detection


def score(
    pred: NDArray[np.uint8],
    ref: NDArray[np.uint8],
    spacing: tuple[float, float, float],
    protocol: Protocol,
    convention: str,
) -> CaseScore:
    """Score a case's label maps (D, H, W) of a label convention by a protocol; spacing in mm along each axis.

    Metrics of a class: ``dice``; ``surface_dice`` if the protocol defines it; ``hd95_mm`` and ``assd_mm``, None if a
    mask is empty; ``volume_error_ml``, prediction - reference; ``volume_error_relative``, divided by the reference's
    volume, None if that is 0. Apart from the maps, time and memory depend on the bounding box of both foregrounds.

    Raises:
        ValueError: the shapes differ.
    """
    check_shapes(pred, ref)
    box = _foreground(pred).union(_foreground(ref))
    pred, ref = (protocol.adopt(labels[box.slices], convention) for labels in (pred, ref))
    metrics = {}
    for name, target in protocol.targets.items():
        metrics[name] = _metrics(pred, ref, spacing, target)
    return CaseScore(metrics, detect(pred == TUMOR, ref == TUMOR, spacing))


def _foreground(labels: NDArray[np.uint8]) -> Box:
    return bounding_box(labels != 0) or Box((0, 0, 0), (0, 0, 0))


def _metrics(
    pred: NDArray[np.uint8], ref: NDArray[np.uint8], spacing: tuple[float, float, float], target: Target
) -> Metrics:
    found, truth = target.mask(pred), target.mask(ref)
    metrics: Metrics = {"dice": dice(found, truth)}
    between = surfaces(found, truth, spacing)
    if target.tolerance_mm is not None:
        metrics["surface_dice"] = between.dice(target.tolerance_mm)
    metrics["hd95_mm"], metrics["assd_mm"] = between.hausdorff_mm(PERCENT), between.average_mm()
    there, error = np.count_nonzero(truth), np.count_nonzero(found) - np.count_nonzero(truth)
    metrics["volume_error_ml"] = error * float(np.prod(spacing)) / 1000
    metrics["volume_error_relative"] = error / there if there else None
    return metrics
