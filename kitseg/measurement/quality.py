"""Quality control of a case: green, or amber and red flags with their reasons."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kitseg.components import SPECK_ML, Components
from kitseg.labels import BACKGROUND, KIDNEY, TUMOR
from kitseg.measurement.findings import KIDNEY_ML, Findings
from kitseg.measurement.flags import AMBER, RED, Flag, Quality
from kitseg.measurement.model_flags import (
    Outlined,
    TrainingDomain,
    agreement_flags,
    phase_flags,
    removed_flags,
    spacing_flags,
    tumor_size_flags,
)
from kitseg.measurement.phase import aorta_hu, contrast_phase, kidney_hu
from kitseg.measurement.sides import HOLD_ML
from kitseg.postprocess.distance import distances_mm
from kitseg.types import Box, Geometry, Triple

PARENCHYMA_ML = (50.0, 450.0)  # of one kidney
FAILED_ML = 800.0  # of one kidney's parenchyma: no kidney has so much
FAILED_HU = 0.0  # unenhanced parenchyma has 30 to 50 HU, fat -120 to -60
TUMOR_ML = 2000.0  # of all tumors
FAR_MM = 10.0
_CUT_OFF = (
    "Kidney or tumor reaches the edge of the scan ({}) and may be cut off: sizes are lower bounds, and what follows "
    "from them (size class, scores, function after surgery) may be wrong."
)
_REGION = (
    "Kidney or tumor reaches the border ({}) of the part of the scan that the last network was given: it may be cut "
    "off there, or be another organ."
)
_JOINED = (
    "One part of {:.0f} ml reaches to both sides, a horseshoe kidney or two kidneys that touch: it is measured as a "
    "right and a left kidney, cut where the parenchyma is thinnest."
)
BY_FRAME = "Without the scan, the only kidney's side is by the middle of the frame, which a cropped label map moves."
_OVER_FAT = "The kidney outlines lie over fat or air ({:.0f} HU): the segmentation has failed, or is of another scan."
#: The flags about what is labelled that figures can't show: the others are about a figure beside them.
_SHAPES = ("third-kidney", "joined-kidneys", "cut-off", "tumor-far", "kidney-hu")
BORDERS = (("top", "bottom"), ("front", "back"), ("right", "left"))  # first and last index of axes (I, P, L)


def assess(
    labels: NDArray[np.uint8],
    hu: NDArray[Any] | None,
    geometry: Geometry,
    findings: Findings,
    agreement: Mapping[str, float] | None,
    training_domain: TrainingDomain | None,
    outlined: Outlined | None = None,
) -> Quality:
    """The flags of a case, and its contrast phase; docs/explanation/quality.md has every rule with its threshold.

    Args:
        labels: (D, H, W), the case's label map in orientation (I, P, L).
        hu: the CT on the same grid; None without a CT, which leaves out the flags about contrast.
        geometry: of both.
        findings: the measurements of the label map.
        agreement: Dice of an ensemble's members, pooled over their pairs, 0 to 1, for ``kidney`` and ``tumor``;
            None for a single member.
        training_domain: the ranges of the model's training cases; None leaves out the flags about them.
        outlined: by networks, before post-processing; None where unknown.
    """
    parts = Parts.of(labels, geometry)
    kidney = aorta = None
    if hu is not None:
        kidney, aorta = kidney_hu(hu, labels), aorta_hu(hu, labels, geometry)
    failed = kidney is not None and kidney < FAILED_HU
    phase = None if failed else contrast_phase(kidney, aorta)
    flags = [
        *kidney_flags(findings, parts, hu is not None),
        *hu_flags(kidney),
        *tumor_flags(labels, geometry, parts, findings),
        *border_flags(parts),
        *volume_flags(findings),
        *agreement_flags(agreement or {}),
    ]
    if outlined is not None:
        flags += [*removed_flags(labels, outlined, geometry), *region_flags(parts, outlined.region)]
    if training_domain is not None:
        flags += [] if failed else phase_flags(kidney, aorta, phase, training_domain)
        flags += spacing_flags(geometry, training_domain)
        flags += tumor_size_flags(findings, training_domain)
    return Quality(tuple(flags), phase)


@dataclass(frozen=True)
class Parts:
    """The components of the foreground, with their volume and parenchyma in ml by number."""

    components: Components
    ml: NDArray[np.floating[Any]]
    parenchyma_ml: NDArray[np.floating[Any]]

    @classmethod
    def of(cls, labels: NDArray[np.uint8], geometry: Geometry) -> Parts:
        """Find the components of a label map (D, H, W)."""
        found = Components.of(labels != BACKGROUND)
        return cls(found, found.sizes * geometry.voxel_ml, found.total(labels == KIDNEY) * geometry.voxel_ml)


def kidney_flags(findings: Findings, parts: Parts, has_ct: bool) -> Iterator[Flag]:
    """No kidney, a single kidney, more components of a kidney's size than kidneys, or one that was cut into both.

    has_ct: whether a CT decided the side of a single kidney.
    """
    kidneys = findings.whole_kidneys
    large = parts.ml[(parts.ml >= KIDNEY_ML) & (parts.parenchyma_ml >= HOLD_ML)]
    sides = max((kidney.volume_ml for kidney in kidneys), default=0.0)
    joined = len(kidneys) == 2 and large.max(initial=0.0) > sides + KIDNEY_ML / 2
    if not kidneys:
        most = max((kidney.volume_ml for kidney in findings.kidneys), default=0.0)
        found = f"the largest candidate has {most:.1f} ml" if most else "no voxel is labelled kidney"
        yield Flag("no-kidney", RED, f"No kidney was found ({found}): the scan may not show the kidneys.")
    elif len(kidneys) == 1:
        only = kidneys[0]
        reason = f"Only a {only.side} kidney was found ({only.volume_ml:.0f} ml): a single kidney, or one was missed."
        yield Flag("single-kidney", AMBER, reason if has_ct else f"{reason} {BY_FRAME}")
    if kidneys and large.size + joined > len(kidneys):
        volumes = ", ".join(f"{ml:.0f}" for ml in sorted(large, reverse=True))
        reason = f"{large.size} separate parts are as large as a kidney ({volumes} ml): a side's figures are of two."
        yield Flag("third-kidney", RED, reason)
    if joined:
        yield Flag("joined-kidneys", AMBER, _JOINED.format(large.max()))


def hu_flags(kidney: float | None) -> Iterator[Flag]:
    """Outlines that are not on kidneys, by the HU of their parenchyma; None: unknown."""
    if kidney is not None and kidney < FAILED_HU:
        yield Flag("kidney-hu", RED, _OVER_FAT.format(kidney))


def tumor_flags(labels: NDArray[np.uint8], geometry: Geometry, parts: Parts, findings: Findings) -> Iterator[Flag]:
    """Tumors that don't touch a kidney; without a kidney, ``no-kidney`` covers them."""
    holds = parts.parenchyma_ml >= HOLD_ML
    tumor_ml = parts.components.total(labels == TUMOR) * geometry.voxel_ml
    alone = ~holds & (tumor_ml >= SPECK_ML)
    if not alone.any() or not holds.any() or not findings.whole_kidneys:
        return
    gap = distances_mm(parts.components, holds, geometry.spacing)[alone].max()
    reason = f"{tumor_ml[alone].sum():.1f} ml of tumor are separate from the kidneys, up to {gap:.0f} mm from them."
    yield Flag("tumor-far", RED if gap > FAR_MM else AMBER, reason)


