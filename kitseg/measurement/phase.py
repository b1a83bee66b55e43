"""The contrast phase of a scan, from the HU of its kidneys and of its aorta, which is detected without a network."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from kitseg.components import bounding_box
from kitseg.labels import KIDNEY
from kitseg.types import Box, Geometry, Volume

UNENHANCED, ARTERIAL = "unenhanced", "arterial (corticomedullary)"
NEPHROGRAPHIC, LATE = "nephrographic (portal venous)", "excretory (delayed)"
ENHANCED, LATE_AORTA, ARTERIAL_LEAD = 65.0, 110.0, 20.0  # HU

PIXEL, SLICE = 1.5, 3.0  # mm, of the grid for the search of the aorta
RADII = (6.0, 7.5, 9.0, 11.0, 13.0, 15.0, 17.0)  # mm
TO_LEFT, TO_RIGHT = 40.0, 20.0  # mm from the spine's centre, allowed for the aorta's centre
ABOVE, BELOW = 75.0, 30.0  # mm in front of and behind the kidneys' centre
MARGIN = 24.0  # mm around the allowed positions of its centre
FAT, BONE, EDGE = -90.0, 180.0, 30.0  # HU
DIRECTIONS = 16
MIN_SCORE, MIN_MEAN, MIN_LENGTH = 0.35, 0.54, 20.0  # of a disc; of the chain; mm along the body
MIN_KIDNEY_VOXELS = 100

Floats = NDArray[np.float32]


def kidney_hu(hu: NDArray[Any], labels: NDArray[np.uint8]) -> float | None:
    """The median HU of the parenchyma: label kidney eroded by one voxel within each slice.

    The whole label is used if erosion would leave almost nothing. hu, labels: (D, H, W). None without a kidney.
    """
    kidney = labels == KIDNEY
    box = bounding_box(kidney)
    if box is None:
        return None
    kidney = kidney[box.slices]
    inner = ndimage.binary_erosion(kidney, np.ones((1, 3, 3), np.bool_))
    chosen = inner if np.count_nonzero(inner) >= MIN_KIDNEY_VOXELS else kidney
    return float(np.median(hu[box.slices][chosen]))


def contrast(scan: Volume, labels: NDArray[np.uint8]) -> dict[str, float | None]:
    """``kidney_hu`` and ``aorta_hu`` of a scan and its labels (D, H, W), by name."""
    hu = scan.array
    return {"kidney_hu": kidney_hu(hu, labels), "aorta_hu": aorta_hu(hu, labels, scan.geometry)}


def aorta_hu(hu: NDArray[Any], labels: NDArray[np.uint8], geometry: Geometry) -> float | None:
    """The HU of the aorta at the level of the kidneys; None if no vessel resembles it.

    Each slice with a kidney is searched for discs of 12 to 34 mm that are homogeneous, have edges on all sides, and lie
    in front of bone and near the spine's centre. The best chain of neighboring discs along the body is the aorta
    (dynamic programming); the result is the median over the inner halves of its discs.

    hu, labels: (D, H, W) in orientation (I, P, L); geometry: of both. In an unenhanced scan the vena cava has the same
    HU and may be found instead of the aorta.
    """
    level = bounding_box(labels != 0)
    if level is None or (level.size[0] * geometry.spacing[0]) < MIN_LENGTH:
        return None
    scan = _around_the_spine(hu, labels, geometry, level)
    if scan is None:
        return None
    score, inner = _discs(scan)
    chain = (np.arange(len(score)), *_best_chain(score).T)
    fits = score[chain]
    good = fits >= MIN_SCORE
    if fits.mean() < MIN_MEAN or np.count_nonzero(good) < good.size / 2:
        return None
    return float(np.median(inner[chain][good]))


def contrast_phase(kidney: float | None, aorta: float | None) -> str | None:
    """The name of the contrast phase from the two HU; None if they don't determine it.

    Contrast reaches the aorta first, then cortex and medulla, and then washes out of both: an aorta well above the
    parenchyma means arterial, otherwise a bright aorta means nephrographic, and a faint aorta with an enhanced kidney
    means a later phase. Without an aorta only the unenhanced phase is recognized. docs/explanation/quality.md has
    sources and limits.
    """
    if kidney is None:
        return None
    if aorta is None:
        return UNENHANCED if kidney < ENHANCED else None
    if aorta >= LATE_AORTA:
        return ARTERIAL if aorta > kidney + ARTERIAL_LEAD else NEPHROGRAPHIC
    if kidney >= ENHANCED:
        return LATE
    return UNENHANCED if aorta < ENHANCED else None


def _around_the_spine(hu: NDArray[Any], labels: NDArray[np.uint8], geometry: Geometry, level: Box) -> Floats | None:
    """The search region of the aorta on a grid of SLICE x PIXEL mm; kidneys and tumors are replaced by fat."""
    dz, dy, dx = geometry.spacing
    middle_row = int(np.flatnonzero((labels[level.slices] != 0).any(axis=(0, 2))).mean()) + level.start[1]
    step = max(1, round(SLICE / dz))
    slices = slice(level.start[0], level.stop[0], step)
    column = _spine_column(hu[slices, middle_row:], labels[slices, middle_row:], dx)
    if column is None:
        return None
    start = (middle_row - round((ABOVE + MARGIN) / dy), column - round((TO_RIGHT + MARGIN) / dx))
    stop = (middle_row + round((BELOW + MARGIN) / dy), column + round((TO_LEFT + MARGIN) / dx))
    rows, columns = (np.arange(a, b) for a, b in zip(start, stop, strict=True))
    index = np.ix_(
        np.arange(slices.start, slices.stop, step),
        rows.clip(0, geometry.shape[1] - 1),
        columns.clip(0, geometry.shape[2] - 1),
    )
    scan = hu[index].astype(np.float32)
    scan[labels[index] != 0] = FAT
    width = (1, max(1, round(PIXEL / dy)), max(1, round(PIXEL / dx)))
    scan = ndimage.uniform_filter(scan, width)
    scan = ndimage.zoom(scan, (1, dy / PIXEL, dx / PIXEL), order=1, grid_mode=True, mode="nearest")
    smooth: Floats = ndimage.gaussian_filter(scan, (0, 0.7, 0.7))
    return smooth


def _spine_column(hu: NDArray[Any], labels: NDArray[np.uint8], dx: float) -> int | None:
    """The column with the most bone around it; None without bone."""
    bone = np.count_nonzero((hu > BONE) & (labels == 0), axis=(0, 1)).astype(np.float64)
    if not bone.any():
        return None
    return int(np.argmax(ndimage.gaussian_filter1d(bone, 15 / dx)))


def _discs(scan: Floats) -> tuple[Floats, Floats]:
    """How well each disc matches an aorta, and the mean HU of its inner half: (slices, radii, rows, columns)."""
    pairs = [_disc(scan, radius) for radius in RADII]
    score, inner = (np.stack(part, axis=1) for part in zip(*pairs, strict=True))
    return score, inner


def _disc(scan: Floats, radius: float) -> tuple[Floats, Floats]:
    """The same for one radius: (slices, rows, columns), without the margin."""
    mean = _disc_mean(scan, radius - 1.5)
    spread = np.sqrt(np.maximum(_disc_mean(scan**2, radius - 1.5) - mean**2, 0))
    darker, brighter = np.zeros_like(mean), np.zeros_like(mean)
    for angle in np.arange(DIRECTIONS) * 2 * np.pi / DIRECTIONS:
        outside = _shifted(scan, (radius + 3) * np.sin(angle), (radius + 3) * np.cos(angle)) - mean
        darker += outside < -EDGE
        brighter += outside > EDGE
    score = (darker + np.minimum(brighter, DIRECTIONS / 4)) / DIRECTIONS - spread / 60
    score -= 0.5 * (_bone_behind(scan, radius) < 0.15)
    right = TO_RIGHT - np.arange(score.shape[2]) * PIXEL
    score -= 0.2 * np.clip(right / TO_RIGHT, 0, 1)
    return score.astype(np.float32), _disc_mean(scan, radius / 2)


def _disc_mean(scan: Floats, radius: float) -> Floats:
    """The mean over a disc around each pixel inside the margin."""
    from scipy import signal  # its import takes half a second, which most commands don't need

    reach = int(radius / PIXEL)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1] * PIXEL
    kernel = (y**2 + x**2 <= radius**2).astype(np.float32)
    mean = signal.oaconvolve(scan, kernel[None] / kernel.sum(), mode="same", axes=(1, 2))
    return _shifted(mean.astype(np.float32), 0, 0)


def _shifted(scan: Floats, down: float, right: float) -> Floats:
    """The values at an offset in mm to posterior and to the patient's left, for each pixel inside the margin."""
    margin = round(MARGIN / PIXEL)
    y, x = margin + round(down / PIXEL), margin + round(right / PIXEL)
    return scan[:, y : y + scan.shape[1] - 2 * margin, x : x + scan.shape[2] - 2 * margin]


