"""The self-contained HTML page of a follow-up: each lesion at both dates, side by side in the same planes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from kitseg.labels import Scheme
from kitseg.measurement.alignment import Alignment
from kitseg.measurement.followup import Change, Followup, Visit
from kitseg.report.html import write_page
from kitseg.report.pictures import PLANES
from kitseg.report.slices import LEVEL, UNIT, WIDTH, Scene, around, cut
from kitseg.types import Box, Geometry, triple

_MOST_LESIONS = 12  # with their own pictures
_VIEW_MM = 120.0  # smallest width of a picture
_VIEW_DIAMETERS = 2.5  # smallest width in diameters of the lesion
_AIR = -1024


@dataclass(frozen=True)
class FollowupContent:
    """The content of a page.

    rows: a lesion each, in the order of ``found.changes``; dates: their names; scheme: names and colours; notes:
    paragraphs.
    """

    case: str
    visits: tuple[Visit, Visit]
    found: Followup
    rows: Sequence[Mapping[str, Any]]
    dates: tuple[str, str]
    scheme: Scheme
    notes: Sequence[str] = ()


def write_followup_page(path: Path, content: FollowupContent) -> None:
    """Write the page, complete or not at all."""
    changes = list(zip(content.found.changes, content.rows, strict=True))
    before, after = ({kidney.side: kidney for kidney in visit.findings.kidneys} for visit in content.visits)
    write_page(
        path,
        "followup.html.j2",
        title=f"Follow-up of {content.case}",
        dates=content.dates,
        rows=content.rows,
        kidneys=[(side, before.get(side), after.get(side)) for side in sorted({*before, *after}, reverse=True)],
        alignments=content.found.alignments,
        colours=content.scheme.colours,
        names=content.scheme.names,
        unit=UNIT,
        views=[_view(change, row, content) for change, row in changes[:_MOST_LESIONS]],
        left_out=max(len(changes) - _MOST_LESIONS, 0),
        window=f"Window level {LEVEL} HU, width {WIDTH} HU.",
        notes=content.notes,
        facts={},
    )


def _view(change: Change, row: Mapping[str, Any], content: FollowupContent) -> dict[str, Any]:
    """A lesion's planes at the first date, and the same places at the second one."""
    first, second = content.visits
    lesion = change.before or change.after
    assert lesion is not None
    align = content.found.alignments.get(lesion.side)
    at = _centre(change, content.visits, align)
    box = around(at, max(_VIEW_MM, _VIEW_DIAMETERS * max(lesion.diameter_mm for lesion in change.both)), first.geometry)
    grid, here = first.geometry.crop(box), triple(np.subtract(at, box.start))
    old = Scene(first.labels[box.slices], grid, None if first.hu is None else first.hu[box.slices])
    scenes = [old]
    if align:
        labels, hu = _moved(second, grid, align)
        scenes.append(Scene(labels, grid, hu, old.labels))
    whole = Box((0, 0, 0), grid.shape)
    planes = [
        [{"plane": plane, "cut": cut(s, plane.axis, here[plane.axis], whole)} for s in scenes] for plane in PLANES
    ]
    return {"row": row, "planes": planes}


def _centre(change: Change, visits: tuple[Visit, Visit], align: Alignment | None) -> tuple[int, int, int]:
    """The voxel of the first scan where the lesion is, or where a new one would have been."""
    if change.before:
        return change.before.centre
    assert change.after is not None
    place = visits[1].place(change.after)[None]
    return visits[0].geometry.nearest_voxel((align.back(place) if align else place)[0])


def _moved(visit: Visit, grid: Geometry, align: Alignment) -> tuple[NDArray[np.uint8], NDArray[Any] | None]:
    """Labels and HU of the second date on a grid of the first one."""
    motion = np.eye(4)
    motion[:3, :3], motion[:3, 3] = align.rotation, align.shift
    index = np.linalg.inv(visit.geometry.affine) @ motion @ grid.affine
    where = {"matrix": index[:3, :3], "offset": index[:3, 3], "output_shape": grid.shape}
    labels = ndimage.affine_transform(visit.labels, order=0, **where)
    hu = None if visit.hu is None else ndimage.affine_transform(visit.hu, order=1, cval=_AIR, **where)
    return labels, hu
