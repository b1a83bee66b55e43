"""Kidney function after surgery: new baseline GFR, predicted from the volumes of parenchyma and from clinical data.

All values of GFR are in ml/min/1.73 m². The formulas:

- Volume: after radical nephrectomy 1.24 × GFR × the other kidney's share of the function, which is that of the
  parenchyma's volume; after partial nephrectomy 0.89 × GFR.
- Clinical: 35 + 0.65 × GFR − 18 (radical) − 0.25 × age + 3 (tumor above 7 cm) − 2 (diabetes).
- Both: the mean of the two, whose 90 % interval holds for patients of KiTS19.

docs/explanation/renal_function.md names the sources.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kitseg.components import component_at
from kitseg.labels import TUMOR
from kitseg.measurement.findings import Findings, Lesion
from kitseg.measurement.resection import MARGINS, parenchyma_lost
from kitseg.types import Geometry, triple

#: Laboratories report values from here on as ">=90"; such a value counts as 90, and so do predictions above it.
CEILING = 90.0
RADICAL, PARTIAL = "radical", "partial"
_EGFR, _AGE = (15.0, 250.0), (18.0, 120.0)  # of the patients that the formulas are for
_COMPENSATED, _SPARED = 1.24, 0.89
_LARGE_MM = 70.0
#: Half the width of the 90 % interval, from the errors on KiTS19's patients.
_HALF_WIDTH = {RADICAL: 16.8, PARTIAL: 18.9}


@dataclass(frozen=True)
class Patient:
    """What the formulas need beside the label map: eGFR before surgery, age in years, diabetes.

    Raises:
        ValueError: the eGFR is not within 15 and 250, or the age not within 18 and 120.
    """

    egfr: float
    age: float
    diabetes: bool = False

    def __post_init__(self) -> None:
        if not (_EGFR[0] <= self.egfr <= _EGFR[1] and _AGE[0] <= self.age <= _AGE[1]):
            egfr, age = ("{:g} and {:g}".format(*span) for span in (_EGFR, _AGE))
            raise ValueError(f"the formulas are for an eGFR within {egfr} ml/min/1.73 m² and an age within {age} years")


@dataclass(frozen=True)
class NewBaseline:
    """New baseline GFR by the three formulas, and the 90 % interval around ``both``."""

    volume: float
    clinical: float
    both: float
    low: float
    high: float


@dataclass(frozen=True)
class AfterSurgery:
    """What an operation on a kidney costs.

    patient: as the formulas take it, with an eGFR of 90 at most; side: of the operated kidney; other_tumor: whether the
    other one has a tumor too, whose operation is not in these figures; other_share: of all parenchyma, in the other
    kidney, 0 to 1; radical, partial: the operations; margins_mm: of a resection, with the parenchyma within each of
    them and the GFR that is lost with it, if all parenchyma functions alike.
    """

    patient: Patient
    side: str
    other_tumor: bool
    other_share: float
    radical: NewBaseline
    partial: NewBaseline
    margins_mm: tuple[float, ...]
    lost_ml: tuple[float, ...]
    lost_gfr: tuple[float, ...]


def after_surgery(
    findings: Findings, patient: Patient, labels: NDArray[np.uint8], geometry: Geometry
) -> AfterSurgery | None:
    """Predict the function after operations on the kidney with the largest tumor; None without a tumor or two kidneys.

    A kidney has 20 ml or more, so that a speck is no second one.

    Args:
        findings: of the labels.
        patient: an eGFR above 90 counts as 90.
        labels: (D, H, W).
        geometry: of the labels.
    """
    tumor = index_tumor(findings)
    if tumor is None or len(findings.whole_kidneys) != 2:
        return None
    patient = replace(patient, egfr=min(patient.egfr, CEILING))
    share = other_share(findings, tumor.side)
    parenchyma = sum(kidney.parenchyma_ml for kidney in findings.kidneys)
    lost = parenchyma_lost(labels, geometry, tumor_mask(labels, tumor))
    return AfterSurgery(
        patient,
        tumor.side,
        any(lesion.kind == "tumor" and lesion.side != tumor.side for lesion in findings.lesions),
        share,
        _predict(patient, share, tumor.axial_mm, RADICAL),
        _predict(patient, share, tumor.axial_mm, PARTIAL),
        MARGINS,
        lost,
        tuple(patient.egfr * ml / parenchyma for ml in lost),
    )


def _predict(patient: Patient, share: float, tumor_mm: float, operation: str) -> NewBaseline:
    volume = bounded(from_volume(patient.egfr, share, operation))
    clinical = bounded(from_clinic(patient, tumor_mm, operation))
    both, half = (volume + clinical) / 2, _HALF_WIDTH[operation]
    return NewBaseline(volume, clinical, both, bounded(both - half), bounded(both + half))


def bounded(value: float) -> float:
    """A prediction within 0 and 90, the ceiling of measured values."""
    return min(max(value, 0.0), CEILING)


def from_volume(egfr: float, share: float, operation: str) -> float:
    """New baseline GFR from the other kidney's share of the parenchyma, 0 to 1."""
    return _COMPENSATED * egfr * share if operation == RADICAL else _SPARED * egfr


def from_clinic(patient: Patient, tumor_mm: float, operation: str) -> float:
    """New baseline GFR from clinical data and the tumor's largest diameter."""
    after = 35 + 0.65 * patient.egfr - 0.25 * patient.age
    return after - 18 * (operation == RADICAL) + 3 * (tumor_mm > _LARGE_MM) - 2 * patient.diabetes


def other_share(findings: Findings, side: str) -> float:
    """The share of all parenchyma that the kidney opposite to ``side`` holds, 0 to 1; 0 without parenchyma."""
    total = sum(kidney.parenchyma_ml for kidney in findings.kidneys)
    return sum(kidney.parenchyma_ml for kidney in findings.kidneys if kidney.side != side) / total if total else 0.0


def tumor_mask(labels: NDArray[np.uint8], tumor: Lesion) -> NDArray[np.bool_]:
    """The mask of a tumor in the label map (D, H, W) that it was found in."""
    mask, box = np.zeros(labels.shape, np.bool_), tumor.box
    mask[box.slices] = component_at(labels[box.slices] == TUMOR, triple(np.subtract(tumor.centre, box.start)))
    return mask


def index_tumor(findings: Findings) -> Lesion | None:
    """The largest tumor by volume, whose kidney is taken to be the one to operate on; None without a tumor."""
    return next((lesion for lesion in findings.lesions if lesion.kind == "tumor"), None)
