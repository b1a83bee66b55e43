"""Read and write volumes: CT and label maps in orientation (I, P, L), NIfTI files on exactly the scan's own grid.

Every file is validated; a file that can't be used raises an InputError with the problem and the remedy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from isal import igzip
from numpy.typing import NDArray

from kitseg.errors import InputError
from kitseg.labels import CYST, KITS19, UNKNOWN, Scheme, to_kits19
from kitseg.runtime.files import atomic_write
from kitseg.runtime.overwrite import MARK
from kitseg.types import Geometry, Volume, triple
from kitseg.volumes._nibabel import nibabel
from kitseg.volumes.header import COPY_AGAIN, file_geometry, open_errors, open_voxels, read_header
from kitseg.volumes.names import is_itk_name, is_volume_name

#: ``descrip`` in the header of a phantom, of a patient of the synthesis, and of a corrected label map.
PHANTOM_MARK, SYNTHETIC_MARK = "kitseg phantom", "kitseg synthesis"
CORRECTED_MARK = "kitseg, corrected by a person"

LOWEST_LABEL = -200  # a file with lower values holds a CT
LABEL_TOLERANCE = 0.01  # rounding error of integers in a scaled label map
_CHUNK = 1 << 23  # bytes read or written at a time
_ROWS = 16  # reoriented at a time when writing
_nib: Any = nibabel  # untyped, as is isal
_igzip: Any = igzip
_orientations: Any = nibabel.orientations


def read_geometry(path: Path) -> Geometry:
    """The file's native geometry (shape and affine), from the header alone.

    Raises:
        InputError: the file is missing, broken, truncated or not a 3D NIfTI file, or its geometry is not plausible.
    """
    if is_itk_name(path):
        from kitseg.volumes.itk import read_itk_geometry

        return read_itk_geometry(path)
    return file_geometry(path, read_header(path))


def canonical_geometry(native: Geometry) -> Geometry:
    """The same grid with its axes reoriented to (I, P, L) by flips and permutations; oblique grids remain oblique."""
    turn = _turn(native)
    shape = np.empty(3, int)
    shape[turn[:, 0].astype(int)] = native.shape
    affine = native.affine @ _orientations.inv_ornt_aff(turn, native.shape)
    return Geometry(triple(shape), affine)


def turn_to_canonical(array: NDArray[Any], native: Geometry) -> NDArray[Any]:
    """A view with axes (I, P, L) of an array on the native grid."""
    if array.shape != native.shape:
        raise ValueError(f"array of shape {array.shape} on a native grid of {native.shape}")
    return cast("NDArray[Any]", _orientations.apply_orientation(array, _turn(native)))


def turn_to_native(array: NDArray[Any], native: Geometry) -> NDArray[Any]:
    """A view with the axes of the native grid of an (I, P, L) array."""
    canonical = canonical_geometry(native)
    if array.shape != canonical.shape:
        raise ValueError(f"array of shape {array.shape} on an (I, P, L) grid of {canonical.shape}")
    back = _orientations.ornt_transform(np.array([[0, 1], [1, 1], [2, 1]]), _turn(native))
    return cast("NDArray[Any]", _orientations.apply_orientation(array, back))


def read_image(path: Path, case_id: str) -> Volume:
    """Read a CT as (D, H, W) in orientation (I, P, L), in Hounsfield units.

    int16 if the file stores unscaled integers in its range, else float32.

    Raises:
        InputError: see ``read_geometry``; also for truncated data and values that are not finite.
    """
    native, stored, slope, offset = _stored(path, np.dtype(np.float32))
    array = as_ct(stored, slope, offset)
    if array.dtype.kind == "f" and not (np.isfinite(array.min()) and np.isfinite(array.max())):
        raise InputError(path, "it contains NaN or infinite values", "Export the scan again")
    return Volume(array, canonical_geometry(native), native, case_id)


def read_labels(path: Path, case_id: str, scheme: Scheme | None = KITS19, strict: bool = True) -> Volume:
    """Read a label map of a scheme as (D, H, W) uint8 in orientation (I, P, L), with kitseg's ids.

    Integers stored as floats are accepted. Without a scheme, all values from 0 to 255 are read as they are. A DICOM
    segmentation states itself what its segments are.

    Raises:
        InputError: see ``read_image``; also for values outside the scheme, which become ``UNKNOWN`` if ``strict`` is
            False.
    """
    if not is_volume_name(path):
        from kitseg.volumes.dicom.labels import is_segmentation, read_segmentation

        if is_segmentation(path):
            found = read_segmentation(path, case_id)
            return replace(found, array=to_kits19(found.array)) if scheme and not scheme.cyst else found
    native, stored, slope, offset = _stored(path)
    ids = scheme.from_file if scheme else np.arange(256, dtype=np.uint8)
    known = np.flatnonzero(ids != UNKNOWN) if scheme else ids
    if (
        stored.dtype == np.uint8
        and (slope, offset) == (1, 0)
        and (ids == np.arange(256))[: int(stored.max()) + 1].all()
    ):
        return Volume(stored, canonical_geometry(native), native, case_id)
    labels, strange = np.empty(stored.shape, np.uint8), set[float]()
    for row, plane in zip(labels, stored, strict=True):
        with np.errstate(over="ignore", invalid="ignore"):
            values = plane if (slope, offset) == (1, 0) else plane * slope + offset
            whole = values if values.dtype.kind in "iu" else np.rint(values)
            good = np.isin(whole, known) & (np.abs(values - whole) <= LABEL_TOLERANCE)
        strange.update(np.unique(values[~good])[:5].tolist())
        row[:] = np.where(good, ids[np.where(good, whole, 0).astype(np.uint8)], UNKNOWN)
    if strange and (strict or min(strange) <= LOWEST_LABEL):
        raise InputError(path, *_strange_labels(strange, scheme or KITS19))
    return Volume(labels, canonical_geometry(native), native, case_id)


def write_labels(
    path: Path, labels: NDArray[np.uint8], native: Geometry, description: str = MARK, scheme: Scheme | None = None
) -> None:
    """Write (D, H, W) labels in orientation (I, P, L) as uint8 on the native grid, atomically.

    scheme: whose ids the file gets instead of kitseg's; None: the labels as they are.

    Raises:
        InputError: the file can't be written.
    """
    own = labels if scheme is None else scheme.to_file[labels]
    _write(path, own, np.dtype(np.uint8), native, description)


def write_volume(path: Path, labels: NDArray[np.uint8], native: Geometry, scheme: Scheme) -> None:
    """Write (D, H, W) labels in orientation (I, P, L) on the native grid as .mha or .seg.nrrd; see ``write_itk``."""
    from kitseg.volumes.itk import write_itk

    write_itk(path, turn_to_native(labels, native), native, scheme)


def write_image(path: Path, array: NDArray[np.int16], native: Geometry, description: str = "") -> None:
    """Write a (D, H, W) CT in orientation (I, P, L) as int16 on the native grid, atomically.

    Raises:
        InputError: the file can't be written.
    """
    _write(path, array, np.dtype(np.int16), native, description)


def stores_plain_integers(path: Path) -> bool:
    """Whether a file contains unscaled integers on three axes."""
    header = read_header(path)
    unscaled = header.get_slope_inter() in ((1, 0), (None, None))
    return unscaled and header.get_data_dtype().kind in "iu" and len(header.get_data_shape()) == 3


def mark_of(path: Path) -> str:
    """``descrip`` in a file's header, such as ``PHANTOM_MARK``."""
    return "" if is_itk_name(path) else str(read_header(path)["descrip"].item().decode("latin-1"))