def border_flags(parts: Parts) -> Iterator[Flag]:
    """Kidneys and tumors that reach an edge of the scan."""
    if cut := _reached(parts, (0, 0, 0), parts.components.shape):
        yield Flag("cut-off", AMBER, _CUT_OFF.format(", ".join(cut)))


def region_flags(parts: Parts, region: Box) -> Iterator[Flag]:
    """Kidneys and tumors that reach a border of the region in which networks looked, inside the scan."""
    edges = _reached(parts, (0, 0, 0), parts.components.shape)
    if cut := [name for name in _reached(parts, region.start, region.stop) if name not in edges]:
        yield Flag("region-border", AMBER, _REGION.format(", ".join(cut)))


def _reached(parts: Parts, start: Triple, stop: Triple) -> list[str]:
    """The sides of a box around all components that one of them, larger than a speck, reaches."""
    found, visible, names = parts.components, parts.ml >= SPECK_ML, []
    for axis, sides in enumerate(BORDERS):
        touched = (found.box.start[axis] == start[axis], 0), (found.box.stop[axis] == stop[axis], -1)
        for name, (touches, plane) in zip(sides, touched, strict=True):
            if touches and found.numbers.size and visible[found.numbers.take(plane, axis)].any():
                names.append(name)
    return names


def doubts(
    labels: NDArray[np.uint8], geometry: Geometry, findings: Findings, hu: NDArray[Any] | None
) -> tuple[str, ...]:
    """What a label map (D, H, W) leaves open, beside its figures: see ``_SHAPES``; without a CT a single one's side."""
    parts, names = Parts.of(labels, geometry), (*_SHAPES, *(["single-kidney"] if hu is None else []))
    flags = [*kidney_flags(findings, parts, hu is not None), *border_flags(parts)]
    flags += tumor_flags(labels, geometry, parts, findings)
    flags += [] if hu is None else hu_flags(kidney_hu(hu, labels))
    return tuple(flag.reason[:1].lower() + flag.reason[1:].rstrip(".") for flag in flags if flag.name in names)


def volume_flags(findings: Findings) -> Iterator[Flag]:
    """Kidneys with an implausible volume of parenchyma, and tumors with an implausibly large volume."""
    low, high = PARENCHYMA_ML
    for kidney in findings.whole_kidneys:
        if not low <= kidney.parenchyma_ml <= high:
            failed = kidney.parenchyma_ml > FAILED_ML
            reason = f"The {kidney.side} kidney has {kidney.parenchyma_ml:.0f} ml of parenchyma"
            more = " The segmentation has probably failed." if failed else ""
            level = RED if failed else AMBER
            yield Flag("kidney-volume", level, f"{reason}; {low:.0f} to {high:.0f} ml are expected.{more}")
    tumor = sum(lesion.volume_ml for lesion in findings.lesions if lesion.kind == "tumor")
    if tumor > TUMOR_ML:
        yield Flag("tumor-volume", AMBER, f"The tumors have {tumor:.0f} ml; more than {TUMOR_ML:.0f} ml are unlikely.")
