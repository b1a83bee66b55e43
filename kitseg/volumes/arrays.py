"""Scans and label maps of any kind: files, NumPy arrays with an affine, and the image objects of other libraries.

The libraries are recognized by what their objects offer, so that none of them is imported here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kitseg.errors import InputError, UsageError
from kitseg.labels import UNKNOWN, Scheme
from kitseg.types import Geometry, Volume, triple
from kitseg.volumes._nibabel import nibabel
from kitseg.volumes.check import refuse_labels
from kitseg.volumes.header import check_affine, geometry_of
from kitseg.volumes.itk import affine_of
from kitseg.volumes.nifti import as_ct, canonical_geometry, make_header, read_labels, turn_to_canonical
from kitseg.volumes.scan import find_scans, read_scan

#: A path, an array (with an affine), or an image of nibabel, SimpleITK or TorchIO.
Image = Any
_CONVERT = "Give a 3D array with its affine, or an image of nibabel, SimpleITK or TorchIO"


def scan_from(image: Image, affine: ArrayLike | None = None, name: str = "scan") -> Volume:
    """A CT as (D, H, W) HU in orientation (I, P, L).

    Args:
        image: a NIfTI file or the folder of a DICOM series; an array, whose axes its affine describes as in nibabel; a
            nibabel, SimpleITK or TorchIO image; or a TorchIO subject with one intensity image.
        affine: (4, 4), from an array's voxel indices to mm in RAS+; for arrays only.
        name: stands for a file's name in errors.

    Raises:
        InputError: not a 3D image of finite numbers on a regular grid, or a label map. UsageError: a folder with
            several scans.
    """
    if isinstance(image, Path | str):
        cases = find_scans([Path(image)]).cases
        if len(cases) != 1:
            raise UsageError(f"{image} holds {len(cases)} scans to segment; give one, or call kitseg.predict")
        return read_scan(cases[0])
    array, native = _native(image, affine, name)
    hu = as_ct(np.array(turn_to_canonical(array, native)), 1.0, 0.0)
    if hu.dtype.kind == "f" and not np.isfinite(hu).all():
        raise InputError(name, "it holds values that are not finite (NaN or infinity)", "Replace them")
    refuse_labels(name, hu)
    return Volume(hu, canonical_geometry(native), native, name)


def labels_from(image: Image, affine: ArrayLike | None, scheme: Scheme, name: str = "labels") -> Volume:
    """A label map of a scheme as (D, H, W) uint8 in orientation (I, P, L), with kitseg's ids; see ``scan_from``.

    Raises:
        InputError: not a 3D image on a regular grid, or values that the scheme doesn't have.
    """
    if isinstance(image, Path | str):
        return read_labels(Path(image), Path(image).name, scheme)
    array, native = _native(image, affine, name)
    known = np.flatnonzero(scheme.from_file != UNKNOWN)
    if odd := np.setdiff1d(np.unique(array), known).tolist():
        raise InputError(name, f"it holds the values {odd[:5]}", f"The labels are {scheme}")
    labels = scheme.from_file[np.asarray(turn_to_canonical(array, native)).astype(np.uint8)]
    return Volume(labels, canonical_geometry(native), native, name)


def to_nibabel(array: NDArray[Any], native: Geometry) -> Any:
    """An array in its own axes as a nibabel image, which states its place as the scan does."""
    return nibabel.Nifti1Image(array, None, make_header(native, array.dtype))


def _native(image: Image, affine: ArrayLike | None, name: str) -> tuple[NDArray[Any], Geometry]:
    if isinstance(image, nibabel.Nifti1Image):
        native = geometry_of(Path(name), image.header)
        return np.asanyarray(image.dataobj).reshape(native.shape), native  # further axes of one value
    array, matrix = _parts(image, affine, name)
    if array.ndim != 3 or 0 in array.shape or array.dtype.kind not in "biuf":
        raise InputError(name, f"it has the shape {array.shape} and the type {array.dtype}", _CONVERT)
    if matrix.shape != (4, 4):
        raise InputError(name, f"its affine has the shape {matrix.shape}, not (4, 4)", _CONVERT)
    check_affine(Path(name), matrix)
    return array, Geometry(triple(array.shape), matrix)


def _parts(image: Image, affine: ArrayLike | None, name: str) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """The array of an image, in the axes of its affine (RAS+)."""
    if hasattr(image, "get_images"):  # a TorchIO subject
        images = image.get_images(intensity_only=True)
        if len(images) != 1:
            raise InputError(name, f"the subject holds {len(images)} intensity images", "Give the CT's image itself")
        image = images[0]
    if hasattr(image, "dataobj"):  # nibabel
        return np.asanyarray(image.dataobj), np.asarray(image.affine, np.float64)
    if hasattr(image, "GetDirection"):  # SimpleITK
        from SimpleITK import GetArrayFromImage

        return GetArrayFromImage(image).T, affine_of(image)
    if hasattr(image, "affine") and hasattr(image, "data"):  # TorchIO, (1, W, H, D)
        data = np.asarray(image.data)
        return data[0] if len(data) == 1 else data, np.asarray(image.affine, np.float64)
    if affine is None:
        raise InputError(name, f"a {type(image).__name__} comes without an affine", _CONVERT)
    return np.asarray(image), np.asarray(affine, np.float64)
