"""DICOM input: find the CT series in a folder tree, and read them as volumes.

File names and folders are ignored: a file is recognized as DICOM by its content, and its header determines its series
and position.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from kitseg.errors import InputError
from kitseg.runtime.files import file_digest
from kitseg.types import Volume
from kitseg.volumes.dicom.headers import Header, is_dicom, made_up_uid, read_dicom_header, walk
from kitseg.volumes.dicom.pixels import read_planes
from kitseg.volumes.dicom.stack import Stack, Unstackable, is_scout, repeats, split_stacks, stack, without_copies
from kitseg.volumes.header import MAX_VOXELS
from kitseg.volumes.names import is_volume_name
from kitseg.volumes.nifti import canonical_geometry, turn_to_canonical

APART = 1.5  # times the thickness of slices, beyond which their distance is doubtful
_REMEDY = "Export the series again, or choose another one with --series"


@dataclass(frozen=True, eq=False)
class Series:
    """A series, or one of its stacks if it has several.

    case_id: kitseg's name, a hash of the SeriesInstanceUID, and of a slice if several series share the UID; headers: of
    its slices, sorted by position along their normal if they form a volume; stack: None if they don't, for the reason
    in ``problem``; remarks: for the user, on other files of its UID and its folder.
    """

    case_id: str
    headers: tuple[Header, ...]
    stack: Stack | None
    problem: str = ""
    remarks: tuple[str, ...] = ()

    @property
    def uid(self) -> str:
        """The SeriesInstanceUID; derived from the instances if the files have none."""
        return _uid(self.headers)

    @property
    def study(self) -> str:
        """The StudyInstanceUID; derived from attributes that a study shares if the files have none."""
        named = next((header.study for header in self.headers if header.study), "")
        return named or made_up_uid("study", self.headers[0].frame_of_reference or self.uid)

    @property
    def files(self) -> tuple[Path, ...]:
        """The slices' files, in the order of ``headers``."""
        return tuple(header.path for header in self.headers)

    @property
    def folder(self) -> Path:
        """The folder of its first slice."""
        return self.headers[0].path.parent

    @property
    def note(self) -> str:
        """Remarks for the user on how the volume was built; may be empty."""
        notes, first = list(self.remarks), self.headers[0]
        apart = self.stack.native.spacing[2] if self.stack else 0.0
        if apart and first.between and abs(abs(first.between) - apart) > 0.1:
            stated = f"{abs(first.between):.4g} mm between slices"
            notes.append(f"its headers state {stated}, its positions {apart:.4g} mm (used)")
        elif not first.between and first.thickness and apart > APART * first.thickness:
            notes.append(f"its slices are {first.thickness:.4g} mm thick and {apart:.4g} mm apart: some may be missing")
        if missing := self.stack.missing if self.stack else ():
            words = "1 slice is missing" if len(missing) == 1 else f"{len(missing)} slices are missing"
            places = ", ".join(str(slot + 1) for slot in missing)
            notes.append(f"{words} and interpolated (place {places} of the stack)")
        return "; ".join(notes)


def holds_dicom(folder: Path) -> bool:
    """Whether any file below a folder is DICOM, except files named as NIfTI; stops at the first."""
    return any(not is_volume_name(path) and is_dicom(path) for path in walk(folder))


def find_series(*folders: Path) -> list[Series]:
    """Find all series below the folders from their headers, sorted by name.

    Files that are not DICOM are ignored; duplicates of an instance count once; an unreadable file is a separate series
    with a problem. Slices of two patients or studies are two series, even if they share a UID.

    Raises:
        InputError: a folder that can't be read.
    """
    groups: dict[tuple[str, str], list[Header]] = {}
    for path in chain.from_iterable(map(walk, folders)):
        if header := read_dicom_header(path):
            place = header.series or str(path if header.broken else path.parent)
            groups.setdefault((place, header.patient), []).append(header)
    named = [(_uid(headers), headers) for group in groups.values() for headers in _by_study(group)]
    having = Counter(uid for uid, _ in named)
    broken = Counter(header.path.parent for group in groups.values() for header in group if header.broken)
    found = [series for uid, headers in named for series in _stacks(headers, uid, having[uid] > 1, broken)]
    return sorted(found, key=lambda series: series.case_id)


