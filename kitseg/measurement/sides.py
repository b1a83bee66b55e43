"""Assign kidneys and lesions to the patient's right and left side.

Sides follow from the affine (x of RAS+ grows to the patient's right), never from the order of the array's axes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from kitseg.components import Components, bounding_box, kidneys_among
from kitseg.labels import BACKGROUND, KIDNEY
from kitseg.measurement.findings import LEFT, RIGHT
from kitseg.types import Box, Geometry

CODES = {RIGHT: 1, LEFT: 2}
NAMES = {code: name for name, code in CODES.items()}

HOLD_ML = 1.0  # parenchyma of a component that is more than a lesion alone
MIN_APART_MM = 50.0  # from right to left, between the centres of two kidneys
BODY_HU = -200
_BIN_MM = 2.0


def side_map(labels: NDArray[np.uint8], geometry: Geometry, midline: float) -> NDArray[np.uint8]:
    """The side of every voxel of a label map (D, H, W): 0 background, 1 right, 2 left (``CODES``).

    Kidneys are the 26-connected components of the foreground that are large enough (``components.kidneys_among``) and
    contain parenchyma. Two kidneys that are far enough apart from right to left get their sides from their relative
    position, and smaller components belong to the nearer kidney. A single kidney lies on its side of the midline; the
    rest of the foreground belongs to the same side, except for components as far away on the other side of the midline
    as a second kidney would be. A kidney that extends to both sides (a horseshoe kidney, or two kidneys joined by a
    tumor) is cut where the parenchyma between its two halves is thinnest.

    Args:
        labels: every label except 0 is foreground.
        geometry: of the labels.
        midline: x in mm (RAS+) of the patient's midline.
    """
    foreground = labels != BACKGROUND
    found = Components.of(foreground)
    sides = np.zeros(labels.shape, np.uint8)
    if found.sizes.size == 1:
        return sides
    kidneys = _kidneys(labels, found, geometry.voxel_ml)
    inside = sides[found.box.slices]
    middles = _middles(found, geometry)
    parenchyma = (labels[found.box.slices] == KIDNEY) & (found.numbers == kidneys[0])
    cut = _cut(parenchyma, found.box, geometry, midline)
    if cut is not None:
        for side, numbers, x in zip(inside, found.numbers, _x(found.box, geometry), strict=True):
            side[...] = np.where(numbers == 0, 0, np.where(x > cut, CODES[RIGHT], CODES[LEFT]))
        return sides
    by_number = np.zeros(found.sizes.size, np.uint8)
    own = middles[kidneys[0]]
    if len(kidneys) == 2 and abs(own - middles[kidneys[1]]) >= MIN_APART_MM:
        first_is_right = own > middles[kidneys[1]]
        by_number[kidneys] = (CODES[RIGHT], CODES[LEFT]) if first_is_right else (CODES[LEFT], CODES[RIGHT])
        _give_to_nearer(by_number, found, geometry.spacing)
    else:
        mine, other = (CODES[RIGHT], CODES[LEFT]) if own > midline else (CODES[LEFT], CODES[RIGHT])
        across = ((middles > midline) != (own > midline)) & (np.abs(middles - own) >= MIN_APART_MM)
        by_number[1:] = np.where(across, other, mine)[1:]
    inside[...] = by_number[found.numbers]
    return sides


def find_midline(geometry: Geometry, box: Box, hu: NDArray[Any] | None) -> float:
    """The x in mm (RAS+) of the midline: the body's in a CT (D, H, W), in the slices of a box; else the frame's."""
    return frame_midline(geometry) if hu is None else body_midline(hu, geometry, box)


def frame_midline(geometry: Geometry) -> float:
    """The x in mm (RAS+) of the scan's centre, where patients are usually positioned."""
    return float(_world_x(np.array([[(n - 1) / 2 for n in geometry.shape]]), geometry)[0])


def body_midline(hu: NDArray[Any], geometry: Geometry, box: Box) -> float:
    """The x in mm (RAS+) of the body's midline in a CT (D, H, W), in the slices of a box.

    It is the mean over all voxels that are not air, subsampled by four in the plane; the table is centred too. If there
    is only air, it is the centre of the scan.
    """
    step = 4
    start, stop = box.start[0], box.stop[0]
    body = hu[start:stop, ::step, ::step] > BODY_HU
    if not body.any():
        return frame_midline(geometry)
    return float(_world_x(np.argwhere(body) * (1, step, step) + (start, 0, 0), geometry).mean())


def _kidneys(labels: NDArray[np.uint8], found: Components, voxel_ml: float) -> list[int]:
    """The one or two components that are kidneys, the larger first; without parenchyma, the largest component."""
    parenchyma = np.bincount(found.numbers[labels[found.box.slices] == KIDNEY], minlength=found.sizes.size)
    holding = np.where(parenchyma * voxel_ml >= HOLD_ML, found.sizes, 0)
    sizes = holding if holding.any() else found.sizes
    chosen = np.flatnonzero(kidneys_among(sizes, voxel_ml))
    return [int(number) for number in chosen[np.argsort(-sizes[chosen], kind="stable")]]


