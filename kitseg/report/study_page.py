"""The self-contained HTML page of a study: quality flags, scores and distributions, the cases to review first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from kitseg.labels import Scheme
from kitseg.measurement.findings import Findings, Lesion
from kitseg.measurement.flags import LEVELS, Quality
from kitseg.report.case_page import middle_of
from kitseg.report.html import page_name, write_page
from kitseg.report.scores import ScoreTable, StudyScores
from kitseg.report.slices import UNIT, Cut, Scene, body_box, cut
from kitseg.report.strip import Dot, Strip, strip

FAILED = "failed"
_NOTHING = Findings((), ())
_THUMBNAIL_PIXELS = 256
_PICTURES_BYTES = 6_000_000  # for the pictures of a page below 10 MB


@dataclass(frozen=True)
class CaseRow:
    """A case of the study; error: why it has no page, in which case the other fields are empty."""

    case: str
    error: str = ""
    quality: Quality | None = None
    findings: Findings = _NOTHING
    thumbnail: Cut | None = None
    scores: ScoreTable | None = None

    @property
    def level(self) -> str:
        """Green, amber, red or failed."""
        return self.quality.level if self.quality and not self.error else FAILED

    @property
    def page(self) -> str:
        """The file name of the case's page."""
        return page_name(self.case)

    @property
    def kidneys_ml(self) -> float:
        """Volume of the kidneys with their lesions."""
        return sum(kidney.volume_ml for kidney in self.findings.kidneys)

    @property
    def tumors(self) -> list[Lesion]:
        """The tumors, the largest volume first."""
        return [lesion for lesion in self.findings.lesions if lesion.kind == "tumor"]

    @property
    def dice(self) -> dict[str, float]:
        """Dice by class."""
        found = {name: values.get("dice") for name, values in (self.scores or {}).items()}
        return {name: value for name, value in found.items() if value is not None}


def write_study(
    path: Path, title: str, rows: Sequence[CaseRow], scores: StudyScores, facts: Mapping[str, str], scheme: Scheme
) -> None:
    """Writes the page as one self-contained HTML file below 10 MB with links to the cases' pages in the same folder.

    scheme: names and colours of the classes.

    The cases to review first get pictures, up to a size limit.
    """
    ordered = sorted(rows, key=_badness)
    write_page(
        path,
        "study.html.j2",
        title=title,
        rows=ordered,
        counts=Counter(row.level for row in rows),
        levels=(*LEVELS, FAILED),
        pictured=_pictured(ordered),
        classes=list(dict.fromkeys(name for row in rows for name in row.dice)),
        scores=scores,
        strips=_strips(rows, scores, scheme),
        colours=scheme.colours,
        unit=UNIT,
        facts=facts,
    )


def thumbnail(scene: Scene, findings: Findings) -> Cut:
    """The axial slice through the centre of the largest tumor, else cyst, else of the labelled voxels."""
    at = middle_of(scene, findings)[0]
    return cut(scene, 0, at, body_box(scene.hu, scene.geometry.shape), _THUMBNAIL_PIXELS)


def _badness(row: CaseRow) -> tuple[int, float, int, str]:
    """A sorting key: failed, red, amber, green; within a level the lowest mean Dice, then the most flags first."""
    order = (FAILED, *reversed(LEVELS))
    dice = float(np.mean(list(row.dice.values()))) if row.dice else 1.0
    return order.index(row.level), dice, -len(row.quality.flags if row.quality else ()), row.case


def _pictured(rows: Sequence[CaseRow]) -> list[CaseRow]:
    drawn = [(row, row.thumbnail.size) for row in rows if row.thumbnail]
    used = accumulate(size for _, size in drawn)
    return [row for (row, _), size in zip(drawn, used, strict=True) if size <= _PICTURES_BYTES]


def _strips(rows: Sequence[CaseRow], scores: StudyScores, scheme: Scheme) -> list[Strip]:
    """Strip plots of Dice by class, tumor Dice by stratum, and the measurements."""
    classes = list(dict.fromkeys(name for row in rows for name in row.dice))
    drawn = [strip("Dice", {name: _dice_dots(rows, name) for name in classes}, 1.0)]
    for kind, names in scores.order.items():
        groups = {
            name: _dice_dots([row for row in rows if scores.strata.get(row.case, {}).get(kind) == name], "tumor")
            for name in names
        }
        if len(names) > 1:
            drawn.append(strip(f"Dice of tumor by {kind}", groups, 1.0))
    lesions = [(row, lesion) for row in rows for lesion in row.findings.lesions]
    kinds = list(dict.fromkeys(lesion.kind for _, lesion in lesions))
    for name, what in (("Largest 3D diameter of a lesion, mm", "diameter_mm"), ("Volume of a lesion, ml", "volume_ml")):
        dots = {
            scheme.names[kind]: [
                _dot(row, float(getattr(lesion, what)), f"lesion {lesion.number}")
                for row, lesion in lesions
                if lesion.kind == kind
            ]
            for kind in kinds
        }
        drawn.append(strip(name, dots))
    kidneys = {
        side: [_dot(row, k.volume_ml, side) for row in rows for k in row.findings.kidneys if k.side == side]
        for side in ("right", "left")
    }
    return [found for found in (*drawn, strip("Volume of a kidney with its lesions, ml", kidneys)) if found]


def _dice_dots(rows: Sequence[CaseRow], name: str) -> list[Dot]:
    return [_dot(row, row.dice[name], name, 3) for row in rows if name in row.dice]


def _dot(row: CaseRow, value: float, what: str, digits: int = 1) -> Dot:
    return Dot(value, f"{row.case}, {what}: {value:.{digits}f}", row.level, row.page)
