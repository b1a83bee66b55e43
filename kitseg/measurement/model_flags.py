"""Flags about a model: how far its members agree, what it was trained on, what was not kept of what it outlines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kitseg.components import Components
from kitseg.labels import BACKGROUND, TUMOR
from kitseg.measurement.findings import KIDNEY_ML, Findings
from kitseg.measurement.flags import AMBER, RED, Flag
from kitseg.postprocess.certainty import contact_shares
from kitseg.types import Box, Geometry, ball_diameter

AGREEMENT = {
    "kidney": (0.90, 0.80),
    "tumor": (0.70, 0.40),
}  # Dice over all pairs; below: amber, red
NEAR_HU, FAR_HU = 20.0, 60.0  # outside the range in training: amber, red
SPACING_TOLERANCE = 0.1
REMOVED_ML, _NAMED = 5.0, 3  # of one part; parts in a sentence
_REMOVED = "Post-processing removed what may be a tumor: {}. Look at it."


@dataclass(frozen=True)
class TrainingDomain:
    """The ranges (lowest, highest) of a model's training cases.

    slice_mm: slice spacing; pixel_mm: pixel spacing; kidney_hu: median HU of the parenchyma; aorta_hu: HU of the
    detected aorta, None if it was not found; tumor_mm: diameters of spheres with the volumes of each case's largest
    tumor, None if unknown.
    """

    slice_mm: tuple[float, float]
    pixel_mm: tuple[float, float]
    kidney_hu: tuple[float, float]
    aorta_hu: tuple[float, float] | None
    tumor_mm: tuple[float, float] | None = None


@dataclass(frozen=True)
class Outlined:
    """What networks outline: the tumor before post-processing (d, h, w) in the box of the scan with all that they find.

    Where the foreground reaches a side of the box, it is a border of what the last network was given; of several
    networks, the box is the union of theirs.
    """

    tumor: NDArray[np.bool_]
    region: Box


def removed_flags(labels: NDArray[np.uint8], outlined: Outlined, geometry: Geometry) -> Iterator[Flag]:
    """Parts of the tumor of which post-processing leaves nothing, where they are large or touch what is left."""
    kept, found = labels[outlined.region.slices], Components.of(outlined.tumor)
    gone = (found.sizes * geometry.voxel_ml >= REMOVED_ML) & (found.total(kept == TUMOR) == 0)
    if not gone.any():
        return
    parts = Components.of(found.chosen(gone))
    ml = parts.sizes * geometry.voxel_ml
    flagged = np.flatnonzero((ml >= KIDNEY_ML) | (contact_shares(parts, kept != BACKGROUND) > 0))
    if not flagged.size:
        return
    first, named = outlined.region.start[0] + parts.box.start[0] + 1, []
    for number in sorted(flagged, key=lambda number: -ml[number])[:_NAMED]:
        middle = int((parts.numbers == number).sum(axis=(1, 2)).argmax())
        named.append(f"{ml[number]:.0f} ml (slice {first + middle} from the head)")
    named += [f"and {flagged.size - _NAMED} more"] if flagged.size > _NAMED else []
    yield Flag("removed-tumor", AMBER, _REMOVED.format(", ".join(named)))


def agreement_flags(agreement: Mapping[str, float]) -> Iterator[Flag]:
    """Classes on which an ensemble's members disagree."""
    for name, (amber, red) in AGREEMENT.items():
        dice = agreement.get(name, math.nan)
        if dice < amber:  # False for NaN
            least = red if dice < red else amber
            reason = f"The ensemble's members agree on the {name} with a Dice of only {dice:.2f}, below {least:.2f}."
            yield Flag(f"{name}-agreement", RED if dice < red else AMBER, reason)


def phase_flags(
    kidney: float | None, aorta: float | None, phase: str | None, training_domain: TrainingDomain
) -> Iterator[Flag]:
    """Contrast outside the range of the training cases, which makes the tumor labels unreliable."""
    pairs = (("kidney", kidney, training_domain.kidney_hu), ("aorta", aorta, training_domain.aorta_hu))
    outside = {name: (hu, span) for name, hu, span in pairs if hu is not None and span and _beyond(hu, span) > NEAR_HU}
    if outside:
        worst = max(_beyond(hu, span) for hu, span in outside.values())
        figures = "; ".join(
            f"{name} at {hu:.0f} HU, {low:.0f} to {high:.0f} HU in training"
            for name, (hu, (low, high)) in outside.items()
        )
        seen = f"phase appears to be {phase}" if phase else "differs from training"
        reason = f"The contrast {seen} ({figures}): the tumor labels are unreliable."
        yield Flag("phase", RED if worst > FAR_HU else AMBER, reason)


def spacing_flags(geometry: Geometry, training_domain: TrainingDomain) -> Iterator[Flag]:
    """Voxel sizes outside the range of the training cases."""
    slices, *pixels = geometry.spacing
    spans = (("slices", (slices,), training_domain.slice_mm), ("pixels", pixels, training_domain.pixel_mm))
    for name, values, (low, high) in spans:
        smallest, largest = low * (1 - SPACING_TOLERANCE), high * (1 + SPACING_TOLERANCE)
        if strange := [value for value in values if not smallest <= value <= largest]:
            reason = f"The {name} are {strange[0]:.2f} mm apart"
            yield Flag("spacing", AMBER, f"{reason}; in training they were {low:.2f} to {high:.2f} mm apart.")


def tumor_size_flags(findings: Findings, training_domain: TrainingDomain) -> Iterator[Flag]:
    """A tumor larger than those of the training, where their sizes are known; by the sphere of its volume."""
    volumes = [lesion.volume_ml for lesion in findings.lesions if lesion.kind == "tumor"]
    mm = ball_diameter(max(volumes, default=0.0))
    if training_domain.tumor_mm and mm > training_domain.tumor_mm[1] * (1 + SPACING_TOLERANCE):
        low, high = training_domain.tumor_mm
        seen = f"in training they had {low:.0f} to {high:.0f} mm"
        yield Flag("tumor-size", AMBER, f"The largest tumor has the volume of a sphere of {mm:.0f} mm; {seen}.")


def _beyond(value: float, span: tuple[float, float]) -> float:
    """The distance of a value to a range; 0 inside it."""
    return max(span[0] - value, value - span[1], 0.0)