def open_series(files: Sequence[Path], case_id: str) -> Series:
    """Open the series of these files, such as ``Series.files``."""
    return _series([read_dicom_header(path) or Header(path, broken=True) for path in files], case_id)


def read_series(series: Series) -> Volume:
    """Read a series as (D, H, W) int16 in orientation (I, P, L), in Hounsfield units.

    Each slice is rescaled by its own slope and intercept and rounded; padding and values below air become ``AIR``; a
    missing slice is the mean of its neighbours. ``native`` has the axes (columns, rows, slices).

    Raises:
        InputError: the slices form no CT volume, or one of them can't be read.
    """
    first, made = series.headers[0], stack_of(series)
    problem = ""
    if first.modality != "CT" or first.samples != 1:
        problem = "its modality is not CT"
    elif math.prod(made.native.shape) > MAX_VOXELS:
        problem = f"more than {MAX_VOXELS} voxels"
    if problem:
        raise InputError(series.folder, f"{series.case_id}: {problem}", _REMEDY)
    native = made.native
    planes = np.empty(native.shape[::-1], np.int16)
    for plane, slot in zip(read_planes(made.headers), made.slots, strict=True):
        planes[slot] = plane
    for slot in made.missing:
        planes[slot] = np.rint((planes[slot - 1].astype(np.float32) + planes[slot + 1]) / 2)
    array = np.ascontiguousarray(turn_to_canonical(planes.transpose(2, 1, 0), native))
    return Volume(array, canonical_geometry(native), native, series.case_id)


def stack_of(series: Series) -> Stack:
    """The stack of a series' slices. Raises InputError: they form no volume."""
    if series.stack is None:
        raise InputError(series.folder, f"{series.case_id}: {series.problem}", _REMEDY)
    return series.stack


def pseudonym(kind: str, uid: str) -> str:
    """A reproducible pseudonym of a UID: ``kind`` and 10 hex digits of its SHA-256."""
    digest = hashlib.sha256(uid.encode("utf-8", "surrogateescape")).hexdigest()
    return f"{kind}_{digest[:10]}"


def _by_study(headers: Sequence[Header]) -> list[list[Header]]:
    """Slices of one UID and patient by study, without duplicates; slices without a study join the first study."""
    first = next((header.study for header in headers if header.study), "")
    studies: dict[str, dict[tuple[Any, ...], Header]] = {}
    for header in headers:
        study = studies.setdefault(header.study or first, {})
        study.setdefault((header.instance or str(header.path), header.position, header.passes), header)
    return [list(study.values()) for study in studies.values()]


def _stacks(headers: Sequence[Header], uid: str, shared: bool, broken: Mapping[Path, int]) -> list[Series]:
    """The stacks of a series; all except the largest get a number.

    The hash of a slice's file distinguishes series that share a UID, without revealing a patient's ID. broken: the
    number of unreadable files in each folder.
    """
    first = min(headers, key=lambda header: (header.instance, header.position)).path
    name = pseudonym("series", uid + (file_digest(first) if shared else ""))
    parts, found = split_stacks(headers), []
    for n, part in enumerate(parts, start=1):
        slices = without_copies(part) if part[0].position and repeats(part) else part
        unreadable = 0 if part[0].broken else sum(broken[folder] for folder in {header.path.parent for header in part})
        remarks = {
            "another study or patient has the same series UID": shared,
            "copies of slices, left out: {}": len(part) - len(slices),
            "slices of its series that form other stacks, left out: {}": sum(
                len(other) for other in parts if other is not part and not is_scout(other[0])
            ),
            "unreadable files beside it: {}": unreadable,
        }
        made = _series(slices, f"{name}_{n}" if n > 1 else name)
        found.append(replace(made, remarks=tuple(text.format(count) for text, count in remarks.items() if count)))
    return found


def _uid(headers: Sequence[Header]) -> str:
    if headers[0].series:
        return headers[0].series
    return made_up_uid("series", *sorted(header.instance or str(header.path) for header in headers))


def _series(headers: Sequence[Header], case_id: str) -> Series:
    try:
        made = stack(headers)
    except Unstackable as reason:
        return Series(case_id, tuple(headers), None, str(reason))
    return Series(case_id, made.headers, made)