def axis_codes(geometry: Geometry) -> str:
    """The orientation of the three axes in the patient, such as ``IPL``."""
    return "".join(_orientations.aff2axcodes(geometry.affine))


def _stored(path: Path, floats: np.dtype[Any] | None = None) -> tuple[Geometry, NDArray[Any], float, float]:
    """The native geometry, the stored values with axes (I, P, L), and the slope and offset that convert them to HU.

    Reads to the end of the file, where gzip's checksum is. floats: the type that values with a fraction get.
    """
    if is_itk_name(path):
        from kitseg.volumes.itk import read_itk

        native, stored = read_itk(path)
        return native, np.ascontiguousarray(turn_to_canonical(stored, native)), 1.0, 0.0
    header = read_header(path)
    native = file_geometry(path, header)
    kind = header.get_data_dtype()
    array = np.empty(canonical_geometry(native).shape, floats if floats and kind.kind == "f" else kind)
    with open_errors(path), open_voxels(path) as stream:
        stream.seek(header.get_data_offset())
        if not _fill(turn_to_native(array, native), kind, stream):
            raise InputError(path, "the file is truncated: it ends before its last voxel", COPY_AGAIN)
        if len(stream.read(_CHUNK)) == _CHUNK:
            problem = "there are many bytes after the last voxel: header and voxels don't match"
            raise InputError(path, problem, COPY_AGAIN)
    slope, offset = header.get_slope_inter()
    return native, array, 1.0 if slope is None else slope, 0.0 if offset is None else offset


