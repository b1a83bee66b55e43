"""A tumor's nephrometry on a case's page: its parts, and the lines that decided them on slices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kitseg.measurement.findings import Findings
from kitseg.measurement.kidney_frame import KidneyFrame
from kitseg.measurement.nephrometry import Nephrometry, score, tumor_frame
from kitseg.measurement.renal_function import index_tumor
from kitseg.report.html import number
from kitseg.report.slices import UNIT, Cut, Outlines, Scene, around, cut, path
from kitseg.types import Box, Geometry, triple

#: How each line is drawn, and its text.
LINES = {
    "sinus": ("#ffd75e", "renal sinus"),
    "polar": ("#39d5ff", "polar lines"),
    "middle": ("#ff9df5", "midline between them"),
    "ends": ("#7dff8a", "ends of the sinus"),
    "coronal": ("#ffffff", "kidney's coronal plane"),
    "rim": ("#c8a2ff", "between lateral and medial rim"),
}
_MM = 170.0  # width of a picture


def nephrometry_view(scene: Scene, findings: Findings) -> dict[str, Any] | None:
    """What the page's template shows of the largest tumor's nephrometry; None without a tumor in a kidney."""
    tumor, frame = index_tumor(findings), tumor_frame(scene.labels, scene.geometry, findings, scene.hu)
    if tumor is None or frame is None:
        return None
    found = score(tumor, frame)
    sinus = frame.sinus if frame.sinus.any() else frame.tumor
    places = [_voxel(scene.geometry, frame, np.argwhere(mask).mean(axis=0)) for mask in (frame.tumor, sinus)]
    nearest = _voxel(scene.geometry, frame, frame.nearest())
    pictures = [
        ("Coronal, through the tumor", 1, places[0], ("sinus", "polar", "middle", "ends")),
        ("Coronal, through the sinus", 1, places[1], ("sinus", "polar", "middle", "ends")),
        ("Axial, where the tumor is nearest to the sinus", 0, nearest, ("sinus", "coronal", "rim")),
    ]
    return {
        "name": f"{tumor.side} kidney, tumor {tumor.number}",
        "renal": str(found.renal),
        "padua": str(found.padua),
        "rows": _rows(found, tumor.diameter_mm),
        "notes": found.estimated,
        "lines": LINES,
        "pictures": [
            {"name": name, "cut": _drawn(scene, frame, axis, at, lines), "marks": ("R", "A" if axis == 0 else "H")}
            for name, axis, at, lines in pictures
        ],
    }


def _rows(found: Nephrometry, diameter: float) -> list[tuple[str, str, str, str]]:
    """Part, what was measured, points in R.E.N.A.L., points in PADUA."""
    renal, padua = found.renal, found.padua
    gap = "none is left" if found.nearness_mm is None else f"{number(found.nearness_mm)} mm from the tumor"
    contact = "–" if found.contact_mm2 is None else f"{number(found.contact_mm2 / 100)} cm²"
    outside, between, above, ends, anterior, medial = (
        f"{number(100 * share)} %"
        for share in (found.outside, found.between, found.above, found.beside_sinus, found.anterior, found.medial)
    )
    location = f"{between} of the tumor, {above} above the midline"
    return [
        ("Size, 3D", f"{number(diameter)} mm", str(renal.radius), str(padua.size)),
        ("Outside the kidney's outline", f"{outside} of the tumor", str(renal.exophytic), str(padua.exophytic)),
        ("Renal sinus (estimated)", gap, str(renal.nearness), str(padua.sinus)),
        ("Collecting system (estimated from the sinus)", gap, "", str(padua.collecting)),
        ("Between the polar lines", location, str(renal.location), ""),
        ("Between the ends of the sinus", f"{ends} of the tumor", "", str(padua.location)),
        ("Face", f"{anterior} in front of the coronal plane", renal.face, padua.face),
        ("Rim", f"{medial} on the side of the hilum", "", str(padua.rim)),
        ("C-index", number(found.c_index, 2), "", ""),
        ("Contact surface", contact, "", ""),
    ]


def _voxel(geometry: Geometry, frame: KidneyFrame, place: NDArray[Any]) -> tuple[int, int, int]:
    """The scan's voxel at a place on the kidney's own grid."""
    return geometry.nearest_voxel(frame.affine[:3, :3] @ place + frame.affine[:3, 3])


def _drawn(scene: Scene, frame: KidneyFrame, axis: int, at: tuple[int, int, int], lines: tuple[str, ...]) -> Cut:
    """A plane of the scan around a voxel, with the kidney's lines on it."""
    box = around(at, _MM, scene.geometry)
    start, stop = list(box.start), list(box.stop)
    start[axis], stop[axis] = at[axis], at[axis] + 1
    drawn = cut(scene, axis, at[axis], box)
    grid = scene.geometry.crop(Box(triple(start), triple(stop)))
    voxels = np.moveaxis(np.indices(grid.shape), 0, -1).squeeze(axis)
    points = voxels @ grid.affine[:3, :3].T + grid.affine[:3, 3]
    found = _outlines(frame, points)
    return replace(drawn, prediction={**drawn.prediction, **{name: found[name] for name in lines if name in found}})


def _outlines(frame: KidneyFrame, points: NDArray[np.float64]) -> Outlines:
    """SVG paths of the sinus and the lines on a plane, from its voxels' places (H, W, 3) in mm."""
    voxels = frame.at(points)
    known = ((voxels >= 0) & (voxels < frame.sinus.shape)).all(axis=-1)
    sinus = np.zeros(known.shape, np.bool_)
    sinus[known] = frame.sinus[tuple(voxels[known].T)]
    turn = frame.affine[:3, :3]
    offsets = points - (turn @ frame.centre + frame.affine[:3, 3])
    up, front, hilum = (offsets @ (turn @ axis) for axis in (frame.up, frame.front, frame.hilum))
    fields: Mapping[str, tuple[NDArray[np.float64], ...]] = {
        "polar": (up - frame.upper, up - frame.lower),
        "middle": (up - (frame.upper + frame.lower) / 2,),
        "ends": tuple(up - level for level in frame.sinus_lines),
        "coronal": (front,),
        "rim": (hilum,),
    }
    drawn = {name: "".join(map(_line, parts)) for name, parts in fields.items()}
    if sinus.any():
        drawn["sinus"] = path(sinus)
    return {name: text for name, text in drawn.items() if text}


def _line(field: NDArray[np.float64]) -> str:
    """The straight line where a linear field (H, W) is 0, as an SVG path; empty where it isn't on the picture."""
    rows, columns = field.shape
    corners = field[0, 0], field[0, -1], field[-1, -1], field[-1, 0]
    places = (0, 0), (columns - 1, 0), (columns - 1, rows - 1), (0, rows - 1)
    ends = []
    for n, (one, other) in enumerate(zip(corners, (*corners[1:], corners[0]), strict=True)):
        if (one < 0) != (other < 0):
            start, stop = np.array(places[n]), np.array(places[(n + 1) % 4])
            x, y = np.rint((start + (stop - start) * one / (one - other) + 0.5) * UNIT).astype(int)
            ends.append(f"{x} {y}")
    return f"M{ends[0]}L{ends[1]}" if len(ends) == 2 else ""
