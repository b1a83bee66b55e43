"""Find and read scans from NIfTI files and DICOM series."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kitseg.errors import InputError, UsageError
from kitseg.labels import Scheme
from kitseg.runtime.files import file_digest
from kitseg.types import Box, Case, Geometry, Volume, triple
from kitseg.volumes.check import refuse_labels
from kitseg.volumes.header import read_header
from kitseg.volumes.kits import collect_scans, distinct, holds_scans, with_labels
from kitseg.volumes.names import is_itk_name, is_volume_name, pair
from kitseg.volumes.nifti import canonical_geometry, read_geometry, read_image
from kitseg.volumes.references import read_reference

if TYPE_CHECKING:
    from kitseg.volumes.dicom.choice import SeriesChoice

LOWEST_HU = -1024  # air; what is lower states padding, which formats keep or not
TOLERANCE = 0.1  # mm between the grids of a label map and its scan: other tools round affines


@dataclass(frozen=True)
class Scans:
    """The selected scans; choices: every DICOM series found, with the reason why it was selected or not."""

    cases: tuple[Case, ...]
    choices: tuple[SeriesChoice, ...] = ()


def find_scans(paths: Sequence[Path], series: Sequence[str] = ()) -> Scans:
    """The scans in files and folders: NIfTI files, or if a folder has none, the CT of each DICOM study in it.

    series: DICOM series to select instead, by UID or by kitseg's name of the series.

    Raises:
        InputError: a path is missing, or a folder contains no scan, or both NIfTI scans and DICOM files.
        UsageError: two scans with the same name, or an unknown series.
    """
    paths = [path.absolute() for path in paths]  # worker processes may have another working directory
    archives = [path for path in paths if path.is_dir() and _holds_dicom(path)]
    if mixed := next((path for path in archives if holds_scans(path)), None):
        raise InputError(mixed, "contains NIfTI scans and DICOM files", "Give the files or the subfolder to use.")
    files = [path for path in paths if path not in archives]
    if series and not archives:
        raise UsageError("--series needs DICOM files, but none were found")
    choices = _choose(archives, series) if archives else []
    cases = [*collect_scans(files), *(_case(choice) for choice in choices if choice.chosen)]
    return Scans(tuple(distinct(cases)), tuple(choices))


def scans_of_labels(
    labels: Collection[str], paths: Sequence[Path], masks: Path | None = None, alone: bool = False
) -> dict[str, Case]:
    """The scans in files and folders by the names of their label maps, as ``kits.pair`` finds them.

    Includes every DICOM series that forms a volume. masks: the folder of reference label maps, see ``with_labels``;
    alone: where no scan has their name, they are of the only scan to segment; its note states what it was chosen from.

    Raises:
        InputError: a path is missing or a folder contains no scan. UsageError: two scans with the same id.
    """
    scans = find_scans(paths) if paths else Scans(())
    others = [_case(choice) for choice in scans.choices if choice.series.stack and not choice.chosen]
    cases = {case.id: case for case in with_labels(distinct((*scans.cases, *others)), masks)}
    found = {name: cases[scan] for name, scan in pair(labels, cases).items()}
    if not alone or found or len(scans.cases) != 1:
        return found
    series = [one.series for one in scans.choices if one.series.stack and one.series.headers[0].modality == "CT"]
    notes = [f"no name states its series: of {len(series)}, the one to segment was taken"] if len(series) > 1 else []
    return dict.fromkeys(labels, replace(scans.cases[0], note="; ".join(filter(None, [*notes, scans.cases[0].note]))))


def check_grid(path: Path, labels: Geometry, scan: Geometry, of: str = "its scan") -> None:
    """Check that a label map lies on its scan's grid; ``of`` names what else it is compared with, for the error.

    Raises:
        InputError: it isn't.
    """
    if not labels.same_as(scan, TOLERANCE):
        problem = f"lies on another grid than {of} (shape {labels.shape} and {scan.shape}, or affine)"
        raise InputError(path, problem, "Save it with the shape and affine of the scan.")


def place_on(labels: Volume, scan: Volume) -> Volume:
    """A label map on its scan's grid, where it covers a part of it as a DICOM segmentation does; else unchanged."""
    shift = np.linalg.inv(scan.geometry.affine) @ labels.geometry.affine
    start = np.rint(shift[:3, 3]).astype(int)
    box = Box(triple(start), triple(start + labels.array.shape))
    if box.clip(scan.geometry.shape) != box or not scan.geometry.crop(box).same_as(labels.geometry, TOLERANCE):
        return labels
    whole = np.zeros(scan.geometry.shape, labels.array.dtype)
    whole[box.slices] = labels.array
    native = replace(scan.native, doubts=(*scan.native.doubts, *labels.native.doubts))
    return Volume(whole, scan.geometry, native, labels.case_id)