def _bone_behind(scan: Floats, radius: float) -> Floats:
    """The share of bone in a box of 15 by 18 mm behind the disc; the maximum within 12 mm along the body."""
    size = (1, round(15 / PIXEL), round(18 / PIXEL))
    share = ndimage.uniform_filter((scan > BONE).astype(np.float32), size)
    share = ndimage.maximum_filter(share, (round(24 / SLICE) + 1, 1, 1))
    behind = min(radius + 8.5, MARGIN)
    return _shifted(share, behind, 0)


def _best_chain(score: Floats) -> NDArray[np.intp]:
    """The disc (radius, row, column) of each slice in the chain with the best sum.

    From slice to slice the radius changes by at most one step and the position by at most two pixels per axis.
    """
    total = np.empty_like(score)
    total[0] = score[0]
    for z in range(1, len(score)):
        total[z] = score[z] + ndimage.maximum_filter(total[z - 1], (3, 5, 5))
    path = np.empty((len(score), 3), np.intp)
    path[-1] = np.unravel_index(np.argmax(total[-1]), total.shape[1:])
    for z in range(len(score) - 2, -1, -1):
        low = np.maximum(path[z + 1] - (1, 2, 2), 0)
        near = total[z][tuple(slice(a, b) for a, b in zip(low, path[z + 1] + (2, 3, 3), strict=True))]
        path[z] = low + np.unravel_index(np.argmax(near), near.shape)
    return path
