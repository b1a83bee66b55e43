"""The self-contained HTML page of a case: quality flags, measurements, slices, lesion views, 3D view, provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kitseg.labels import CYST
from kitseg.measurement.findings import Findings, Lesion
from kitseg.measurement.flags import Quality
from kitseg.measurement.renal_function import AfterSurgery, Patient
from kitseg.report import LEVEL_TEXTS
from kitseg.report.html import number, write_page
from kitseg.report.nephrometry_view import nephrometry_view
from kitseg.report.pictures import PLANES, centre
from kitseg.report.scores import ScoreTable, display_name
from kitseg.report.slices import LEVEL, UNIT, WIDTH, Scene, around, as_data, cut, scroll
from kitseg.report.view3d import plotly_script, title, view
from kitseg.types import Box, Geometry, Triple

MOST_LESIONS = 12  # with their own pictures
_SCROLL_BYTES = 4_500_000  # for the axial slices of a page below 10 MB
_VIEW_MM = 140.0  # smallest width of a lesion's pictures
_VIEW_DIAMETERS = 2.5  # smallest width in diameters of the lesion
_WIDTHS = (WIDTH, 300, 200, 150)  # HU, to choose from; the pictures hold no more than the first
_AXES = ("slice", "row", "column")
_ALONE, _COMPARED = {"prediction": "Labels"}, {"prediction": "Prediction", "reference": "Reference"}


@dataclass(frozen=True)
class CaseContent:
    """The content of a case's page.

    scene: labels, scan and reference; scores: metrics by class; facts: provenance by name; notes: paragraphs;
    intervals: of the figures of kidneys and lesions (``Calibration.of_all``), empty without a calibration; patient,
    after: the function after surgery, and what it was predicted from.
    """

    case: str
    scene: Scene
    findings: Findings
    quality: Quality
    scores: ScoreTable
    facts: Mapping[str, str]
    notes: Sequence[str] = ()
    intervals: Sequence[Mapping[str, tuple[float, float] | None]] = ()
    patient: Patient | None = None
    after: AfterSurgery | None = None


def write_case_page(path: Path, content: CaseContent) -> None:
    """Writes the page as one self-contained HTML file below 10 MB, complete or not at all."""
    scene, findings = content.scene, content.findings
    found = scroll(scene, _SCROLL_BYTES)
    drawn = view(scene, findings)
    middle = middle_of(scene, findings)[0]
    start = min(range(len(found.indices)), key=lambda n: abs(found.indices[n] - middle))
    write_page(
        path,
        "case.html.j2",
        title=content.case,
        quality=content.quality,
        level_text=LEVEL_TEXTS[content.quality.level],
        findings=findings,
        intervals=content.intervals,
        patient=content.patient,
        after=content.after,
        notes=content.notes,
        facts=content.facts,
        scores=content.scores,
        display_name=display_name,
        metrics=list(dict.fromkeys(metric for values in content.scores.values() for metric in values)),
        colours=scene.scheme.colours,
        names=scene.scheme.names,
        outlines=_outlines(scene),
        origins=_ALONE if scene.reference is None else _COMPARED,
        window="No scan is available." if scene.hu is None else f"Window level: {LEVEL} HU.",
        width=WIDTH,
        widths=_WIDTHS,
        has_scan=scene.hu is not None,
        unit=UNIT,
        slices=as_data(found),
        first=found.cuts[0],
        start=start,
        count=len(found.cuts),
        depth=scene.geometry.shape[0],
        every=found.every,
        lesion_views=_lesion_views(scene, findings),
        nephrometry=nephrometry_view(scene, findings),
        left_out=max(len(findings.lesions) - MOST_LESIONS, 0),
        has_view=drawn is not None,
        view=drawn,
        plotly="" if drawn is None else plotly_script(),
    )


def _outlines(scene: Scene) -> dict[str, str]:
    """Names and texts of the visible outlines; cysts only if there are any."""
    maps = [scene.labels] if scene.reference is None else [scene.labels, scene.reference]
    cysts = any((labels == CYST).any() for labels in maps)
    texts = {**scene.scheme.names, "kidney": f"{scene.scheme.kidney.name} with lesions"}
    return {name: text for name, text in texts.items() if cysts or name != "cyst"}


def middle_of(scene: Scene, findings: Findings) -> Triple:
    """The centre of the largest tumor, else of the largest cyst, else of the labelled voxels."""
    if findings.lesions:
        return findings.lesions[0].centre
    return centre([scene.labels] if scene.reference is None else [scene.labels, scene.reference], scene.labels.shape)


def _lesion_views(scene: Scene, findings: Findings) -> list[dict[str, Any]]:
    """The three planes through each lesion; without lesions, through the centre of the labelled voxels."""
    if not findings.lesions:
        at, whole = middle_of(scene, findings), Box((0, 0, 0), scene.geometry.shape)
        return [
            {"name": "No lesion", "facts": ["through the centre of the labels"], "planes": _planes(scene, at, whole)}
        ]
    return [
        {
            "name": title(lesion, scene.scheme).capitalize(),
            "facts": [f"{number(lesion.volume_ml)} ml", *filter(None, [lesion.size_class])],
            "planes": _planes(scene, lesion.centre, lesion_box(lesion, scene.geometry)),
        }
        for lesion in findings.lesions[:MOST_LESIONS]
    ]


def lesion_box(lesion: Lesion, geometry: Geometry) -> Box:
    """The part of a scan that a lesion's pictures show."""
    return around(lesion.centre, max(_VIEW_MM, _VIEW_DIAMETERS * lesion.diameter_mm), geometry)


def _planes(scene: Scene, at: Triple, box: Box) -> list[dict[str, Any]]:
    return [
        {
            "name": plane.name,
            "axis": _AXES[plane.axis],
            "at": at[plane.axis],
            "marks": (plane.left, plane.top),
            "cut": cut(scene, plane.axis, at[plane.axis], box),
        }
        for plane in PLANES
    ]
