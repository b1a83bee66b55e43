"""What is known about a real body: distances to its kidneys, vessels, the renal sinus, places for lesions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import edt
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from kitseg.components import Components, kidneys_among

BODY = -200.0  # HU from which it is the patient
FAR, CLEAR = 60.0, 45.0  # mm, where distances are cut off; less, also in the smallest patients
NATIVE = 60.0  # HU of the parenchyma, below which a scan has no contrast
VESSEL, SINUS = 1, -1  # in ``RealBody.tissue``
CLOSING, DEPTH = 9.0, 5.0  # mm: the sinus is what closing a kidney by so much fills, where it is this deep
PLACES = 40_000
Mask = NDArray[np.bool_]
Floats = NDArray[np.float32]
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class KidneyBox:
    """One kidney of a body: centre and half the size of its bounding box in mm from the centre of voxel 0."""

    centre: tuple[float, float, float]
    radii: tuple[float, float, float]


@dataclass(frozen=True)
class Facts:
    """Numbers about a body: HU of parenchyma, deviation of fine noise in HU, its kidneys, row of the back in mm."""

    parenchyma: float
    noise: float
    back: float
    kidneys: tuple[KidneyBox, ...]


@dataclass(frozen=True)
class RealBody:
    """A body on a grid, as (D, H, W) arrays that may be memory-mapped.

    name: of its case; hu: the scan; distance: mm to the kidneys' surface, negative inside, at most ``FAR``; tissue:
    ``VESSEL``, ``SINUS`` or 0; places: (N, 5) voxels (slice, row, column) where a lesion may be centred, each with its
    distance and whether it is in the sinus; spacing: mm.
    """

    name: str
    hu: NDArray[np.int16]
    distance: NDArray[np.float16]
    tissue: NDArray[np.int8]
    places: Floats
    spacing: tuple[float, float, float]
    facts: Facts

    def somewhere(self, rng: Generator) -> Vector:
        """A point of the body in mm from the centre of voxel 0, or after some tries one outside."""
        for _ in range(8):
            voxel: Vector = rng.uniform(0, 1, 3) * (np.array(self.hu.shape) - 1)
            if self.hu[tuple(voxel.astype(int))] > BODY:
                break
        return voxel * self.spacing


def any_voxel(hu: Tensor, distance: Tensor, least: float, rng: Generator) -> Vector | None:
    """A random voxel (slice, row, column) of the patient, ``least`` mm or more from the kidneys; None without one.

    Of every fourth voxel along each axis.
    """
    coarse = (slice(None, None, 4),) * 3
    voxels = np.argwhere(((hu[coarse] > BODY) & (distance[coarse] > least)).numpy())
    return 4.0 * voxels[int(rng.integers(len(voxels)))] if len(voxels) else None


def signed_distance(mask: Mask, spacing: Sequence[float]) -> Floats:
    """Distance of each voxel's centre to the surface of a mask in mm, negative inside."""
    outside, inside = (edt.edt(np.ascontiguousarray(m), tuple(map(float, spacing))) for m in (~mask, mask))
    half = np.float32(0.5 * min(spacing))
    distance: Floats = np.where(mask, half - inside, outside - half).astype(np.float32)
    return distance


def kidney_distance(mask: Mask, spacing: Sequence[float]) -> Floats:
    """``signed_distance`` to the kidneys, smoothed by half a voxel and cut off at ``FAR``; empty masks are far away."""
    distance = np.full(mask.shape, FAR, np.float32)
    found = Components.of(mask)
    if found.sizes.any():
        grown = found.box.grown(int(np.ceil(FAR / min(spacing)))).clip(mask.shape).slices
        near = ndimage.gaussian_filter(signed_distance(mask[grown], spacing), 0.5)
        distance[grown] = near.clip(-FAR, FAR)
    return distance


def describe(hu: NDArray[Any], distance: Floats, spacing: Sequence[float]) -> tuple[dict[str, NDArray[Any]], Facts]:
    """The arrays ``distance``, ``tissue`` and ``places`` of a body, and its facts, from HU and kidney distance.

    Raises:
        ValueError: no kidney.
    """
    kidney = distance < 0
    if not kidney.any():
        raise ValueError("it has no kidney")
    smooth = hu.astype(np.float32)
    sinus = sinus_of(kidney, distance, spacing)
    tissue = np.where(sinus, SINUS, vessels(smooth, spacing) & (distance > 3)).astype(np.int8)
    deep = smooth[distance < -4] if (distance < -4).any() else smooth[kidney]
    facts = Facts(float(deep.mean()), noise_level(smooth), _back(smooth, spacing), _kidneys(kidney, spacing))
    places = _places(smooth, distance, sinus)
    return {"distance": distance.astype(np.float16), "tissue": tissue, "places": places}, facts


