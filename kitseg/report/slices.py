"""Slices of a scan for a page: small pictures of the CT, with the outlines of its labels as SVG paths."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage.measure import find_contours

from kitseg.components import bounding_box
from kitseg.labels import BACKGROUND, CYST, KITS23, TUMOR, Scheme
from kitseg.types import Box, Geometry, Triple

LEVEL, WIDTH = 40, 400  # HU, the window of soft tissue
UNIT = 10  # steps of a path per voxel
_QUALITY, _EFFORT = 58, 2  # of WebP
_BODY_HU = -300
_AROUND_MM = 30.0  # above and below the kidneys, with denser slices
_MOST_EDGES = 4000  # between pixels of a plane; noise with more edges is outlined on a coarser grid
_SAMPLE = 8  # slices from which the size of all is estimated

#: Pixels of the longer side, and slice steps near the kidneys and elsewhere: from the best quality to the smallest.
LADDER = (
    (512, 1, 1),
    (448, 1, 1),
    (384, 1, 1),
    (384, 1, 2),
    (384, 1, 4),
    (384, 2, 4),
    (384, 2, 8),
    (320, 2, 8),
    (320, 3, 12),
    (256, 4, 16),
    (192, 8, 32),
)

Outlines = dict[str, str]
_find_contours: Any = find_contours  # untyped


@dataclass(frozen=True)
class Scene:
    """The arrays to draw: labels (D, H, W) in orientation (I, P, L), and optionally CT and reference of that shape.

    scheme: names and colours of the classes.
    """

    labels: NDArray[np.uint8]
    geometry: Geometry
    hu: NDArray[Any] | None = None
    reference: NDArray[np.uint8] | None = None
    scheme: Scheme = KITS23


@dataclass(frozen=True)
class Cut:
    """A picture with the outlines of its labels.

    image: a data URI; rows, columns: size in voxels (outlines have ``UNIT`` steps per voxel); ratio: width divided by
    height in mm; mm: its width; prediction, reference: SVG paths for ``kidney`` (with its lesions), ``tumor`` and
    ``cyst``, without empty ones.
    """

    image: str
    rows: int
    columns: int
    ratio: float
    mm: float
    prediction: Outlines
    reference: Outlines

    @property
    def size(self) -> int:
        """Size in a page in bytes."""
        return len(self.image) + sum(map(len, [*self.prediction.values(), *self.reference.values()]))


@dataclass(frozen=True)
class Scroll:
    """Axial slices to scroll through.

    indices: along the first axis; mm: positions in the patient, RAS; every: whether no slice is left out.
    """

    cuts: tuple[Cut, ...]
    indices: tuple[int, ...]
    mm: tuple[float, ...]
    every: bool


def cut(scene: Scene, axis: int, at: int, box: Box, pixels: int = 512) -> Cut:
    """The part in ``box`` of the plane ``at`` of an axis; ``pixels``: maximum of the longer side."""
    where: list[Any] = list(box.slices)
    where[axis] = at
    index = tuple(where)
    labels = scene.labels[index]
    rows, columns = labels.shape
    down, across = (mm for n, mm in enumerate(scene.geometry.spacing) if n != axis)
    return Cut(
        _encode(None if scene.hu is None else scene.hu[index], (rows, columns), pixels),
        rows,
        columns,
        columns * across / (rows * down),
        columns * across,
        outlines(labels),
        {} if scene.reference is None else outlines(scene.reference[index]),
    )


def outlines(labels: NDArray[np.uint8]) -> Outlines:
    """SVG paths around the labels of a plane (H, W), without empty ones."""
    if not labels.any():
        return {}
    masks = {"kidney": labels != BACKGROUND, "tumor": labels == TUMOR, "cyst": labels == CYST}
    return {name: path(mask) for name, mask in masks.items() if mask.any()}


def body_box(hu: NDArray[Any] | None, shape: Triple) -> Box:
    """The bounding box of the patient's body without the surrounding air, over all slices."""
    depth, height, width = shape
    if hu is None:
        return Box((0, 0, 0), shape)
    seen: NDArray[np.bool_] = np.any(hu[:: max(depth // 40, 1)] > _BODY_HU, axis=0, keepdims=True)
    found = bounding_box(seen)
    if found is None:
        return Box((0, 0, 0), shape)
    box = found.grown(2).clip((1, height, width))
    return Box((0, *box.start[1:]), (depth, *box.stop[1:]))


def around(centre: Triple, mm: float, geometry: Geometry) -> Box:
    """A cube of ``mm`` around a voxel, moved and clipped to lie in the scan."""
    start, stop = [], []
    for middle, step, count in zip(centre, geometry.spacing, geometry.shape, strict=True):
        size = min(max(round(mm / step), 1), count)
        first = min(max(middle - size // 2, 0), count - size)
        start.append(first)
        stop.append(first + size)
    return Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))


def scroll(scene: Scene, budget: int) -> Scroll:
    """The axial slices in the best quality of ``LADDER`` whose size is within ``budget`` bytes."""
    box = body_box(scene.hu, scene.geometry.shape)

    def draw(index: int, pixels: int) -> Cut:
        return cut(scene, 0, index, box, pixels)

    best: tuple[list[int], list[Cut]] = ([], [])
    for pixels, near, far in LADDER:
        last = (pixels, near, far) == LADDER[-1]
        chosen = _chosen(scene.labels, scene.geometry, near, far)
        if not last and _estimate(chosen, pixels, draw) > budget:
            continue
        best = (chosen, [draw(index, pixels) for index in chosen])
        if sum(found.size for found in best[1]) <= budget:
            break
    chosen, cuts = best
    heights = tuple(_height(scene.geometry, index) for index in chosen)
    return Scroll(tuple(cuts), tuple(chosen), heights, len(chosen) == scene.geometry.shape[0])


def _estimate(chosen: Sequence[int], pixels: int, draw: Callable[[int, int], Cut]) -> float:
    sample = chosen[:: max(len(chosen) // _SAMPLE, 1)]
    return len(chosen) * sum(draw(index, pixels).size for index in sample) / len(sample)


def _chosen(labels: NDArray[np.uint8], geometry: Geometry, near: int, far: int) -> list[int]:
    """Every ``near``-th slice around the labels, every ``far``-th elsewhere."""
    depth, box = geometry.shape[0], bounding_box(labels != BACKGROUND)
    margin = round(_AROUND_MM / geometry.spacing[0])
    first, last = (box.start[0] - margin, box.stop[0] + margin) if box else (0, 0)
    return [k for k in range(depth) if k % (near if first <= k < last else far) == 0]


def _height(geometry: Geometry, index: int) -> float:
    """The position of a slice's centre along the patient's axis in mm."""
    _, height, width = geometry.shape
    return float((geometry.affine @ [index, (height - 1) / 2, (width - 1) / 2, 1])[2])


def _encode(hu: NDArray[Any] | None, shape: tuple[int, int], pixels: int) -> str:
    """A plane as a grayscale WebP picture; black without a scan."""
    if hu is None:
        grey = np.zeros(shape, np.uint8)
    else:
        grey = np.clip((hu.astype(np.float32) - (LEVEL - WIDTH / 2)) * (255 / WIDTH), 0, 255).astype(np.uint8)
    image, shrink = Image.fromarray(grey), pixels / max(shape)
    if shrink < 1:
        rows, columns = (max(round(n * shrink), 1) for n in shape)
        image = image.resize((columns, rows), Image.Resampling.BOX)
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=_QUALITY, method=_EFFORT)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


def path(mask: NDArray[np.bool_], unit: int = UNIT) -> str:
    """A mask's outline as closed SVG paths of relative steps, ``unit`` per voxel."""
    box = bounding_box(mask[None])
    if box is None:
        return ""
    inside = np.pad(mask[box.slices[1:]], 1)
    corner = np.array(box.start[1:]) - 1 + 0.5  # voxel centres are half a voxel from the edge
    if np.count_nonzero(np.diff(inside, axis=0)) + np.count_nonzero(np.diff(inside, axis=1)) > _MOST_EDGES:
        return path(mask[::2, ::2], 2 * unit)
    pieces = []
    for contour in _find_contours(inside.astype(np.float32), 0.5):
        points = np.rint((contour[:-1] + corner) * unit).astype(int)[:, ::-1]
        corners = points[(np.roll(points, 1, 0) - points != points - np.roll(points, -1, 0)).any(1)]
        x, y = corners[0].tolist()
        steps = np.diff(corners, axis=0).tolist()
        pieces.append(f"M{x} {y}l" + " ".join(f"{dx} {dy}" for dx, dy in steps) + "z")
    return "".join(pieces)


def as_data(found: Scroll) -> dict[str, Any]:
    """The slices in the form that the page's script reads."""
    return {
        "unit": UNIT,
        "every": found.every,
        "slices": [
            {"index": k, "mm": round(mm, 1), "image": c.image, "prediction": c.prediction, "reference": c.reference}
            for c, k, mm in zip(found.cuts, found.indices, found.mm, strict=True)
        ],
    }
