"""NIfTI headers, validated before any voxel is read.

A header may be broken or hostile, so nothing in it is trusted; reading it takes a kilobyte of memory in any case.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from isal import igzip, isal_zlib
from numpy.typing import NDArray

from kitseg.errors import InputError
from kitseg.runtime.files import check_regular, read_errors
from kitseg.types import Geometry, Triple, triple
from kitseg.volumes._nibabel import nibabel

MAX_VOXELS = 2**30  # three times the largest CT of the challenge
MIN_SPACING, MAX_SPACING = 0.05, 20.0  # mm
MAX_COSINE = 1e-3  # between two voxel axes
MAX_APART = 1.0  # mm between a voxel's places by qform and by sform
COPY_AGAIN = "Copy or download the file again"
_CONVERT = "Convert the scan to a 3D NIfTI file (.nii or .nii.gz)"
_CONVERT_AGAIN = "Convert the scan again, with its position and spacing"
_CORRECT = "Correct the one that is wrong, or convert the scan again"
DEFLATE_RATIO = 1032  # the maximum compression ratio of deflate
_SNIFF = 1024  # bytes; the larger of the two header types has 540
_UNITS = {1: 1000.0, 3: 0.001}  # mm, by the code of metre and micron; any other is taken as mm
SAME_SPACING = 0.01  # relative tolerance between two spacings that a header states
_PLACE = ("pixdim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y",
          "qoffset_z", "srow_x", "srow_y", "srow_z", "xyzt_units")  # fmt: skip
_GZIP = b"\x1f\x8b"
NO_ORIENTATION = "the header has no orientation, so that right and left are unknown"
_igzip: Any = igzip  # untyped, as is nibabel
_isal: Any = isal_zlib
_nib: Any = nibabel
_HEADERS = (
    _nib.filebasedimages.ImageFileError,
    _nib.spatialimages.HeaderDataError,
    _nib.spatialimages.HeaderTypeError,
    _nib.wrapstruct.WrapStructError,
)
_BROKEN = (*_HEADERS, EOFError, OSError, zlib.error, _isal.error, ValueError, OverflowError)
_quiet = logging.getLogger(__name__)
_quiet.disabled = True


@contextmanager
def open_errors(path: Path) -> Iterator[None]:
    """Convert errors of nibabel, gzip and the file system to an InputError."""
    try:
        with read_errors(path):
            yield
    except _BROKEN as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(path, f"broken or not a NIfTI file ({reason})", COPY_AGAIN) from error


def open_voxels(path: Path) -> Any:
    """Open the file as a byte stream, decompressed if its content is gzip's, whatever its name states."""
    return _igzip.open(path) if _start(path)[:2] == _GZIP else path.open("rb")


def read_header(path: Path) -> Any:
    """Read the file's header as nibabel's header class.

    Raises:
        InputError: the file is missing, unreadable or not a NIfTI file.
    """
    with open_errors(path):
        size = check_regular(path)
        if size == 0:
            raise InputError(path, "the file is empty", COPY_AGAIN)
        if other := _other_format(_start(path)):
            raise InputError(path, *other)
        if not path.name.lower().endswith((".nii", ".nii.gz")):
            raise InputError(path, "not a NIfTI, MetaImage or NRRD file", _CONVERT)
        with open_voxels(path) as stream:
            start = stream.read(_SNIFF)
        kinds = (_nib.Nifti1Header, _nib.Nifti2Header)
        kind = next((kind for kind in kinds if kind.may_contain_header(start)), None)
        if kind is None:
            raise _nib.filebasedimages.ImageFileError("no NIfTI header")
        header = kind.from_fileobj(BytesIO(start[: kind.sizeof_hdr]), check=False)
        spacing = np.abs(header["pixdim"][1:4])
        spaced = header["sform_code"] > 0 or (spacing != 0).all()
        header.check_fix(logger=_quiet, error_level=40)
        header["pixdim"][1:4] = spacing  # 0 means unknown, which the line above takes as 1
    if not spaced:
        raise InputError(path, "the header has no spacing", _CONVERT_AGAIN)
    if header["magic"].item() != kind.single_magic:
        raise InputError(path, "it is half of a file pair (.hdr and .img)", _CONVERT)
    return header


def geometry_of(path: Path, header: Any) -> Geometry:
    """The geometry that a header describes.

    Raises:
        InputError: it is not plausible for a CT.
    """
    with open_errors(path), np.errstate(all="ignore"):
        shape = tuple(int(n) for n in header.get_data_shape())
        affine = _in_mm(header, header.get_best_affine())
        header.get_slope_inter()
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        raise InputError(path, f"it has {len(shape)} dimensions {shape}, not 3", "Give one 3D volume per file")
    if min(shape) < 1:
        raise InputError(path, f"it is empty: its shape is {shape}", COPY_AGAIN)
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf":
        raise InputError(path, f"the voxel type is {dtype}, not integer or float", _CONVERT)
    voxels = int(np.prod(shape, dtype=object))
    if voxels > MAX_VOXELS:
        raise InputError(path, f"the header claims {voxels} voxels {shape}, more than {MAX_VOXELS}", COPY_AGAIN)
    check_affine(path, affine)
    _check_agreement(path, header)
    stated = {name: np.nan_to_num(header[name]).tolist() for name in _PLACE}
    return Geometry(triple(shape), affine, stated, _doubts(header, triple(shape)))