def vessels(hu: Floats, spacing: Sequence[float]) -> Mask:
    """Aorta, cava and large branches in contrast: homogeneous, bright and thin, unlike bone, spleen and heart."""
    size = [2 * max(1, round(3 / mm)) + 1 for mm in spacing]
    mean = ndimage.uniform_filter(hu, size)
    deviation = np.sqrt(np.maximum(ndimage.uniform_filter(hu**2, size) - mean**2, 0))
    bright, across = mean > 115, (float(spacing[1]), float(spacing[2]))
    thick = np.zeros(hu.shape, np.bool_)
    for part, plane in zip(thick, bright, strict=True):
        core = edt.edt(np.ascontiguousarray(plane), across) >= 12
        part[:] = edt.edt(np.ascontiguousarray(~core), across) <= 17 if core.any() else False
    found = ndimage.binary_opening(bright & (deviation < 45) & ~thick)
    found |= ndimage.binary_opening((mean > 330) & (deviation < 60))  # a bright aorta beside the spine
    grown: Mask = _ball(found, 4.5, spacing) & (hu > 50)
    return grown


def noise_level(hu: Floats) -> float:
    """The standard deviation of the fine noise in homogeneous soft tissue, in HU."""
    fine = hu - ndimage.gaussian_filter(hu, 1.0)
    local, mean = np.sqrt(np.maximum(ndimage.uniform_filter(fine**2, 5), 0)), ndimage.uniform_filter(hu, 5)
    tissue = local[(mean > 20) & (mean < 150)]
    return float(np.percentile(tissue, 20) * 1.1) if tissue.size else 8.0


def sinus_of(kidney: Mask, distance: Floats, spacing: Sequence[float]) -> Mask:
    """Fat, pelvis and vessels in the hollow of each kidney."""
    near = Components.of(distance < CLOSING + 3).box.slices
    hull = signed_distance(distance[near] < CLOSING, spacing) + CLOSING
    parts = Components.of((hull < 0) & ~kidney[near])
    deep = np.bincount(parts.numbers[hull[parts.box.slices] < -DEPTH], minlength=len(parts.sizes)) > 0
    sinus = np.zeros(kidney.shape, np.bool_)
    sinus[near] = parts.chosen(deep)
    return sinus


def _back(hu: Floats, spacing: Sequence[float]) -> float:
    """The row of the patient's back in mm: the last one of which the body takes a tenth."""
    rows = np.flatnonzero((hu > -300).mean((0, 2)) > 0.1)
    return float(rows[-1] * spacing[1]) if rows.size else float(hu.shape[1] * spacing[1])


def _kidneys(kidney: Mask, spacing: Sequence[float]) -> tuple[KidneyBox, ...]:
    parts = Components.of(kidney)
    chosen = kidneys_among(parts.sizes, float(np.prod(spacing)) / 1000)
    found = []
    for number in np.flatnonzero(chosen):
        box, mm = Components.of(parts.chosen(np.arange(len(parts.sizes)) == number)).box, np.array(spacing)
        first, last = np.array(box.start) * mm, (np.array(box.stop) - 1) * mm
        found.append(KidneyBox(*(_triple(v) for v in ((first + last) / 2, (last - first + mm) / 2))))
    return tuple(found)


def _triple(values: NDArray[np.float64]) -> tuple[float, float, float]:
    z, y, x = map(float, values)
    return z, y, x


def _places(hu: Floats, distance: Floats, sinus: Mask) -> Floats:
    """Voxels in and near the kidneys, outside in fat only: (slice, row, column, distance, in the sinus)."""
    soft = ndimage.uniform_filter(hu, 3)
    usable = (distance > -25) & (distance < 20) & ((distance < 1) | sinus | ((soft < -20) & (soft > -180)))
    voxels = np.argwhere(usable)
    if len(voxels) > PLACES:
        voxels = voxels[np.random.default_rng(0).permutation(len(voxels))[:PLACES]]
    at = tuple(voxels.T)
    return np.column_stack([voxels, distance[at], sinus[at]]).astype(np.float32)


def _ball(mask: Mask, mm: float, spacing: Sequence[float]) -> Mask:
    """A mask dilated by a distance."""
    if not mask.any():
        return mask
    grown: Mask = edt.edt(np.ascontiguousarray(~mask), tuple(map(float, spacing))) <= mm
    return grown
