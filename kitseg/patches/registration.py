"""Registration of labelled scans: warp one patient's scan and labels to the anatomy of another (pure functions).

``register_copy`` runs all steps: ``register`` → ``Warp`` → ``warped`` image and labels → ``judge``. Points are in
millimetres (z, y, x) from the corner of their volume's first voxel; with axes (I, P, L) in both volumes, the positions
of the patients in the scanner don't matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from kitseg.patches.warp import Point, RegistrationQuality, Warp, judge, warped
from kitseg.types import Grid, Volume
from kitseg.volumes.resample import grid_geometry, nearest, to_grid

BODY = -200  # HU above those of air and lung


@dataclass(frozen=True)
class Settings:
    """The settings of a registration.

    spacing: mm of the grid of the search; voxels: maximum size of that grid, the spacing of larger scans is increased;
    low, high: HU range to which intensities are clipped; bins: of the mutual information; share: fraction of the voxels
    it samples; affine, demons: iterations per level; smoothing: standard deviation of the smoothing of displacements
    after each iteration, in voxels of the level.
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
    """A CT and its label map on the same grid."""

    image: Volume
    label: Volume


@dataclass(frozen=True)
class Scan:
    """A labelled scan on the coarse grid of the search: HU and label ids (d, h, w) over the scan's extent."""

    image: NDArray[np.float32]
    label: NDArray[np.uint8]
    spacing: Point

    @property
    def middle(self) -> Point:
        """The point for the initial alignment: the foreground's middle slice, and the body's centre in the plane."""
        slices = np.flatnonzero((self.label > 0).any((1, 2)))
        if not slices.size:
            raise ValueError("the labels contain no kidney")
        body = self.image[slices[0] : slices[-1] + 1] > BODY
        _, y, x = np.argwhere(body).mean(0) if body.any() else np.array(self.image.shape) / 2
        return (np.array([(slices[0] + slices[-1]) / 2, y, x]) + 0.5) * self.spacing


@dataclass(frozen=True)
class Copy:
    """The floating scan's HU (D, H, W) and labels on the reference's own grid, and the quality of the registration."""

    image: NDArray[np.int16]
    label: NDArray[np.uint8]
    quality: RegistrationQuality


def register_copy(reference: Labelled, floating: Labelled, settings: Settings) -> Copy:
    """Warp the floating scan to the anatomy of the reference.

    Raises:
        ValueError: a scan without a kidney. RuntimeError: SimpleITK's registration failed.
    """
    fixed, moving = coarse(reference, settings), coarse(floating, settings)
    shift = (moving.middle - fixed.middle).astype(np.float32)
    start = Warp(np.broadcast_to(shift[:, None, None, None], (3, 2, 2, 2)), fixed.spacing)
    found = register(fixed, moving, settings)
    onto = reference.image.geometry
    label = warped(found, floating.label, onto)
    quality = judge(found, (warped(start, floating.label, onto), label), reference.label, floating.label)
    image = np.rint(warped(found, floating.image, onto))
    return Copy(np.clip(image, -(2**15), 2**15 - 1).astype(np.int16), label, quality)


def coarse(scan: Labelled, settings: Settings) -> Scan:
    """Resample a labelled scan to the grid of the search."""
    image = scan.image
    extent = np.prod(np.array(image.geometry.shape) * image.geometry.spacing)
    spacing = max(settings.spacing, float(extent / settings.voxels) ** (1 / 3))
    lattice = grid_geometry(image.geometry, Grid(slices=spacing, inplane=spacing))
    hu = to_grid(np.clip(image.array, settings.low, settings.high), lattice.shape)
    return Scan(hu, nearest(scan.label.array, lattice.shape), np.array(lattice.spacing))


def register(reference: Scan, floating: Scan, settings: Settings) -> Warp:
    """Register the floating scan to the reference: an affine transform, then diffeomorphic demons.

    The affine transform maximizes Mattes' mutual information (two levels); the demons (Vercauteren et al. 2009; three
    levels, the finest on the given grid) follow the difference of the intensities. One thread and no randomness: the
    same scans and settings give the same warp.

    Raises:
        ValueError: a scan without foreground. RuntimeError: SimpleITK's registration failed.
    """
    fixed, moving = (_as_itk(scan.image, scan.spacing, scan.middle) for scan in (reference, floating))
    affine = _affine(fixed, moving, settings)
    near = _onto(fixed, moving, affine)
    found = sitk.CompositeTransform([affine, sitk.DisplacementFieldTransform(_demons(fixed, near, settings))])
    lattice = (fixed.GetSize(), fixed.GetOrigin(), fixed.GetSpacing(), fixed.GetDirection())
    shifts = sitk.GetArrayFromImage(sitk.TransformToDisplacementField(found, sitk.sitkVectorFloat64, *lattice))
    field = np.moveaxis(shifts[..., ::-1], -1, 0) + (floating.middle - reference.middle)[:, None, None, None]
    return Warp(field.astype(np.float32), reference.spacing)


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
    """The moving image on the fixed image's grid, padded with the fixed image's values, which exert no force."""
    inside = sitk.Resample(moving * 0 + 1, fixed, affine, sitk.sitkNearestNeighbor, 0.0)
    near: sitk.Image = sitk.Resample(moving, fixed, affine, sitk.sitkLinear, 0.0) * inside + fixed * (1 - inside)
    return near


def _demons(fixed: sitk.Image, moving: sitk.Image, settings: Settings) -> sitk.Image:
    """The displacements from each fixed voxel to its position in the moving image, in mm (x, y, z)."""
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
    """An image with ``middle`` at the physical origin."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1].tolist())
    image.SetOrigin((spacing / 2 - middle)[::-1].tolist())
    return image
