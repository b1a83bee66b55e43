"""DICOM in: the CT series in a folder tree as hospitals export it, and each of them as a volume.

Nothing is told from a file's name or its place in the folder: a file is DICOM by its content, belongs to the series
that its header names, and lies where its header says.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray

from kitseg.errors import InputError
from kitseg.runtime.files import file_digest
from kitseg.types import Volume
from kitseg.volumes.dicom.headers import Header, is_dicom, made_up_uid, read_dicom_header, walk
from kitseg.volumes.dicom.stack import Stack, Unstackable, split_stacks, stack
from kitseg.volumes.header import MAX_VOXELS
from kitseg.volumes.kits import SUFFIXES
from kitseg.volumes.nifti import canonical_geometry, turn_to_canonical

AIR = -1024  # HU of what lies outside the reconstructed circle; no scanner's air is below
TISSUE = (-500, 1500)  # HU; a padding value in this range can't be told from the patient
_REMEDY = "Export the series again, or choose another one with --series"
_INT16 = np.iinfo(np.int16)


@dataclass(frozen=True, eq=False)
class Series:
    """One CT (or other) series, or one stack of slices where a series has several.

    case_id: what kitseg calls it, told by a hash from the SeriesInstanceUID, and from a slice, too, where others have
    the same UID; headers: its slices, in order of position along their normal where they make a volume; stack: None
    where they make none, and then ``problem`` says why; shared: others have the same UID.
    """

    case_id: str
    headers: tuple[Header, ...]
    stack: Stack | None
    problem: str = ""
    shared: bool = False

    @property
    def uid(self) -> str:
        """The SeriesInstanceUID; for files without, one made from their instances."""
        return _uid(self.headers)

    @property
    def study(self) -> str:
        """The StudyInstanceUID; for files without, one made from what they share with others of their study."""
        named = next((header.study for header in self.headers if header.study), "")
        return named or made_up_uid("study", self.headers[0].frame_of_reference or self.uid)

    @property
    def files(self) -> tuple[Path, ...]:
        """The slices' files, in the order of ``headers``."""
        return tuple(header.path for header in self.headers)

    @property
    def folder(self) -> Path:
        """Where its first slice lies."""
        return self.headers[0].path.parent

    @property
    def note(self) -> str:
        """What a reader should know of how the volume was made; empty if nothing."""
        notes = ["its UID also stands in another study or patient"] if self.shared else []
        if missing := self.stack.missing if self.stack else ():
            words = "1 slice is missing" if len(missing) == 1 else f"{len(missing)} slices are missing"
            places = ", ".join(str(slot + 1) for slot in missing)
            notes.append(f"{words} and interpolated (place {places} of the stack)")
        return "; ".join(notes)


def holds_dicom(folder: Path) -> bool:
    """Whether any file below a folder is DICOM; stops at the first. What is called a NIfTI file is taken for one."""
    for path in walk(folder):
        with suppress(PermissionError):
            if not path.name.lower().endswith(SUFFIXES) and is_dicom(path):
                return True
    return False


def find_series(*folders: Path) -> list[Series]:
    """Every series below the folders, from the headers alone, in the order of their names.

    Files that are not DICOM are passed over; the same instance twice counts once; a file that can't be read is a series
    of its own, with its problem. Slices of two patients or studies are two series, whatever their UIDs.

    Raises:
        InputError: a folder that can't be read.
    """
    groups: dict[tuple[str, str], list[Header]] = {}
    for path in chain.from_iterable(map(walk, folders)):
        if header := _header(path):
            place = header.series or str(path if header.broken else path.parent)
            groups.setdefault((place, header.patient), []).append(header)
    named = [(_uid(headers), headers) for group in groups.values() for headers in _by_study(group)]
    having = Counter(uid for uid, _ in named)
    found = [series for uid, headers in named for series in _stacks(headers, uid, having[uid] > 1)]
    return sorted(found, key=lambda series: series.case_id)


def open_series(files: Sequence[Path], case_id: str) -> Series:
    """The series of these files, such as ``Series.files`` of one that was found before."""
    return _series([read_dicom_header(path) or Header(path, broken=True) for path in files], case_id)


def read_series(series: Series) -> Volume:
    """A series as (D, H, W) int16 in orientation (I, P, L), in Hounsfield units.

    Each slice is rescaled by its own slope and intercept and rounded; padding and all that is below air is
    ``AIR``; a missing slice is the mean of its neighbours. ``native`` has the axes (columns, rows, slices).

    Raises:
        InputError: the slices make no CT volume, or one of them can't be read.
    """
    first, made = series.headers[0], stack_of(series)
    if first.modality != "CT" or first.samples != 1:
        raise InputError(
            series.folder, f"{series.case_id}: its modality is {first.modality or 'unknown'}, not CT", _REMEDY
        )
    native = made.native
    if int(np.prod(native.shape, dtype=object)) > MAX_VOXELS:
        raise InputError(series.folder, f"{series.case_id}: it has more than {MAX_VOXELS} voxels", _REMEDY)
    planes = np.empty(native.shape[::-1], np.int16)
    for header, slot in zip(made.headers, made.slots, strict=True):
        planes[slot] = _read_slice(header)
    for slot in made.missing:
        planes[slot] = np.rint((planes[slot - 1].astype(np.float32) + planes[slot + 1]) / 2)
    array = np.ascontiguousarray(turn_to_canonical(planes.transpose(2, 1, 0), native))
    return Volume(array, canonical_geometry(native), native, series.case_id)


