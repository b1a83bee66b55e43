"""NIfTI files: CT and label maps in orientation (I, P, L), and back onto exactly the file's own grid.

Every file is validated on the way in; one that can't be used is an InputError with the problem and the remedy.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import nibabel
import numpy as np
from isal import igzip, isal_zlib
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError, HeaderTypeError
from nibabel.wrapstruct import WrapStructError
from numpy.typing import NDArray

from kitseg.errors import InputError
from kitseg.files import aside
from kitseg.labels import CONVENTIONS
from kitseg.types import Geometry, Volume, triple

#: The header's ``descrip`` of a synthetic scan.
PHANTOM_MARK = "kitseg phantom"

MAX_VOXELS = 2**31
MIN_SPACING, MAX_SPACING = 0.05, 20.0  # mm
MAX_COSINE = 1e-3  # between two voxel axes
LABEL_TOLERANCE = 0.01  # a scaled label map may miss its integers by rounding
_DEFLATE_RATIO = 1032  # the most that deflate can shrink data
_CHUNK = 1 << 23  # bytes that are read or written at a time
_ROWS = 16  # of them that are turned at a time on the way out
_nib: Any = nibabel  # its functions carry no types, nor do isal's
_igzip: Any = igzip
_isal: Any = isal_zlib
_HEADERS = (ImageFileError, HeaderDataError, HeaderTypeError, WrapStructError)
_BROKEN = (*_HEADERS, EOFError, OSError, zlib.error, _isal.error, ValueError)
_orientations: Any = nibabel.orientations
_COPY_AGAIN = "Copy or download the file again"
_CONVERT = "Convert the scan to a 3D NIfTI file (.nii or .nii.gz)"


def read_geometry(path: Path) -> Geometry:
    """The file's own lattice (native shape and affine), from the header alone.

    Raises:
        InputError: the file is missing, broken, not a 3D NIfTI file, or its lattice is not a plausible CT's.
    """
    return _geometry(Path(path), _open(Path(path)))


def canonical_geometry(native: Geometry) -> Geometry:
    """The same lattice with its axes turned to (I, P, L) by flips and permutations; an oblique one stays oblique."""
    turn = _turn(native)
    shape = np.empty(3, int)
    shape[turn[:, 0].astype(int)] = native.shape
    affine = native.affine @ _orientations.inv_ornt_aff(turn, native.shape)
    return Geometry(triple(shape), affine)


def turn_to_canonical(array: NDArray[Any], native: Geometry) -> NDArray[Any]:
    """An array on the native lattice, as a view with axes (I, P, L)."""
    if array.shape != native.shape:
        raise ValueError(f"array of shape {array.shape} on a native lattice of {native.shape}")
    return cast("NDArray[Any]", _orientations.apply_orientation(array, _turn(native)))


def turn_to_native(array: NDArray[Any], native: Geometry) -> NDArray[Any]:
    """An (I, P, L) array, as a view with the axes of the native lattice."""
    canonical = canonical_geometry(native)
    if array.shape != canonical.shape:
        raise ValueError(f"array of shape {array.shape} on an (I, P, L) lattice of {canonical.shape}")
    back = _orientations.ornt_transform(np.array([[0, 1], [1, 1], [2, 1]]), _turn(native))
    return cast("NDArray[Any]", _orientations.apply_orientation(array, back))


def read_image(path: Path, case_id: str) -> Volume:
    """A CT as (D, H, W) in orientation (I, P, L), in Hounsfield units.

    int16 when the file stores integers that fit it and doesn't scale them, else float32.

    Raises:
        InputError: see ``read_geometry``; also for truncated data and values that are not finite.
    """
    path = Path(path)
    image = _open(path)
    native = _geometry(path, image)
    stored, slope, offset = _stored(path, image, native)
    array = _as_ct(stored, slope, offset)
    if array.dtype.kind == "f" and not (np.isfinite(array.min()) and np.isfinite(array.max())):
        raise InputError(path, "it holds values that are not finite (NaN or infinity)", "Export the scan again")
    return Volume(array, canonical_geometry(native), native, case_id)


def read_labels(path: Path, case_id: str, convention: str | None = "kits19", strict: bool = True) -> Volume:
    """A label map as (D, H, W) uint8 in orientation (I, P, L).

    Integers that are stored as floats are accepted. With no convention, any of 0 to 255 is.

    Raises:
        InputError: see ``read_image``; also for values that the convention doesn't know, which are background where
            ``strict`` is False.
    """
    path = Path(path)
    image = _open(path)
    native = _geometry(path, image)
    stored, slope, offset = _stored(path, image, native)
    known = np.array(list(CONVENTIONS[convention]) if convention else range(256), np.uint8)  # from 0, without gaps
    if stored.dtype == np.uint8 and (slope, offset) == (1, 0) and stored.max() <= known.max():
        return Volume(stored, canonical_geometry(native), native, case_id)
    labels = np.empty(stored.shape, np.uint8)
    strange: set[float] = set()
    for row, plane in zip(labels, stored, strict=True):
        values = plane if (slope, offset) == (1, 0) else plane * slope + offset
        whole = values if values.dtype.kind in "iu" else np.rint(values)
        with np.errstate(invalid="ignore"):
            good = np.isin(whole, known) & (np.abs(values - whole) <= LABEL_TOLERANCE)
        strange.update(np.unique(values[~good])[:5].tolist())
        row[:] = np.where(good, whole, 0)
    if strange and strict:
        raise InputError(path, *_strange_labels(strange, convention or "kits19"))
    return Volume(labels, canonical_geometry(native), native, case_id)


def write_labels(path: Path, labels: NDArray[np.uint8], native: Geometry, description: str = "") -> None:
    """Write (D, H, W) labels in orientation (I, P, L) as uint8 on the native lattice; never half a file.

    Raises:
        InputError: the file can't be written.
    """
    _write(Path(path), labels, np.dtype(np.uint8), native, description)


def write_image(path: Path, array: NDArray[np.int16], native: Geometry, description: str = "") -> None:
    """Write a (D, H, W) CT in orientation (I, P, L) as int16 on the native lattice; never half a file.

    Raises:
        InputError: the file can't be written.
    """
    _write(Path(path), array, np.dtype(np.int16), native, description)


def stores_plain_integers(path: Path) -> bool:
    """Whether a file holds three axes of integers without a scale."""
    image: Any = _open(path)
    whole = image.get_data_dtype().kind in "iu" and (image.dataobj.slope, image.dataobj.inter) == (1, 0)
    return bool(whole and image.ndim == 3)


def is_phantom(path: Path) -> bool:
    """Whether a scan is synthetic: its header says ``PHANTOM_MARK``."""
    return bool(_open(Path(path)).header["descrip"].item() == PHANTOM_MARK.encode())


def knows_orientation(path: Path) -> bool:
    """Whether the header says how the scan lies in the patient (a qform or an sform is set)."""
    header = _open(Path(path)).header
    return bool(header["qform_code"] > 0 or header["sform_code"] > 0)


def axis_codes(geometry: Geometry) -> str:
    """Where the three axes point in the patient, such as ``IPL``."""
    return "".join(_orientations.aff2axcodes(geometry.affine))


def file_digest(path: Path) -> str:
    """The sha256 of the file's bytes, in hex."""
    with _in_words(Path(path)), Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _in_words(path: Path) -> Iterator[None]:
    """Turn the errors that nibabel, gzip and the file system raise into an InputError."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(path, "there is no such file", "Check the path") from error
    except (IsADirectoryError, PermissionError) as error:
        raise InputError(path, f"it can't be read ({error.strerror})", "Name a file that you may read") from error
    except _BROKEN as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(path, f"it is broken or no NIfTI file ({reason})", _COPY_AGAIN) from error


def _open(path: Path) -> nibabel.Nifti1Image:
    """The file with its header read and its data still on disk."""
    if path.is_dir():
        raise InputError(path, "it is a folder, not a file", "Name the .nii.gz file")
    if not path.exists():
        raise InputError(path, "there is no such file", "Check the path")
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise InputError(path, "it is no NIfTI file (.nii or .nii.gz)", _CONVERT)
    if path.stat().st_size == 0:
        raise InputError(path, "the file is empty", _COPY_AGAIN)
    with _in_words(path):
        image = nibabel.load(path)
    if not isinstance(image, nibabel.Nifti1Image):
        raise InputError(path, "it is no NIfTI image", _CONVERT)
    return image


def _geometry(path: Path, image: nibabel.Nifti1Image) -> Geometry:
    shape = tuple(int(n) for n in image.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        raise InputError(path, f"it has {len(shape)} dimensions {shape}, not 3", "Give one 3D volume per file")
    if min(shape) < 1:
        raise InputError(path, f"it is empty: its shape is {shape}", _COPY_AGAIN)
    dtype = cast("Any", image).get_data_dtype()
    if dtype.kind not in "iuf":
        raise InputError(path, f"its voxels are {dtype}, not numbers of HU or labels", _CONVERT)
    voxels = int(np.prod(shape, dtype=object))
    if voxels > MAX_VOXELS:
        raise InputError(path, f"its header claims {voxels} voxels {shape}, more than {MAX_VOXELS}", _COPY_AGAIN)
    _check_affine(path, np.asarray(image.affine))
    return Geometry(triple(shape), np.asarray(image.affine, np.float64))


def _check_affine(path: Path, affine: NDArray[np.float64]) -> None:
    remedy = "Convert the scan again, with its position and spacing"
    if not np.isfinite(affine).all():
        raise InputError(path, "its affine holds values that are not finite", remedy)
    axes = affine[:3, :3]
    spacing = np.linalg.norm(axes, axis=0)
    if min(spacing) == 0 or abs(np.linalg.det(axes / spacing)) < MAX_COSINE:
        raise InputError(path, "its affine is singular", remedy)
    cosines = (axes / spacing).T @ (axes / spacing) - np.eye(3)
    if np.abs(cosines).max() > MAX_COSINE:
        raise InputError(path, "its voxel axes are sheared, not at right angles", "Resample the scan to a regular grid")
    if spacing.min() < MIN_SPACING or spacing.max() > MAX_SPACING:
        words = " x ".join(f"{s:.3g}" for s in spacing)
        raise InputError(path, f"its spacing is {words} mm, not in {MIN_SPACING}-{MAX_SPACING} mm", remedy)


def _stored(path: Path, image: nibabel.Nifti1Image, native: Geometry) -> tuple[NDArray[Any], float, float]:
    """The values as they lie in the file, with axes (I, P, L), and the slope and offset that make HU of them.

    Reads to the end of the file, because gzip's checksum stands there.
    """
    proxy = cast("Any", image.dataobj)
    zipped = path.name.lower().endswith(".gz")
    needed = int(np.prod(native.shape, dtype=object)) * proxy.dtype.itemsize
    if needed > path.stat().st_size * (_DEFLATE_RATIO if zipped else 1):
        raise InputError(path, f"it is cut short: its header promises {needed} bytes of voxels", _COPY_AGAIN)
    array = np.empty(canonical_geometry(native).shape, proxy.dtype)
    with _in_words(path), _igzip.open(path) if zipped else path.open("rb") as stream:
        stream.seek(proxy.offset)
        if not _fill(turn_to_native(array, native), stream):
            raise InputError(path, "it is cut short: it ends before its last voxel", _COPY_AGAIN)
        while stream.read(_CHUNK):
            pass
    return array, float(proxy.slope), float(proxy.inter)


def _fill(view: NDArray[Any], stream: IO[bytes]) -> bool:
    """Fill a view on the native lattice from a stream, some planes at a time; whether the stream held them all.

    Each chunk is turned while it is in the processor's cache, and no second copy of the scan is held.
    """
    rows, columns, planes = view.shape
    step = max(1, _CHUNK // (rows * columns * view.itemsize))
    chunk = np.empty((rows, columns, step), view.dtype, order="F")
    for first in range(0, planes, step):
        part = chunk[..., : planes - first]
        space = memoryview(cast("Any", part.reshape(-1, order="F").view(np.uint8)))
        done = 0
        while got := stream.readinto(space[done:]):  # type: ignore[attr-defined]
            done += got
        if done < len(space):
            return False
        view[..., first : first + step] = part
    return True


def _as_ct(stored: NDArray[Any], slope: float, offset: float) -> NDArray[Any]:
    whole = stored.dtype.kind in "iu" and (slope, offset) == (1, 0)
    if whole and (np.can_cast(stored.dtype, np.int16) or (stored.min() >= -(2**15) and stored.max() < 2**15)):
        return stored.astype(np.int16, copy=False)
    with np.errstate(over="ignore", invalid="ignore"):
        array = stored.astype(np.float32, copy=False)
        array *= np.float32(slope)
        array += np.float32(offset)
    return array


def _strange_labels(strange: set[float], convention: str) -> tuple[str, str]:
    known = ", ".join(f"{value} {name}" for value, name in CONVENTIONS[convention].items())
    found = ", ".join(f"{value:g}" for value in sorted(strange)[:5])
    remedy = f"Keep to the labels of {convention}: {known}"
    if convention == "kits19" and strange == {3}:
        remedy += "; for labels with cysts choose the convention kits23"
    return f"it holds the label values {found}", remedy


def _write(path: Path, array: NDArray[Any], dtype: np.dtype[Any], native: Geometry, description: str) -> None:
    if array.dtype != dtype:
        raise ValueError(f"{dtype} is written, not {array.dtype}")
    header = _nib.Nifti1Header()
    header.set_data_dtype(dtype)
    header.set_data_shape(native.shape)
    header.set_xyzt_units("mm")
    header.set_qform(native.affine, code=1)
    header.set_sform(native.affine, code=1)
    header["descrip"] = description
    header["magic"] = header.single_magic
    header.set_data_offset(header.single_vox_offset)
    header.set_slope_inter(1, 0)
    view = turn_to_native(array, native)
    step = max(1, _CHUNK // (view.shape[0] * view.shape[1] * view.itemsize))
    with aside(path) as partial, _writing(partial) as stream:
        header.write_to(stream)
        for first in range(0, view.shape[2], step):
            stream.write(_in_file_order(view[..., first : first + step]).data)


def _in_file_order(view: NDArray[Any]) -> NDArray[Any]:
    """The values one after another with the first axis fastest; turned in parts that fit a processor's cache."""
    turned = np.empty(view.shape, view.dtype, order="F")
    for row in range(0, view.shape[1], _ROWS):
        turned[:, row : row + _ROWS] = view[:, row : row + _ROWS]
    return turned.reshape(-1, order="F")


@contextmanager
def _writing(path: Path) -> Iterator[IO[bytes]]:
    """A new file, zipped where its name says so, without time or name in it: the same content gives the same bytes."""
    with path.open("wb") as file:
        if not path.name.lower().endswith(".gz"):
            yield file
            return
        with _igzip.IGzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) as stream:
            yield stream


def _turn(native: Geometry) -> NDArray[np.float64]:
    """The nibabel description of the flips and permutations from the native axes to (I, P, L)."""
    here = _orientations.io_orientation(native.affine)
    return cast("NDArray[np.float64]", _orientations.ornt_transform(here, _orientations.axcodes2ornt(("I", "P", "L"))))
