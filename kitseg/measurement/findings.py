"""The measurements of a label map: its kidneys and its lesions."""

from __future__ import annotations

from dataclasses import dataclass

from kitseg.types import Box, Triple

RIGHT, LEFT = "right", "left"
KIDNEY_ML = 20.0  # least volume of a kidney with its lesions; less is a speck, or a failed outline


@dataclass(frozen=True)
class Kidney:
    """One of the patient's kidneys; volumes in ml.

    side: the patient's, ``right`` or ``left``; volume_ml: including lesions; parenchyma_ml: label kidney only.
    """

    side: str
    volume_ml: float
    parenchyma_ml: float


@dataclass(frozen=True)
class Lesion:
    """One connected tumor or cyst.

    number: from 1, the largest volume first; kind: ``tumor`` or ``cyst``; side: of the kidney it belongs to; axial_mm:
    largest diameter within one slice; diameter_mm: largest diameter in 3D; size_class: T1a, T1b, T2a or T2b for a
    tumor, else None; exophytic: share of its volume outside the kidney's outline, 0 to 1; contact_mm2: area of its
    surface that touches parenchyma; hu_mean, hu_sd: of its voxels in a CT; centre: the lesion's voxel (slice, row,
    column) nearest to its centre of mass; box: its bounding box. Values that can't be measured are None (no CT, no
    kidney on that side, a ragged surface).
    """

    number: int
    kind: str
    side: str
    volume_ml: float
    axial_mm: float
    diameter_mm: float
    size_class: str | None
    exophytic: float | None
    contact_mm2: float | None
    hu_mean: float | None
    hu_sd: float | None
    centre: Triple
    box: Box


@dataclass(frozen=True)
class Findings:
    """A case's kidneys (right before left) and lesions (tumors before cysts, the largest first)."""

    kidneys: tuple[Kidney, ...]
    lesions: tuple[Lesion, ...]

    @property
    def whole_kidneys(self) -> list[Kidney]:
        """The kidneys of a plausible size, 20 ml or more."""
        return [kidney for kidney in self.kidneys if kidney.volume_ml >= KIDNEY_ML]
