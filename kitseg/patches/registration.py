"""Registered copies of labelled scans: one patient's scan and labels in the shape of another patient (pure).

``register`` → ``Warp`` → ``warped`` image and labels → ``judge``; ``register_copy`` does all of it. Points are in
millimetres (z, y, x) from the corner of their volume's first voxel: as the axes of both are (I, P, L), it doesn't
matter how two scans lie in their scanners.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage

from kitseg.labels import TUMOR
from kitseg.types import Geometry, Grid, Volume
from kitseg.volumes.resample import grid_geometry, nearest, sample_linear, to_grid

Field = NDArray[np.float32]
Point = NDArray[np.float64]

AIR = -1000  # HU where the floating scan has nothing
SLAB = 16  # slices that are warped at a time
BODY = -200  # HU that the air around a patient doesn't reach, and neither does the lung


@dataclass(frozen=True)
class Settings:
    """How two scans are registered.

    spacing: mm of the grid that the search works on; voxels: at most so many, the spacing grows with larger scans;
    low, high: HU that the intensities are clipped to; bins: of the mutual information; share: of the voxels it looks
    at; affine, demons: iterations a level; smoothing: of the displacements after each iteration, standard deviation in
    voxels of a level.
    """

    spacing: float = 4.0
    voxels: int = 3_000_000
    low: int = -250
    high: int = 250
    bins: int = 64
    share: float = 0.2
    affine: int = 60
    demons: int = 50
    smoothing: float = 1.0


@dataclass(frozen=True)
class Labelled:
    """A CT and its label map, both on the same lattice."""

    image: Volume
    label: Volume


@dataclass(frozen=True)
class Scan:
    """A labelled scan as the search sees it: HU and label ids (d, h, w) on a coarse lattice over the scan's extent."""

    image: NDArray[np.float32]
    label: NDArray[np.uint8]
    spacing: Point

    @property
    def middle(self) -> Point:
        """What is laid onto the other scan's: the foreground's middle slice, and the body's centre in the plane."""
        slices = np.flatnonzero((self.label > 0).any((1, 2)))
        if not slices.size:
            raise ValueError("there is no kidney in the labels")
        body = self.image[slices[0] : slices[-1] + 1] > BODY
        _, y, x = np.argwhere(body).mean(0) if body.any() else np.array(self.image.shape) / 2
        return (np.array([(slices[0] + slices[-1]) / 2, y, x]) + 0.5) * self.spacing


@dataclass(frozen=True)
class Warp:
    """Where each point of the reference lies in the floating scan.

    field: (3, d, h, w) mm to add along z, y and x, at the voxels of a lattice over the reference's extent, linear
    between them and held at the edges; spacing: of that lattice.
    """

    field: Field
    spacing: Point

    @property
    def jacobian(self) -> Field:
        """(d, h, w) determinant of the whole map's derivative: how much the floating scan was squeezed into a voxel.

        Negative where the map folds.
        """
        return jacobian(self.field, self.spacing)


