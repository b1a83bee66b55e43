"""All metrics of a case under a protocol: official scores, surface distances, volume errors and tumor detection."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kitseg.components import bounding_box
from kitseg.labels import CYST, TUMOR, Scheme
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
    """A case's metrics by class, and the detection of each tumor and, where cysts are scored, of each cyst."""

    metrics: dict[str, Metrics]
    detection: Detection | None = None
    cysts: Detection | None = None


def score(
    pred: NDArray[np.uint8],
    ref: NDArray[np.uint8],
    spacing: tuple[float, float, float],
    protocol: Protocol,
    scheme: Scheme,
) -> CaseScore:
    """Score a case's label maps (D, H, W, kitseg's ids) by a protocol; spacing in mm along each axis.

    scheme: of the references; its regions are scored beside the protocol's classes.

    Metrics of a class: ``dice``; ``surface_dice`` if the protocol defines it; ``hd95_mm`` and ``assd_mm``, None if a
    mask is empty; ``volume_error_ml``, prediction - reference; ``volume_error_relative``, divided by the reference's
    volume, None if that is 0. Apart from the maps, time and memory depend on the bounding box of both foregrounds.

    Raises:
        ValueError: the shapes differ.
    """
    pred, ref = _to_compare(pred, ref, protocol, scheme)
    metrics = {}
    for name, target in {**protocol.targets, **protocol.more_targets(scheme)}.items():
        metrics[name] = _metrics(pred, ref, spacing, target)
    cysts = detect(pred == CYST, ref == CYST, spacing) if protocol.knows_cysts(scheme) else None
    return CaseScore(metrics, detect(pred == TUMOR, ref == TUMOR, spacing), cysts)


def dice_scores(
    pred: NDArray[np.uint8], ref: NDArray[np.uint8], protocol: Protocol, scheme: Scheme
) -> dict[str, float]:
    """Dice of a case's label maps by class, as ``score`` computes it, in a fraction of the time."""
    pred, ref = _to_compare(pred, ref, protocol, scheme)
    targets = {**protocol.targets, **protocol.more_targets(scheme)}
    return {name: dice(target.mask(pred), target.mask(ref)) for name, target in targets.items()}


def _to_compare(
    pred: NDArray[np.uint8], ref: NDArray[np.uint8], protocol: Protocol, scheme: Scheme
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The part of both label maps around their foregrounds, with the protocol's classes."""
    check_shapes(pred, ref)
    box = _foreground(pred).union(_foreground(ref))
    return protocol.adopt(pred[box.slices], scheme), protocol.adopt(ref[box.slices], scheme)


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