def _doubts(header: Any, shape: Triple) -> tuple[str, ...]:
    qform, sform = _coded(header, "q"), _coded(header, "s")
    if qform is None or sform is None:
        return () if qform is not sform else (f"{NO_ORIENTATION} (no qform and no sform)",)
    corners = np.array([[*np.multiply(corner, shape), 1] for corner in np.ndindex(2, 2, 2)])
    apart = np.linalg.norm(corners @ _in_mm(header, qform - sform)[:3].T, axis=1).max()
    if not apart > MAX_APART:
        return ()
    codes = [_nib.orientations.aff2axcodes(affine) for affine in (qform, sform)]
    one, other = ("".join(map(str, found)) for found in codes)
    doubt = f"its qform ({one}) and its sform ({other}, which is used) place it up to {apart:.0f} mm apart"
    swapped = any({a, b} == {"L", "R"} for a, b in zip(*codes, strict=True))
    return (f"{doubt}: right and left may be exchanged" if swapped else doubt,)


def _coded(header: Any, form: str) -> NDArray[np.float64] | None:
    """The affine of the qform or of the sform; None where its code is 0 or it is invalid."""
    with suppress(*_HEADERS, ValueError), np.errstate(all="ignore"):
        affine = header.get_qform() if form == "q" else header.get_sform()
        return affine if header[f"{form}form_code"] > 0 and np.isfinite(affine).all() else None
    return None


def _in_mm(header: Any, affine: NDArray[Any]) -> NDArray[np.float64]:
    scaled = np.array(affine, np.float64)
    scaled[:3] *= _UNITS.get(int(header["xyzt_units"]) & 7, 1.0)
    return scaled


def _check_agreement(path: Path, header: Any) -> None:
    """Raise an InputError if the sform differs from the pixel sizes or the qform in scale or handedness."""
    qform, sform = _coded(header, "q"), _coded(header, "s")
    if sform is None:
        return
    one, other = np.linalg.norm(sform[:3, :3], axis=0), header["pixdim"][1:4].astype(np.float64)
    known = np.isfinite(other) & (other > 0)
    if not np.allclose(one[known], other[known], rtol=SAME_SPACING, atol=0):
        name, text = "pixdim" if qform is None else "qform", "{:.4g} x {:.4g} x {:.4g}"
        sizes = f"its sform states voxels of {text.format(*one)} mm, its {name} {text.format(*other)} mm"
        raise InputError(path, sizes, _CORRECT)
    if qform is not None and np.linalg.det(qform[:3, :3]) * np.linalg.det(sform[:3, :3]) < 0:
        raise InputError(path, "its sform and its qform are mirror images: left and right are unknown", _CORRECT)


def file_geometry(path: Path, header: Any) -> Geometry:
    """The geometry of a file by its header, before memory or disk is reserved for it.

    Raises:
        InputError: see ``geometry_of``; also if the file is too small for its voxels, or they begin in its header.
    """
    native = geometry_of(path, header)
    with open_errors(path):
        size, offset = check_regular(path), header.get_data_offset()
    needed = offset + int(np.prod(native.shape, dtype=object)) * header.get_data_dtype().itemsize
    if needed > size * (DEFLATE_RATIO if _start(path)[:2] == _GZIP else 1):
        raise InputError(path, f"the file is truncated: its header requires {needed} bytes", COPY_AGAIN)
    if offset < header.single_vox_offset:
        raise InputError(path, f"its voxels begin at byte {offset}, inside its header", COPY_AGAIN)
    return native


def starts_as_dicom(path: Path) -> bool:
    """Whether a file is DICOM by its first bytes, whatever its name."""
    with suppress(OSError):
        return path.is_file() and _start(path)[128:] == b"DICM"
    return False


def _start(path: Path) -> bytes:
    """The first bytes of a file, as it is stored."""
    with path.open("rb") as stream:
        return stream.read(132)


def _other_format(start: bytes) -> tuple[str, str] | None:
    """The problem and the remedy of a file of another kind, by its first bytes."""
    if start[128:] == b"DICM":
        return "it is one DICOM file", "Give `kitseg predict` the folder of its series, or convert the scan to NIfTI"
    if start[:4] == b"PK\x03\x04":
        return "it is a ZIP archive", "Unpack it, and give the folder"
    return None


def check_affine(path: Path, affine: NDArray[np.float64]) -> None:
    """Whether an affine (4, 4) is a plausible CT's.

    Raises:
        InputError: not finite, singular, sheared, or with an implausible spacing.
    """
    if not np.isfinite(affine).all():
        raise InputError(path, "its affine contains NaN or infinite values", _CONVERT_AGAIN)
    axes = affine[:3, :3]
    with np.errstate(over="ignore"):
        spacing = np.linalg.norm(axes, axis=0)
    if min(spacing) == 0 or not np.isfinite(spacing).all() or abs(np.linalg.det(axes / spacing)) < MAX_COSINE:
        raise InputError(path, "its affine is singular", _CONVERT_AGAIN)
    cosines = (axes / spacing).T @ (axes / spacing) - np.eye(3)
    if np.abs(cosines).max() > MAX_COSINE:
        raise InputError(path, "its voxel axes are not at right angles", "Resample the scan to a regular grid")
    if spacing.min() < MIN_SPACING or spacing.max() > MAX_SPACING:
        found = " x ".join(f"{s:.3g}" for s in spacing)
        raise InputError(path, f"its spacing is {found} mm, not in {MIN_SPACING}-{MAX_SPACING} mm", _CONVERT_AGAIN)
