"""Which kidney is the patient's right one and which the left one, and whose a lesion is.

Sides follow from the affine (x of RAS+ grows to the patient's right), never from the order of the array's axes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from kitseg.components import Components, kidneys_among
from kitseg.labels import BACKGROUND, KIDNEY
from kitseg.measure.findings import LEFT, RIGHT
from kitseg.types import Box, Geometry

CODES = {RIGHT: 1, LEFT: 2}
NAMES = {code: name for name, code in CODES.items()}

HOLD_ML = 1.0  # parenchyma that makes a component more than a lesion by itself
MIN_APART_MM = 50.0  # across the body, between the middles of two kidneys
BODY_HU = -200
_BIN_MM = 2.0


def side_map(labels: NDArray[np.uint8], geometry: Geometry, midline: float) -> NDArray[np.uint8]:
    """The side of every voxel of a label map (D, H, W): 0 background, 1 right, 2 left (``CODES``).

    Kidneys are the 26-connected components of the foreground that can be one (``components.kidneys_among``) and hold
    parenchyma. Two of them, far enough apart across the body, are right and left by their position to each other, and
    smaller components belong to the nearer one. A single kidney is on its side of the midline, and so is the rest of
    the foreground but for what lies on the other side of the midline and as far from it as another kidney would. One
    that reaches to both sides (a horseshoe kidney, or both joined by a tumor) is cut where its parenchyma is thinnest
    between its two halves.

    Args:
        labels: any label but 0 is foreground.
        geometry: of the labels.
        midline: x in mm (RAS+) of the patient's middle.
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


def frame_midline(geometry: Geometry) -> float:
    """Where the scan's middle is, x in mm (RAS+): patients are laid with theirs there."""
    return float(_world_x(np.array([[(n - 1) / 2 for n in geometry.shape]]), geometry)[0])


def body_midline(hu: NDArray[Any], geometry: Geometry, box: Box) -> float:
    """Where the middle of the body is in a CT (D, H, W), x in mm (RAS+), in the slices of a box.

    The mean of all voxels that aren't air, every fourth of them across the slice; the table lies in the same middle.
    The frame's middle where there is only air.
    """
    step = 4
    start, stop = box.start[0], box.stop[0]
    body = hu[start:stop, ::step, ::step] > BODY_HU
    if not body.any():
        return frame_midline(geometry)
    return float(_world_x(np.argwhere(body) * (1, step, step) + (start, 0, 0), geometry).mean())


def _kidneys(labels: NDArray[np.uint8], found: Components, voxel_ml: float) -> list[int]:
    """The one or two components that are kidneys, the larger first; without any parenchyma, the largest can be."""
    parenchyma = np.bincount(found.numbers[labels[found.box.slices] == KIDNEY], minlength=found.sizes.size)
    holding = np.where(parenchyma * voxel_ml >= HOLD_ML, found.sizes, 0)
    sizes = holding if holding.any() else found.sizes
    chosen = np.flatnonzero(kidneys_among(sizes, voxel_ml))
    return [int(number) for number in chosen[np.argsort(-sizes[chosen], kind="stable")]]


def _give_to_nearer(by_number: NDArray[np.uint8], found: Components, spacing: tuple[float, float, float]) -> None:
    """Give every component without a side that of the kidney whose surface is nearer."""
    if by_number[1:].all():
        return
    by_voxel = by_number[found.numbers]
    stray = np.argwhere((found.numbers > 0) & (by_voxel == 0))
    numbers = found.numbers[tuple(stray.T)]
    distances = []
    for code in NAMES:
        kidney = by_voxel == code
        surface = np.argwhere(kidney & ~ndimage.binary_erosion(kidney)) * spacing
        nearest = np.full(by_number.size, np.inf)
        np.minimum.at(nearest, numbers, cKDTree(surface).query(stray * spacing)[0])
        distances.append(nearest)
    free = np.flatnonzero(by_number == 0)[1:]
    by_number[free] = np.array(list(NAMES), np.uint8)[np.argmin(distances, axis=0)[free]]


def _cut(parenchyma: NDArray[np.bool_], box: Box, geometry: Geometry, midline: float) -> float | None:
    """The x at which parenchyma that lies on both sides of the midline falls into two kidneys; None for one kidney.

    The best two groups along x (Otsu's threshold) must both be able to be a kidney, lie far enough apart, and have the
    midline between them; the cut is where the least parenchyma is, between their middles.
    """
    if not parenchyma.any():
        return None
    low = min(float(x[plane].min()) for plane, x in zip(parenchyma, _x(box, geometry), strict=True) if plane.any())
    areas = _areas(parenchyma, _x(box, geometry), low)
    centres = low + (np.arange(areas.size) + 0.5) * _BIN_MM
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


def _areas(mask: NDArray[np.bool_], x: Iterable[NDArray[np.float64]], low: float) -> NDArray[np.float64]:
    """How many voxels of a mask lie in each bin along x, from ``low`` mm on."""
    slices = [np.bincount(((across[plane] - low) / _BIN_MM).astype(int)) for plane, across in zip(mask, x, strict=True)]
    areas = np.zeros(max(len(counts) for counts in slices))
    for counts in slices:
        areas[: len(counts)] += counts
    return areas


def _middles(found: Components, geometry: Geometry) -> NDArray[np.float64]:
    """The x in mm (RAS+) of the centre of mass of each component, by number; that of number 0 means nothing."""
    total = np.zeros(found.sizes.size)
    for numbers, x in zip(found.numbers, _x(found.box, geometry), strict=True):
        total += np.bincount(numbers.ravel(), weights=x.ravel(), minlength=total.size)
    middles: NDArray[np.float64] = total / np.maximum(found.sizes, 1)
    return middles


def _x(box: Box, geometry: Geometry) -> Iterator[NDArray[np.float64]]:
    """The x in mm (RAS+) of each voxel of a box, slice by slice, (h, w) each: of all at once there may be gigabytes."""
    rows, columns = np.indices(box.size[1:], sparse=True)
    for z in range(box.size[0]):
        down, back, left = (axis + first for axis, first in zip((z, rows, columns), box.start, strict=True))
        of_voxel = geometry.affine[0]
        yield down * of_voxel[0] + back * of_voxel[1] + left * of_voxel[2] + of_voxel[3]


def _world_x(voxels: NDArray[Any], geometry: Geometry) -> NDArray[np.float64]:
    x: NDArray[np.float64] = voxels @ geometry.affine[0, :3] + geometry.affine[0, 3]
    return x