def stack_of(series: Series) -> Stack:
    """A series' slices in order on their lattice.

    Raises:
        InputError: they make no volume.
    """
    if series.stack is None:
        raise InputError(series.folder, f"{series.case_id}: {series.problem}", _REMEDY)
    return series.stack


def read_slices(files: Sequence[Path], case_id: str) -> Volume:
    """The same for the files of a series; see ``read_series``."""
    return read_series(open_series(files, case_id))


def pseudonym(kind: str, uid: str) -> str:
    """A name that is the same for the same UID and doesn't show it: ``kind``, and 10 hex digits of its sha256."""
    digest = hashlib.sha256(uid.encode("utf-8", "surrogateescape")).hexdigest()
    return f"{kind}_{digest[:10]}"


def _header(path: Path) -> Header | None:
    """The header of a DICOM file; None for any other, but a broken one for a file that may not be read."""
    try:
        return read_dicom_header(path) if is_dicom(path) else None
    except PermissionError:
        return Header(path, broken=True)


def _by_study(headers: Sequence[Header]) -> list[list[Header]]:
    """Slices of one UID and patient by study, each instance once; what names no study goes with the first that does."""
    first = next((header.study for header in headers if header.study), "")
    studies: dict[str, dict[tuple[Any, ...], Header]] = {}
    for header in headers:
        study = studies.setdefault(header.study or first, {})
        study.setdefault((header.instance or str(header.path), header.position), header)
    return [list(study.values()) for study in studies.values()]


def _stacks(headers: Sequence[Header], uid: str, shared: bool) -> list[Series]:
    """A series' stacks; all but the largest are numbered."""
    name = pseudonym("series", uid + (_content(headers) if shared else ""))
    parts = enumerate(split_stacks(headers), start=1)
    return [replace(_series(part, f"{name}_{n}" if n > 1 else name), shared=shared) for n, part in parts]


def _content(headers: Sequence[Header]) -> str:
    """The hash of a slice's file, to tell series of one UID apart; who knows the UID could guess a patient's ID."""
    return file_digest(min(headers, key=lambda header: (header.instance, header.position)).path)


def _uid(headers: Sequence[Header]) -> str:
    if headers[0].series:
        return headers[0].series
    return made_up_uid("series", *sorted(header.instance or str(header.path) for header in headers))


def _series(headers: Sequence[Header], case_id: str) -> Series:
    made: Stack | None = None
    problem = "its header can't be read" if headers[0].broken else ""
    try:
        made = None if problem else stack(headers)
    except Unstackable as reason:
        problem = str(reason)
    return Series(case_id, made.headers if made else tuple(headers), made, problem)


def _read_slice(header: Header) -> NDArray[np.int16]:
    """One slice (rows, columns) in HU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = pydicom.dcmread(header.path)
            stored = found.pixel_array
            hu = _hounsfield(found, stored)
        except Exception as error:  # each decoder has its own way to fail
            reason = type(error).__name__  # its words may quote what the file says of the patient
            raise InputError(header.path, f"its pixels can't be read ({reason})", "Export the series again") from error
    if hu.shape != header.size:
        raise InputError(header.path, f"its slice is {hu.shape}, its header says {header.size}", "Export it again")
    return hu


def _hounsfield(found: pydicom.Dataset, stored: NDArray[Any]) -> NDArray[np.int16]:
    slope, intercept = (_number(found.get(f"Rescale{name}"), default) for name, default in _RESCALE)
    if slope == 0 or not math.isfinite(slope + intercept):
        raise ValueError("a rescale slope of 0, or one or an intercept that is not finite")
    hu = np.rint(stored.astype(np.float32) * np.float32(slope) + np.float32(intercept))
    if (padding := _padding(found)) is not None:
        low, high = padding
        value = low * slope + intercept
        if not TISSUE[0] <= value <= TISSUE[1]:
            hu[(stored >= low) & (stored <= high)] = AIR
    clipped: NDArray[np.int16] = hu.clip(AIR, _INT16.max).astype(np.int16)
    return clipped


_RESCALE = (("Slope", 1.0), ("Intercept", 0.0))


def _number(value: Any, default: float) -> float:
    return default if value is None or value == "" else float(value)


def _padding(found: pydicom.Dataset) -> tuple[int, int] | None:
    """The lowest and highest stored value that mean no data, whatever sign the file gives them."""
    values = [found.get("PixelPaddingValue"), found.get("PixelPaddingRangeLimit")]
    bits, signed = int(found.BitsAllocated), bool(found.PixelRepresentation)
    plain = [int(v) % 2**bits for v in values if v is not None and v != ""]
    turned = [v - 2**bits if signed and v >= 2 ** (bits - 1) else v for v in plain]
    return (min(turned), max(turned)) if turned and values[0] is not None else None