def label_of(case: Case) -> Path:
    """A case's label map. Raises InputError: it has none."""
    if case.label is None:
        raise InputError(case.image, "has no segmentation beside it", "Add segmentation.nii.gz.")
    return case.label


def read_labelled(case: Case, scheme: Scheme) -> tuple[Volume, Volume]:
    """The CT of a case, and its label map on the same grid.

    Raises:
        InputError: there is no label map, one of both can't be used, or they lie on different grids.
    """
    label = label_of(case)
    scan, labels = read_scan(case), read_reference(label, case.id, scheme)
    check_grid(label, labels.geometry, scan.geometry)
    return scan, labels


def read_scan(case: Case) -> Volume:
    """Read a case's CT as (D, H, W) HU in orientation (I, P, L).

    Raises:
        InputError: it can't be used, see ``nifti.read_image`` and ``dicom.series.read_series``; or it is a label map.
    """
    if not case.slices:
        scan = read_image(case.image, case.id)
        refuse_labels(case.image, scan.array)
        return scan
    from kitseg.volumes.dicom.series import open_series, read_series

    return read_series(open_series(case.slices, case.id))


def scan_geometry(case: Case) -> Geometry:
    """The geometry of a case's CT in orientation (I, P, L), from headers alone. Raises InputError: it can't be used."""
    if not case.slices:
        return canonical_geometry(read_geometry(case.image))
    from kitseg.volumes.dicom.series import open_series, stack_of

    return canonical_geometry(stack_of(open_series(case.slices, case.id)).native)


def voxel_bytes(case: Case) -> int:
    """Bytes of a voxel of a case's CT in memory: 2 of DICOM and unscaled int16 in NIfTI, else 4, those of a float32."""
    if case.slices or is_itk_name(case.image):
        return 2 if case.slices else 4
    header = read_header(case.image)
    plain = header.get_slope_inter() in ((1, 0), (None, None))
    return 2 if plain and np.can_cast(header.get_data_dtype(), np.int16) else 4


def scan_digest(case: Case) -> str:
    """The SHA-256 of a scan's file, or of the hashes of its slices in order."""
    if not case.slices:
        return file_digest(case.image)
    return hashlib.sha256("".join(map(file_digest, case.slices)).encode()).hexdigest()


def hu_digest(scan: Volume) -> str:
    """The SHA-256 of a scan's HU in orientation (I, P, L), which is the same whatever the format of its file."""
    digest = hashlib.sha256(str(scan.array.shape).encode())
    for plane in scan.array:
        hu = np.clip(plane if plane.dtype.kind in "iu" else np.rint(plane), LOWEST_HU, 32767)
        digest.update(hu.astype("<i2").tobytes())
    return digest.hexdigest()


def scan_date(case: Case) -> date | None:
    """The date of acquisition of a DICOM series, else of its study; None for NIfTI, and where it isn't given."""
    if not case.slices:
        return None
    from kitseg.volumes.dicom.headers import read_dataset

    found = read_dataset(case.slices[0])
    for name in ("AcquisitionDate", "SeriesDate", "StudyDate"):
        with suppress(ValueError):
            return datetime.strptime(str(found.get(name, "")), "%Y%m%d").date()
    return None


def patient_of(file: Path) -> str:
    """The patient's ID in a DICOM file; empty for other files, and where it isn't given."""
    if is_volume_name(file):
        return ""
    from kitseg.volumes.dicom.headers import read_dicom_header

    found = read_dicom_header(file)
    return found.patient if found else ""


def place_doubts(*volumes: Volume | None) -> tuple[str, ...]:
    """What the files of these volumes leave open about the place in the patient, each doubt once."""
    return tuple(dict.fromkeys(doubt for volume in volumes if volume for doubt in volume.native.doubts))


def _holds_dicom(folder: Path) -> bool:
    from kitseg.volumes.dicom.series import holds_dicom

    return holds_dicom(folder)


def _choose(archives: Sequence[Path], wanted: Sequence[str]) -> list[SeriesChoice]:
    from kitseg.volumes.dicom.choice import choose_series
    from kitseg.volumes.dicom.series import find_series

    return choose_series(find_series(*archives), wanted)


def _case(choice: SeriesChoice) -> Case:
    series = choice.series
    return Case(series.case_id, series.folder, slices=series.files, note=series.note)