def _give_to_nearer(by_number: NDArray[np.uint8], found: Components, spacing: tuple[float, float, float]) -> None:
    """Assign every component without a side to the kidney with the nearer surface."""
    if by_number[1:].all():
        return
    from scipy.spatial import cKDTree  # imported here: predicting a scan can begin without it

    by_voxel = by_number[found.numbers]
    stray = np.argwhere((found.numbers > 0) & (by_voxel == 0))
    numbers = found.numbers[tuple(stray.T)]
    distances = []
    for code in NAMES:
        kidney = by_voxel == code
        box = bounding_box(kidney)
        assert box is not None
        kidney = kidney[box.slices]
        surface = (np.argwhere(kidney & ~ndimage.binary_erosion(kidney)) + box.start) * spacing
        nearest = np.full(by_number.size, np.inf)
        np.minimum.at(nearest, numbers, cKDTree(surface).query(stray * spacing)[0])
        distances.append(nearest)
    free = np.flatnonzero(by_number == 0)[1:]
    by_number[free] = np.array(list(NAMES), np.uint8)[np.argmin(distances, axis=0)[free]]


def _cut(parenchyma: NDArray[np.bool_], box: Box, geometry: Geometry, midline: float) -> float | None:
    """The x that separates parenchyma on both sides of the midline into two kidneys; None for one kidney.

    The best two groups along x (Otsu's threshold) must both have a kidney's volume, be far enough apart, and have the
    midline between them; the cut is at the least parenchyma between their centres.
    """
    if not parenchyma.any():
        return None
    low = min(float(x[plane].min()) for plane, x in zip(parenchyma, _x(box, geometry), strict=True) if plane.any())
    step = float(np.abs(geometry.affine[0, :3]).max())
    width = step * max(round(_BIN_MM / step), 1)  # the same number of voxels in each bin
    areas = _areas(parenchyma, _x(box, geometry), low - step / 2, width)
    centres = low - step / 2 + (np.arange(areas.size) + 0.5) * width
    below = np.cumsum(areas)[:-1]
    above = areas.sum() - below
    moments = np.cumsum(areas * centres)
    if not below.size:
        return None
    middle_below, middle_above = moments[:-1] / below, (moments[-1] - moments[:-1]) / above
    best = int(np.argmax(below * above * (middle_above - middle_below) ** 2))
    left, right = float(middle_below[best]), float(middle_above[best])
    sizes = np.array([0, below[best], above[best]], np.int64)
    can_be = kidneys_among(sizes, geometry.voxel_ml).sum() == 2
    if not can_be or right - left < MIN_APART_MM or not left < midline < right:
        return None
    between = np.flatnonzero((centres >= left) & (centres <= right))
    return float(np.median(centres[between[areas[between] == areas[between].min()]]))


def _areas(mask: NDArray[np.bool_], x: Iterable[NDArray[np.float64]], low: float, width: float) -> NDArray[np.float64]:
    """The number of voxels of a mask in each bin of ``width`` mm along x, starting at ``low`` mm."""
    slices = [np.bincount(((across[plane] - low) / width).astype(int)) for plane, across in zip(mask, x, strict=True)]
    areas = np.zeros(max(len(counts) for counts in slices))
    for counts in slices:
        areas[: len(counts)] += counts
    return areas


def _middles(found: Components, geometry: Geometry) -> NDArray[np.float64]:
    """The x in mm (RAS+) of the centre of mass of each component, by number; the value of number 0 is meaningless."""
    total = np.zeros(found.sizes.size)
    for numbers, x in zip(found.numbers, _x(found.box, geometry), strict=True):
        total += np.bincount(numbers.ravel(), weights=x.ravel(), minlength=total.size)
    middles: NDArray[np.float64] = total / np.maximum(found.sizes, 1)
    return middles


def _x(box: Box, geometry: Geometry) -> Iterator[NDArray[np.float64]]:
    """The x in mm (RAS+) of each voxel of a box, yielded slice by slice, (h, w) each, to save memory."""
    rows, columns = np.indices(box.size[1:], sparse=True)
    for z in range(box.size[0]):
        down, back, left = (axis + first for axis, first in zip((z, rows, columns), box.start, strict=True))
        of_voxel = geometry.affine[0]
        yield down * of_voxel[0] + back * of_voxel[1] + left * of_voxel[2] + of_voxel[3]


def _world_x(voxels: NDArray[Any], geometry: Geometry) -> NDArray[np.float64]:
    x: NDArray[np.float64] = voxels @ geometry.affine[0, :3] + geometry.affine[0, 3]
    return x