def _fill(view: NDArray[Any], kind: np.dtype[Any], stream: IO[bytes]) -> bool:
    """Fill a view on the native grid from a stream of values of a type, some planes at a time; whether it was complete.

    Each chunk is reoriented while it is in the processor's cache, without a second copy of the scan.
    """
    rows, columns, planes = view.shape
    step = max(1, _CHUNK // (rows * columns * kind.itemsize))
    chunk = np.empty((rows, columns, step), kind, order="F")
    for first in range(0, planes, step):
        part = chunk[..., : planes - first]
        space = memoryview(cast("Any", part.reshape(-1, order="F").view(np.uint8)))
        done = 0
        while got := stream.readinto(space[done:]):  # type: ignore[attr-defined]
            done += got
        if done < len(space):
            return False
        with np.errstate(over="ignore", invalid="ignore"):
            view[..., first : first + step] = part
    return True


def as_ct(stored: NDArray[Any], slope: float, offset: float) -> NDArray[Any]:
    """Stored values in HU: int16 where unscaled integers fit it, else float32; ``stored`` may be overwritten."""
    whole = stored.dtype.kind in "iu" and (slope, offset) == (1, 0)
    if whole and (np.can_cast(stored.dtype, np.int16) or (stored.min() >= -(2**15) and stored.max() < 2**15)):
        return stored.astype(np.int16, copy=False)
    with np.errstate(over="ignore", invalid="ignore"):
        array = stored.astype(np.float32, copy=False)
        array *= np.float32(slope)
        array += np.float32(offset)
    return array


def _strange_labels(strange: set[float], scheme: Scheme) -> tuple[str, str]:
    found = ", ".join(f"{value:g}" for value in sorted(strange)[:5])
    if min(strange) <= LOWEST_LABEL:
        return f"it seems to be a CT, not a label map: it contains the values {found}", "Give the label map"
    remedy = f"The labels are {scheme}"
    if scheme.cyst is None and strange == {CYST}:
        remedy += "; for label maps with cysts, give --labels kits23"
    elif min(strange) > 0:
        remedy += "; --labels states other ids"
    return f"it contains the label values {found}", remedy


def make_header(native: Geometry, dtype: np.dtype[Any]) -> Any:
    """A nibabel header for an array on a native grid, which states its place as the grid's own file does."""
    header = _nib.Nifti1Header()
    header.set_data_dtype(dtype)
    header.set_data_shape(native.shape)
    header.set_xyzt_units("mm")
    header.set_qform(native.affine, code=1)
    header.set_sform(native.affine, code=1)
    for name, value in native.stated.items():
        header[name] = value
    return header


def _write(path: Path, array: NDArray[Any], dtype: np.dtype[Any], native: Geometry, description: str) -> None:
    if array.dtype != dtype:
        raise ValueError(f"the array must be {dtype}, not {array.dtype}")
    header = make_header(native, dtype)
    header["descrip"] = description
    header["magic"] = header.single_magic
    header.set_data_offset(header.single_vox_offset)
    header.set_slope_inter(1, 0)
    view = turn_to_native(array, native)
    step = max(1, _CHUNK // (view.shape[0] * view.shape[1] * view.itemsize))
    with atomic_write(path) as partial, _writing(partial) as stream:
        header.write_to(stream)
        for first in range(0, view.shape[2], step):
            stream.write(_in_file_order(view[..., first : first + step]).data)


def _in_file_order(view: NDArray[Any]) -> NDArray[Any]:
    """The values in Fortran order, reoriented in parts that fit a processor's cache."""
    turned = np.empty(view.shape, view.dtype, order="F")
    for row in range(0, view.shape[1], _ROWS):
        turned[:, row : row + _ROWS] = view[:, row : row + _ROWS]
    return turned.reshape(-1, order="F")


@contextmanager
def _writing(path: Path) -> Iterator[IO[bytes]]:
    """A new file, compressed if its name ends in .gz, without time stamp and name: equal content gives equal bytes."""
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
