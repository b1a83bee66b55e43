"""The 3D view of kidneys and lesions, drawn by Plotly in a page."""

from __future__ import annotations

import base64
import gzip
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from plotly.offline import get_plotlyjs

from kitseg.components import Components, bounding_box
from kitseg.labels import BACKGROUND, CYST, TUMOR, Scheme
from kitseg.measurement.findings import Findings, Lesion
from kitseg.measurement.mesh import surface, voxel_faces
from kitseg.report.slices import Scene
from kitseg.types import Box, Geometry

_MOST_TRIANGLES = 60_000  # of all surfaces of a page together
_MOST_LESIONS = 40  # with their own surface
_FINEST_MM = 1.0
_MOST_AT_ONCE = 2_000_000  # triangles during the search for a coarser step
_LIGHT = {"ambient": 0.45, "diffuse": 0.7, "specular": 0.15, "roughness": 0.6}
_OPACITY = {"kidney": 0.35}
_LABELS = {"tumor": TUMOR, "cyst": CYST}
_LETTERS_MM = 12  # from the labels
_LAYOUT = {
    "margin": {"l": 0, "r": 0, "t": 0, "b": 0},
    "paper_bgcolor": "#ffffff",
    "showlegend": True,
    "legend": {"orientation": "h", "y": 0, "yanchor": "top", "itemsizing": "constant"},
}
_SCENE = {
    "aspectmode": "cube",  # of side 1, around a ball that Plotly's 45 degrees hold from 0.5 / sin(22.5 degrees) = 1.31
    "camera": {"eye": {"x": 0.0, "y": 1.3, "z": 0.2}},
    "dragmode": "orbit",
}
_CONFIG = {"displaylogo": False, "responsive": True, "displayModeBar": False}


@lru_cache
def plotly_script() -> str:
    """plotly.js, gzipped and then base64."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode("utf-8"), 9, mtime=0)).decode("ascii")


def view(scene: Scene, findings: Findings) -> dict[str, Any] | None:
    """The Plotly figure (data, layout and config): transparent kidneys, and each lesion in its colour.

    Seen from the front, with the patient's right on the left. None if nothing is labelled.
    """
    labels, geometry, colours = scene.labels, scene.geometry, scene.scheme.colours
    whole = bounding_box(labels != BACKGROUND)
    if whole is None:
        return None
    masks = [("kidneys", "kidney", whole, labels[whole.slices] != BACKGROUND)]
    shown = findings.lesions[:_MOST_LESIONS]
    masks += [(title(lesion, scene.scheme), lesion.kind, lesion.box, lesion_mask(labels, lesion)) for lesion in shown]
    step = _first_step([mask for _, _, _, mask in masks], geometry.spacing)
    while True:
        traces = [
            {
                **_trace(mask, geometry.crop(box), step),
                "name": name,
                "color": colours[kind],
                "opacity": _OPACITY.get(kind, 1.0),
            }
            for name, kind, box, mask in masks
        ]
        if sum(trace["triangles"] for trace in traces) <= _MOST_TRIANGLES:
            break
        step *= 1.4
    for trace in traces:
        del trace["triangles"]
    marks, scene_layout = _surroundings(geometry, whole)
    return {"data": [*traces, marks], "layout": {**_LAYOUT, "scene": scene_layout}, "config": _CONFIG}


def title(lesion: Lesion, scheme: Scheme) -> str:
    """The display name of a lesion."""
    return f"{scheme.names[lesion.kind]} {lesion.number}, {lesion.side}, {lesion.axial_mm:.0f} mm"


def lesion_mask(labels: NDArray[np.uint8], lesion: Lesion) -> NDArray[np.bool_]:
    """The lesion's mask in its box."""
    mask = labels[lesion.box.slices] == _LABELS[lesion.kind]
    found = Components.of(mask)
    inside = np.zeros(mask.shape, bool)
    middle = tuple(c - a - b for c, a, b in zip(lesion.centre, lesion.box.start, found.box.start, strict=True))
    inside[found.box.slices] = found.numbers == found.numbers[middle]
    return inside


def _first_step(masks: list[NDArray[np.bool_]], spacing: tuple[float, float, float]) -> float:
    """The finest sampling in mm at which even noise has no more triangles than fit into memory."""
    face = np.prod(spacing) / np.array(spacing)
    area = sum(float(np.dot(voxel_faces(mask), face)) for mask in masks)
    return max(_FINEST_MM, float(np.sqrt(2 * area / _MOST_AT_ONCE)))


def _trace(mask: NDArray[np.bool_], geometry: Geometry, step: float) -> dict[str, Any]:
    vertices, faces = surface(mask, geometry, step)
    small = np.uint16 if len(vertices) <= 2**16 else np.uint32
    x, y, z = (_packed(axis.astype(np.float32)) for axis in vertices.T)
    i, j, k = (_packed(corner.astype(small)) for corner in faces.T)
    return {
        "type": "mesh3d",
        "hoverinfo": "name",
        "showlegend": True,
        "lighting": _LIGHT,
        "flatshading": False,
        "triangles": len(faces),
        **{"x": x, "y": y, "z": z, "i": i, "j": j, "k": k},
    }


def _packed(values: NDArray[Any]) -> dict[str, str]:
    """An array in Plotly's base64 encoding."""
    kinds = {"float32": "f4", "uint16": "u2", "uint32": "u4"}
    return {"dtype": kinds[values.dtype.name], "bdata": base64.b64encode(values.tobytes()).decode("ascii")}


def _surroundings(geometry: Geometry, box: Box) -> tuple[dict[str, Any], dict[str, Any]]:
    """The orientation letters for the patient's right, left, head and feet, and a scene that holds all of it."""
    start, last = np.array(box.start), np.array(box.stop) - 1
    x, y, z = centre = (geometry.affine @ [*(start + last) / 2, 1])[:3]
    half = np.abs(geometry.affine[:3, :3]) @ (last - start) / 2
    dx, _, dz = half + _LETTERS_MM
    reach = 1.05 * max(dx, dz, float(np.linalg.norm(half)))
    places = {"R": (x + dx, y, z), "L": (x - dx, y, z), "H": (x, y, z + dz), "F": (x, y, z - dz)}
    letters = {
        "type": "scatter3d",
        "mode": "text",
        "text": list(places),
        **{axis: [float(place[n]) for place in places.values()] for n, axis in enumerate("xyz")},
        "hoverinfo": "skip",
        "showlegend": False,
        "textfont": {"size": 14, "color": "#5b6b7b"},
    }
    axes = {
        f"{name}axis": {"visible": False, "range": [float(middle - reach), float(middle + reach)]}
        for name, middle in zip("xyz", centre, strict=True)
    }
    return letters, {**_SCENE, **axes}
