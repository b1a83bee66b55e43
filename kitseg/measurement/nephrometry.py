"""Nephrometry: how hard a tumor is to cut out, by scores that radiologists read from slices, here from the label map.

docs/explanation/nephrometry.md defines every part. The collecting system has no label: what concerns it is estimated
from the renal sinus (``kidney_frame``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kitseg.components import bounding_box
from kitseg.labels import BACKGROUND
from kitseg.measurement.body_axes import body_axes
from kitseg.measurement.findings import RIGHT, Findings, Lesion
from kitseg.measurement.kidney_frame import KidneyFrame, kidney_frame
from kitseg.measurement.renal_function import index_tumor, tumor_mask
from kitseg.measurement.sides import CODES, find_midline, side_map
from kitseg.types import Geometry

_SMALL_MM, _LARGE_MM = 40.0, 70.0
_NEAR_MM, _FAR_MM = 4.0, 7.0  # R.E.N.A.L., to sinus or collecting system
_TOUCHING_MM = 2.0  # PADUA: sinus and collecting system are involved
_NONE = 0.02  # of a tumor's volume, below which it isn't beyond a line or an outline
_HALF = 0.5
_MOSTLY = 2 / 3  # of a tumor's volume, from which on it is anterior or posterior


@dataclass(frozen=True)
class Renal:
    """The R.E.N.A.L. score (Kutikov and Uzzo, Journal of Urology 2009).

    radius, exophytic, nearness, location: 1 to 3 points; face: a (anterior), p (posterior) or x (neither). Labels can't
    show the suffix h, contact with the main artery or vein.
    """

    radius: int
    exophytic: int
    nearness: int
    face: str
    location: int

    @property
    def points(self) -> int:
        """4 to 12."""
        return self.radius + self.exophytic + self.nearness + self.location

    def __str__(self) -> str:
        return f"{self.points}{self.face}"


@dataclass(frozen=True)
class Padua:
    """The PADUA score (Ficarra et al., European Urology 2009).

    location: 1 polar, 2 middle; exophytic: 1 to 3; rim: 1 lateral, 2 medial; sinus, collecting: 1, or 2 if involved;
    size: 1 to 3; face: a or p.
    """

    location: int
    exophytic: int
    rim: int
    sinus: int
    collecting: int
    size: int
    face: str

    @property
    def points(self) -> int:
        """6 to 14."""
        return self.location + self.exophytic + self.rim + self.sinus + self.collecting + self.size

    def __str__(self) -> str:
        return f"{self.points}{self.face}"


@dataclass(frozen=True)
class Lines:
    """What decided, in the patient's space (mm, RAS+).

    centre: of the kidney; up, hilum, front: unit vectors to the patient's head, to the kidney's sinus and to its
    anterior surface; upper, lower: the polar lines, in mm along ``up`` from the centre; sinus_lines: the ends of the
    sinus, the same way.
    """

    centre: tuple[float, ...]
    up: tuple[float, ...]
    hilum: tuple[float, ...]
    front: tuple[float, ...]
    upper: float
    lower: float
    sinus_lines: tuple[float, float]


@dataclass(frozen=True)
class Nephrometry:
    """The scores of a tumor, and the figures that decided their parts.

    lesion: its number; c_index: distance of the centres of tumor and kidney over the tumor's radius (Simmons et al.,
    Journal of Urology 2010); contact_mm2: contact surface area (Leslie et al., European Urology 2014); nearness_mm: to
    the sinus, None where no sinus is left; outside, between, above, beside_sinus, anterior, medial: shares of the
    tumor's volume outside the kidney's outline, between the polar lines, above the midline between them, between the
    ends of the sinus, in front of the kidney's own coronal plane, and on the hilum's side of its centre; estimated:
    what the labels don't show, and what was used instead.
    """

    lesion: int
    renal: Renal
    padua: Padua
    c_index: float
    contact_mm2: float | None
    outside: float
    nearness_mm: float | None
    between: float
    above: float
    beside_sinus: float
    anterior: float
    medial: float
    lines: Lines
    estimated: tuple[str, ...]


def nephrometry(
    labels: NDArray[np.uint8], geometry: Geometry, findings: Findings, hu: NDArray[Any] | None = None
) -> Nephrometry | None:
    """Score the largest tumor; None without a tumor, or where its kidney has no parenchyma.

    Args:
        labels: (D, H, W) in orientation (I, P, L).
        geometry: of the labels.
        findings: what ``measure`` finds in the labels, with the same ``hu``.
        hu: the CT on the same grid, which decides the side of a single kidney.
    """
    tumor, frame = index_tumor(findings), tumor_frame(labels, geometry, findings, hu)
    return score(tumor, frame) if tumor and frame else None


def tumor_frame(
    labels: NDArray[np.uint8], geometry: Geometry, findings: Findings, hu: NDArray[Any] | None = None
) -> KidneyFrame | None:
    """The axes, sinus and polar lines of the kidney with the largest tumor; None as for ``nephrometry``."""
    tumor, box = index_tumor(findings), bounding_box(labels != BACKGROUND)
    if tumor is None or box is None:
        return None
    inside, grid = labels[box.slices], geometry.crop(box)
    sides = side_map(inside, grid, find_midline(geometry, box, hu))
    lesion = tumor_mask(labels, tumor)[box.slices]
    own = np.where((sides == CODES[tumor.side]) | lesion, inside, np.uint8(BACKGROUND))
    near = bounding_box(own != BACKGROUND)
    assert near is not None
    right, front, up = body_axes(inside, sides, grid)
    medial = -right if tumor.side == RIGHT else right
    return kidney_frame(own[near.slices], grid.crop(near), lesion[near.slices], np.array([medial, front, up]))


def score(tumor: Lesion, frame: KidneyFrame) -> Nephrometry:
    """The scores of a tumor in its kidney."""
    levels = frame.along(frame.up)
    anterior = float(np.mean(frame.along(frame.front) > 0))
    medial = float(np.mean(frame.along(frame.hilum) > 0))
    between, beside_sinus = (
        float(np.mean((levels >= low) & (levels <= high)))
        for low, high in ((frame.lower, frame.upper), frame.sinus_lines)
    )
    above = float(np.mean(levels > (frame.upper + frame.lower) / 2))
    gap = frame.distance() if frame.seen else 0.0
    size = 1 + (tumor.diameter_mm > _SMALL_MM)
    exophytic = 1 if frame.outside >= _HALF else 2 if frame.outside >= _NONE else 3
    face = "a" if anterior >= _MOSTLY else "p" if anterior <= 1 - _MOSTLY else "x"
    involved = 1 + (gap <= _TOUCHING_MM)
    renal = Renal(
        size + (tumor.diameter_mm >= _LARGE_MM),
        exophytic,
        3 if gap <= _NEAR_MM else 2 if gap < _FAR_MM else 1,
        face,
        _location(between, above),
    )
    padua = Padua(
        1 + (beside_sinus > _HALF),
        exophytic,
        1 + (medial > _HALF),
        involved,
        involved,
        size + (tumor.diameter_mm > _LARGE_MM),
        "a" if anterior > _HALF else "p",
    )
    middle = frame.along(np.eye(3)).mean(axis=0)
    return Nephrometry(
        tumor.number,
        renal,
        padua,
        float(np.linalg.norm(middle)) / (tumor.diameter_mm / 2),
        tumor.contact_mm2,
        frame.outside,
        gap if frame.seen else None,
        between,
        above,
        beside_sinus,
        anterior,
        medial,
        _lines(frame),
        _estimated(frame),
    )


def _location(between: float, above: float) -> int:
    """L of R.E.N.A.L.: 1 beyond a polar line, 2 across it, 3 mostly across, between both or across the midline."""
    crosses_middle = _NONE < above < 1 - _NONE
    if between > _HALF or crosses_middle:
        return 3
    return 2 if between >= _NONE else 1


def _lines(frame: KidneyFrame) -> Lines:
    turn = frame.affine[:3, :3]
    vectors = (turn @ frame.centre + frame.affine[:3, 3], *(turn @ v for v in (frame.up, frame.hilum, frame.front)))
    centre, up, hilum, front = (tuple(map(float, vector)) for vector in vectors)
    return Lines(centre, up, hilum, front, frame.upper, frame.lower, frame.sinus_lines)


def _estimated(frame: KidneyFrame) -> tuple[str, ...]:
    if frame.seen:
        return ("Nearness and the collecting system are estimated from the renal sinus.",)
    return (
        "No renal sinus is left beside the tumor: it counts as involved; polar lines and hilum are a normal kidney's.",
    )
