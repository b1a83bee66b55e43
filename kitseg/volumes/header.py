"""What a NIfTI file says of itself, validated before any voxel is read.

Nothing is believed: a header may be broken or hostile, and whatever it says, reading it takes a kilobyte.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from isal import igzip, isal_zlib
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError, HeaderTypeError
from nibabel.wrapstruct import WrapStructError
from numpy.typing import NDArray

from kitseg.errors import InputError
from kitseg.runtime.files import check_regular, read_errors
from kitseg.types import Geometry, triple

MAX_VOXELS = 2**30  # three times the largest CT of the challenge
MIN_SPACING, MAX_SPACING = 0.05, 20.0  # mm
MAX_COSINE = 1e-3  # between two voxel axes
COPY_AGAIN = "Copy or download the file again"
_CONVERT = "Convert the scan to a 3D NIfTI file (.nii or .nii.gz)"
_CONVERT_AGAIN = "Convert the scan again, with its position and spacing"
_DEFLATE_RATIO = 1032  # the most that deflate can shrink data
_SNIFF = 1024  # bytes; the larger of the two kinds of header takes 540
_igzip: Any = igzip  # it carries no types, nor does nibabel
_isal: Any = isal_zlib
_nib: Any = nibabel
_HEADERS = (ImageFileError, HeaderDataError, HeaderTypeError, WrapStructError)
_BROKEN = (*_HEADERS, EOFError, OSError, zlib.error, _isal.error, ValueError, OverflowError)
_quiet = logging.getLogger(__name__)
_quiet.disabled = True


@contextmanager
def open_errors(path: Path) -> Iterator[None]:
    """Turn the errors that nibabel, gzip and the file system raise into an InputError."""
    try:
        with read_errors(path):
            yield
    except _BROKEN as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(path, f"it is broken or no NIfTI file ({reason})", COPY_AGAIN) from error


def open_voxels(path: Path) -> Any:
    """The file as a stream of its bytes, unzipped where its name says that it is zipped."""
    return _igzip.open(path) if _is_zipped(path) else path.open("rb")


def read_header(path: Path) -> Any:
    """The file's header, as nibabel's class of it.

    Raises:
        InputError: the file is missing, may not be read, or is no NIfTI file.
    """
    with open_errors(path):
        size = check_regular(path)
        if not path.name.lower().endswith((".nii", ".nii.gz")):
            raise InputError(path, "it is no NIfTI file (.nii or .nii.gz)", _CONVERT)
        if size == 0:
            raise InputError(path, "the file is empty", COPY_AGAIN)
        with open_voxels(path) as stream:
            start = stream.read(_SNIFF)
        kinds = (_nib.Nifti1Header, _nib.Nifti2Header)
        kind = next((kind for kind in kinds if kind.may_contain_header(start)), None)
        if kind is None:
            raise ImageFileError("it doesn't begin as one")
        header = kind.from_fileobj(BytesIO(start[: kind.sizeof_hdr]), check=False)
        spaced = header["sform_code"] > 0 or (header["pixdim"][1:4] != 0).all()
        header.check_fix(logger=_quiet, error_level=40)
    if not spaced:
        raise InputError(path, "its header doesn't say its spacing", _CONVERT_AGAIN)
    if header["magic"].item() != kind.single_magic:
        raise InputError(path, "it is one half of a pair of files (.hdr and .img)", _CONVERT)
    return header


def geometry_of(path: Path, header: Any) -> Geometry:
    """The lattice that a header describes.

    Raises:
        InputError: it is no plausible CT's, or the file can't hold its voxels.
    """
    with open_errors(path), np.errstate(all="ignore"):
        shape = tuple(int(n) for n in header.get_data_shape())
        affine = np.asarray(header.get_best_affine(), np.float64)
        header.get_slope_inter()
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        raise InputError(path, f"it has {len(shape)} dimensions {shape}, not 3", "Give one 3D volume per file")
    if min(shape) < 1:
        raise InputError(path, f"it is empty: its shape is {shape}", COPY_AGAIN)
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf":
        raise InputError(path, f"its voxels are {dtype}, not numbers of HU or labels", _CONVERT)
    voxels = int(np.prod(shape, dtype=object))
    if voxels > MAX_VOXELS:
        raise InputError(path, f"its header claims {voxels} voxels {shape}, more than {MAX_VOXELS}", COPY_AGAIN)
    _check_affine(path, affine)
    return Geometry(triple(shape), affine)


def check_size(path: Path, header: Any, native: Geometry) -> None:
    """Whether the file can hold what its header promises, which spares reserving memory for a false promise.

    Raises:
        InputError: it can't, or its voxels begin inside of its header.
    """
    with open_errors(path):
        size, offset = check_regular(path), header.get_data_offset()
    needed = offset + int(np.prod(native.shape, dtype=object)) * header.get_data_dtype().itemsize
    if needed > size * (_DEFLATE_RATIO if _is_zipped(path) else 1):
        raise InputError(path, f"it is cut short: its header promises {needed} bytes", COPY_AGAIN)
    if offset < header.single_vox_offset:
        raise InputError(path, f"its voxels begin at byte {offset}, inside of its header", COPY_AGAIN)


def _is_zipped(path: Path) -> bool:
    return path.name.lower().endswith(".gz")


def _check_affine(path: Path, affine: NDArray[np.float64]) -> None:
    if not np.isfinite(affine).all():
        raise InputError(path, "its affine holds values that are not finite", _CONVERT_AGAIN)
    axes = affine[:3, :3]
    with np.errstate(over="ignore"):
        spacing = np.linalg.norm(axes, axis=0)
    if min(spacing) == 0 or not np.isfinite(spacing).all() or abs(np.linalg.det(axes / spacing)) < MAX_COSINE:
        raise InputError(path, "its affine is singular", _CONVERT_AGAIN)
    cosines = (axes / spacing).T @ (axes / spacing) - np.eye(3)
    if np.abs(cosines).max() > MAX_COSINE:
        raise InputError(path, "its voxel axes are sheared, not at right angles", "Resample the scan to a regular grid")
    if spacing.min() < MIN_SPACING or spacing.max() > MAX_SPACING:
        words = " x ".join(f"{s:.3g}" for s in spacing)
        raise InputError(path, f"its spacing is {words} mm, not in {MIN_SPACING}-{MAX_SPACING} mm", _CONVERT_AGAIN)