@dataclass(frozen=True)
class RegistrationQuality:
    """What a registered copy is worth; volumes are ratios to those of the floating scan.

    dice_before, dice_after: overlap of the foreground with the reference's, when the middles lie on each other and
    after registration; tumor_before, tumor_after: of the tumors; least: smallest Jacobian determinant; folded: share of
    voxels where it isn't positive; volume: of the foreground; tumor: of the tumor, None where there is none;
    covered: share of the floating foreground that is in the copy.
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


@dataclass(frozen=True)
class Copy:
    """The floating scan's HU (D, H, W) and labels on the reference's own lattice, and what they are worth."""

    image: NDArray[np.int16]
    label: NDArray[np.uint8]
    quality: RegistrationQuality


def register_copy(reference: Labelled, floating: Labelled, settings: Settings) -> Copy:
    """The floating scan in the shape of the reference.

    Raises:
        ValueError: a scan without a kidney. RuntimeError: SimpleITK's search failed.
    """
    fixed, moving = coarse(reference, settings), coarse(floating, settings)
    start, found = shifted(fixed, moving), register(fixed, moving, settings)
    onto = reference.image.geometry
    label = warped(found, floating.label, onto)
    quality = judge(found, (warped(start, floating.label, onto), label), reference.label, floating.label)
    image = np.rint(warped(found, floating.image, onto))
    return Copy(np.clip(image, -(2**15), 2**15 - 1).astype(np.int16), label, quality)


def coarse(scan: Labelled, settings: Settings) -> Scan:
    """A labelled scan on the grid that the search works on."""
    image = scan.image
    extent = np.prod(np.array(image.geometry.shape) * image.geometry.spacing)
    spacing = max(settings.spacing, float(extent / settings.voxels) ** (1 / 3))
    lattice = grid_geometry(image.geometry, Grid(slices=spacing, inplane=spacing))
    hu = to_grid(np.clip(image.array, settings.low, settings.high), lattice.shape)
    return Scan(hu, nearest(scan.label.array, lattice.shape), np.array(lattice.spacing))


def register(reference: Scan, floating: Scan, settings: Settings) -> Warp:
    """Find the floating scan's points in the reference: an affine map, then diffeomorphic demons.

    The affine map maximizes Mattes' mutual information (two levels), the demons (Vercauteren et al. 2009; three levels,
    the finest on the given grid) follow the difference of the intensities. One thread, no randomness: the same scans
    and settings give the same warp.

    Raises:
        ValueError: a scan without foreground. RuntimeError: SimpleITK's search failed.
    """
    fixed, moving = (_as_itk(scan.image, scan.spacing, scan.middle) for scan in (reference, floating))
    affine = _affine(fixed, moving, settings)
    near = _onto(fixed, moving, affine)
    found = sitk.CompositeTransform([affine, sitk.DisplacementFieldTransform(_demons(fixed, near, settings))])
    lattice = (fixed.GetSize(), fixed.GetOrigin(), fixed.GetSpacing(), fixed.GetDirection())
    shifts = sitk.GetArrayFromImage(sitk.TransformToDisplacementField(found, sitk.sitkVectorFloat64, *lattice))
    field = np.moveaxis(shifts[..., ::-1], -1, 0) + between(reference, floating)[:, None, None, None]
    return Warp(field.astype(np.float32), reference.spacing)


def between(reference: Scan, floating: Scan) -> Point:
    """The way (z, y, x) in mm from the reference's middle to the floating scan's."""
    return floating.middle - reference.middle


def shifted(reference: Scan, floating: Scan) -> Warp:
    """The warp before registration: the middles lie on each other."""
    shift = between(reference, floating).astype(np.float32)
    return Warp(np.broadcast_to(shift[:, None, None, None], (3, 2, 2, 2)), reference.spacing)


def warped(warp: Warp, floating: Volume, onto: Geometry) -> NDArray[Any]:
    """The floating HU (int16 or float32; linear, air outside) or labels (uint8; nearest, background) on a lattice."""
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


def jacobian(field: NDArray[Any], spacing: Point) -> Field:
    """(d, h, w) determinant of I + ∂u/∂p for displacements u (3, d, h, w) in mm; central differences."""
    rows = np.empty((*field.shape[1:], 3, 3), np.float32)
    for i, part in enumerate(field):
        for j, mm in enumerate(spacing):
            rows[..., i, j] = np.gradient(part, mm, axis=j) + (i == j)
    determinant: Field = np.linalg.det(rows)
    return determinant


def judge(
    warp: Warp, copies: tuple[NDArray[np.uint8], NDArray[np.uint8]], reference: Volume, floating: Volume
) -> RegistrationQuality:
    """How good a copy is: its labels ``copies`` before and after registration against those of the two scans."""
    before, after = copies
    squeezed = warp.jacobian
    counted = float(to_grid(squeezed, after.shape)[after > 0].sum()) * reference.geometry.voxel_ml
    foreground, tumor = (float(mask.sum()) * floating.geometry.voxel_ml for mask in _masks(floating.array))
    volumes = [float(mask.sum()) * reference.geometry.voxel_ml for mask in _masks(after)]
    truth = _masks(reference.array)
    dice_before, tumor_before = (_dice(a, b) for a, b in zip(_masks(before), truth, strict=True))
    dice_after, tumor_after = (_dice(a, b) for a, b in zip(_masks(after), truth, strict=True))
    return RegistrationQuality(
        dice_before, dice_after, tumor_before, tumor_after, float(squeezed.min()), float((squeezed <= 0).mean()),
        volumes[0] / foreground, volumes[1] / tumor if tumor else None, counted / foreground,
    )  # fmt: skip


def problem(quality: RegistrationQuality) -> str | None:
    """Why a copy isn't fit to learn from, in words; None where it is.

    A fold shows anatomy twice, mirrored. A kidney that half or double its volume is too much for two adults. A copy
    without a tenth of the foreground has a kidney cut off by its border, and one that lost its tumor would teach that
    there is none. An overlap that shrank shows that the search went astray.
    """
    reasons = {
        f"folds: the smallest Jacobian is {quality.least:.2f}": quality.least <= 0,
        f"the foreground's volume is {quality.volume:.2f} of its own": not 0.5 <= quality.volume <= 2,
        f"only {quality.covered:.0%} of the foreground is in the copy": quality.covered < 0.9,
        "the tumor is lost": quality.tumor == 0,
        f"overlap fell from {quality.dice_before:.2f} to {quality.dice_after:.2f}": quality.dice_after
        < quality.dice_before,
    }
    return "; ".join(reason for reason, holds in reasons.items() if holds) or None


def _affine(fixed: sitk.Image, moving: sitk.Image, settings: Settings) -> sitk.AffineTransform:
    found = sitk.AffineTransform(3)
    search = sitk.ImageRegistrationMethod()
    search.SetNumberOfThreads(1)
    search.SetMetricAsMattesMutualInformation(settings.bins)
    search.SetMetricSamplingStrategy(search.REGULAR)
    search.SetMetricSamplingPercentage(settings.share, 1)
    search.SetInterpolator(sitk.sitkLinear)
    search.SetOptimizerAsRegularStepGradientDescent(settings.spacing, 1e-2, settings.affine)
    search.SetOptimizerScalesFromPhysicalShift()
    search.SetShrinkFactorsPerLevel([4, 2])
    search.SetSmoothingSigmasPerLevel([2, 1])
    search.SetInitialTransform(found, inPlace=True)
    search.Execute(fixed, moving)
    return found


def _onto(fixed: sitk.Image, moving: sitk.Image, affine: sitk.Transform) -> sitk.Image:
    """The moving image on the fixed one's lattice; where it has nothing, the fixed one's own values pull nowhere."""
    inside = sitk.Resample(moving * 0 + 1, fixed, affine, sitk.sitkNearestNeighbor, 0.0)
    near: sitk.Image = sitk.Resample(moving, fixed, affine, sitk.sitkLinear, 0.0) * inside + fixed * (1 - inside)
    return near


def _demons(fixed: sitk.Image, moving: sitk.Image, settings: Settings) -> sitk.Image:
    """The displacements from each fixed voxel to its place in the moving image, in mm (x, y, z)."""
    field = None
    for shrink in (4, 2, 1):
        pair = [_shrunk(image, shrink) for image in (fixed, moving)]
        demons = sitk.DiffeomorphicDemonsRegistrationFilter()
        demons.SetNumberOfThreads(1)
        demons.SetNumberOfIterations(settings.demons)
        demons.SetStandardDeviations(settings.smoothing)
        if field is not None:
            field = sitk.Resample(field, pair[0], sitk.Transform(), sitk.sitkLinear, 0.0, sitk.sitkVectorFloat64)
        field = demons.Execute(*pair) if field is None else demons.Execute(*pair, field)
    return sitk.Image(field)


def _shrunk(image: sitk.Image, by: int) -> sitk.Image:
    if by == 1:
        return image
    smooth = sitk.SmoothingRecursiveGaussian(image, [by / 2 * mm for mm in image.GetSpacing()])
    small: sitk.Image = sitk.Shrink(smooth, [min(by, n) for n in image.GetSize()])
    return small


def _as_itk(array: NDArray[np.float32], spacing: Point, middle: Point) -> sitk.Image:
    """An image whose origin makes ``middle`` the point zero."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1].tolist())
    image.SetOrigin((spacing / 2 - middle)[::-1].tolist())
    return image


def _masks(labels: NDArray[np.uint8]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    return labels > 0, labels == TUMOR


def _dice(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    both = int(one.sum()) + int(other.sum())
    return 2 * int((one & other).sum()) / both if both else 1.0
