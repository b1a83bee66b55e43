"""Apply a registration to scans and labels, and judge its quality (pure functions)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from kitseg.labels import TUMOR
from kitseg.scoring.kits19 import dice
from kitseg.types import Geometry, Volume
from kitseg.volumes.resample import sample_linear, to_grid

Field = NDArray[np.float32]
Point = NDArray[np.float64]

AIR = -1000  # HU outside the floating scan
SLAB = 16  # slices that are warped at a time


@dataclass(frozen=True)
class Warp:
    """The map from points of the reference to points of the floating scan.

    field: (3, d, h, w) displacements in mm along z, y and x on a grid over the reference's extent, with linear
    interpolation and edge padding; spacing: of that grid.
    """

    field: Field
    spacing: Point

    @property
    def jacobian(self) -> Field:
        """(d, h, w) Jacobian determinant of the map: the local volume change; negative where the map folds."""
        rows = np.empty((*self.field.shape[1:], 3, 3), np.float32)
        for i, part in enumerate(self.field):
            for j, mm in enumerate(self.spacing):
                rows[..., i, j] = np.gradient(part, mm, axis=j) + (i == j)
        determinant: Field = np.linalg.det(rows)
        return determinant


@dataclass(frozen=True)
class RegistrationQuality:
    """The quality of a registered copy; volumes are relative to those of the floating scan.

    dice_before, dice_after: Dice of the foreground with the reference's, after the initial alignment and after
    registration; tumor_before, tumor_after: of the tumors; least: smallest Jacobian determinant; folded: fraction of
    voxels where it isn't positive; volume: of the foreground; tumor: of the tumor, None without a tumor; covered:
    fraction of the floating foreground that is in the copy.
    """

    dice_before: float
    dice_after: float
    tumor_before: float
    tumor_after: float
    least: float
    folded: float
    volume: float
    tumor: float | None
    covered: float


def warped(warp: Warp, floating: Volume, onto: Geometry) -> NDArray[Any]:
    """Warp HU (int16 or float32; linear, air outside) or labels (uint8; nearest, background outside) to a geometry."""
    labels = floating.array.dtype == np.uint8
    out = np.empty(onto.shape, floating.array.dtype)
    lattice = np.array(warp.field.shape[1:])
    for first in range(0, onto.shape[0], SLAB):
        voxels = (np.arange(first, min(first + SLAB, onto.shape[0])), *map(np.arange, onto.shape[1:]))
        places = [(v + 0.5) * n / m - 0.5 for v, n, m in zip(voxels, lattice, onto.shape, strict=True)]
        there = np.stack([sample_linear(part, *places) for part in warp.field])
        for axis, (v, mm, step) in enumerate(zip(voxels, onto.spacing, floating.geometry.spacing, strict=True)):
            there[axis] += np.expand_dims((v + 0.5) * mm, tuple({0, 1, 2} - {axis}))
            there[axis] = there[axis] / step - 0.5
        how: dict[str, Any] = {"order": 0, "cval": 0} if labels else {"order": 1, "cval": AIR, "output": np.float32}
        values = ndimage.map_coordinates(floating.array, there, mode="constant", **how)
        out[first : first + SLAB] = np.rint(values) if out.dtype == np.int16 else values
    return out


def judge(
    warp: Warp, copies: tuple[NDArray[np.uint8], NDArray[np.uint8]], reference: Volume, floating: Volume
) -> RegistrationQuality:
    """The quality of a copy: its labels ``copies`` before and after registration against those of the two scans."""
    before, after = copies
    squeezed = warp.jacobian
    counted = float(to_grid(squeezed, after.shape)[after > 0].sum()) * reference.geometry.voxel_ml
    foreground, tumor = (float(mask.sum()) * floating.geometry.voxel_ml for mask in _masks(floating.array))
    volumes = [float(mask.sum()) * reference.geometry.voxel_ml for mask in _masks(after)]
    truth = _masks(reference.array)
    dice_before, tumor_before = (dice(a, b) for a, b in zip(_masks(before), truth, strict=True))
    dice_after, tumor_after = (dice(a, b) for a, b in zip(_masks(after), truth, strict=True))
    return RegistrationQuality(
        dice_before, dice_after, tumor_before, tumor_after, float(squeezed.min()), float((squeezed <= 0).mean()),
        volumes[0] / foreground, volumes[1] / tumor if tumor else None, counted / foreground,
    )  # fmt: skip


def problem(quality: RegistrationQuality) -> str | None:
    """Why a copy is unsuitable for training; None if it is suitable.

    In a fold, anatomy appears twice and mirrored. A foreground of less than half or more than double its volume is
    implausible between two adults. If more than a tenth of the foreground is missing, a kidney is cut off by the
    border; if the tumor is lost, the labels are wrong. If the overlap decreased, the registration failed.
    """
    reasons = {
        f"folding: the smallest Jacobian determinant is {quality.least:.2f}": quality.least <= 0,
        f"the foreground's volume changed by a factor of {quality.volume:.2f}": not 0.5 <= quality.volume <= 2,
        f"only {quality.covered:.0%} of the foreground is in the copy": quality.covered < 0.9,
        "the tumor is lost": quality.tumor == 0,
        f"the overlap fell from {quality.dice_before:.2f} to {quality.dice_after:.2f}": quality.dice_after
        < quality.dice_before,
    }
    return "; ".join(reason for reason, holds in reasons.items() if holds) or None


def _masks(labels: NDArray[np.uint8]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    return labels > 0, labels == TUMOR
