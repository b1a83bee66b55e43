"""Which files belong to which case: the KiTS layout ``case_00210/imaging.nii.gz`` and flat folders of NIfTI files.

Beside the cases, ``patients.csv`` (columns case and patient) may state which of them show the same patient, and
``kits.json`` holds the challenge's clinical data.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kitseg.errors import InputError, UsageError, printable
from kitseg.runtime.provenance import FileFormat
from kitseg.types import Case

IMAGE, LABEL = "imaging.nii.gz", "segmentation.nii.gz"
PATIENTS, CLINICAL = "patients.csv", "kits.json"
SUFFIXES = (".nii.gz", ".nii")
_EXPECTED = f"Give a folder of case_00000/{IMAGE}, or of .nii.gz files"


@dataclass(frozen=True)
class CopyOrigin:
    """How a registered copy was made, or why it was rejected, which is its ``reason``.

    patients, sources: the patients and the cases that it shows; settings, convention, made_from: the registration's
    settings, the label convention and the hashes of the files; dice_before, dice_after: overlap of the kidneys.
    """

    patients: tuple[str, ...]
    sources: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    convention: str = ""
    made_from: tuple[str, ...] = ()
    reason: str | None = None
    dice_before: float = 0.0
    dice_after: float = 0.0


@dataclass(frozen=True)
class _Clinical:
    case_id: str
    tumor_histologic_subtype: str | None = None
    surgical_procedure: str | None = None


ORIGIN, COPY_ORIGIN = "origin.json", FileFormat(CopyOrigin, 1, "Make the copy again with `kitseg augment`.")
_CLINICAL = FileFormat(list[_Clinical], None, "Take it from the KiTS19 repository.")


def case_number(name: str) -> int | None:
    """The KiTS number in a name: its last group of exactly five digits (``prediction_00210`` is 210).

    The name of a DICOM series holds none.
    """
    if re.fullmatch(r"series_[0-9a-f]{10}(_\d+)?", name):
        return None
    groups = re.findall(r"(?<!\d)\d{5}(?!\d)", name)
    return int(groups[-1]) if groups else None


def case_name(number: int) -> str:
    """The id of a KiTS case, such as ``case_00210``."""
    return f"case_{number:05d}"


def scan_id(path: Path) -> str:
    """A scan's id: its folder's name in the KiTS layout, else the file's name without ``.nii.gz``.

    Control characters and bytes that are not UTF-8 are escaped, so that the name can be written and shown anywhere.
    """
    return printable(path.absolute().parent.name) if path.name == IMAGE else _stem(path)


def case_of(folder: Path) -> Case:
    """A KiTS case folder as a case; its image may be missing."""
    label = folder / LABEL
    return Case(printable(folder.absolute().name), folder / IMAGE, None if _is_missing(label) else label)


def list_cases(data: Path) -> list[Case]:
    """Every case in a folder, sorted by id, also those whose image is missing from their ``case_*`` folder.

    Everything with a scan's name counts, even a folder or a broken link: reading it reports the problem. A folder holds
    cases in the KiTS layout, or is one case itself, or holds NIfTI files (which have no labels).

    Raises:
        InputError: the folder is missing or holds no cases.
        UsageError: two files have the same id.
    """
    _check_folder(data)
    data = data.absolute()  # worker processes may stand in another folder
    if os.path.lexists(data / IMAGE):
        return [_with_origin(case_of(data), {})]
    folders = [f for f in _folders(data) if f.name.startswith("case_") or os.path.lexists(f / IMAGE)]
    cases = [case_of(f) for f in folders] or [Case(scan_id(f), f) for f in _flat(data)]
    if not cases:
        raise InputError(data, "the folder holds no scans", _EXPECTED)
    patients = read_patients(data / PATIENTS)
    return [_with_origin(case, patients) for case in distinct(cases)]


def read_patients(path: Path) -> dict[str, str]:
    """Each case's patient from a table with the columns ``case`` and ``patient``; empty where there is no file.

    Raises:
        InputError: unreadable, other columns, or a case with two patients.
    """
    if not path.exists():
        return {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [(row["case"].strip(), row["patient"].strip()) for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, AttributeError, csv.Error) as error:
        raise InputError(path, "is not a table of cases", "It needs the columns case and patient.") from error
    if odd := sorted({case for case, patient in rows if not patient or (case, patient) not in dict(rows).items()}):
        raise InputError(path, f"gives no patient, or two, to {', '.join(odd)}", "Fix the file.")
    return dict(rows)


def read_clinical(path: Path) -> dict[str, dict[str, str]]:
    """Each case's histology and surgery from ``kits.json``, if there is one. Raises InputError: not a list of cases."""
    if not path.exists():
        return {}
    names = {"histology": "tumor_histologic_subtype", "surgery": "surgical_procedure"}
    return {
        row.case_id: {name: group for name, field in names.items() if (group := getattr(row, field))}
        for row in _CLINICAL.read(path)
    }


def labelled_cases(folders: Sequence[Path]) -> list[Case]:
    """The cases of folders that have a label to learn from.

    Raises:
        InputError: there are none. UsageError: two folders hold a case of the same name.
    """
    found = [case for folder in folders for case in find_cases(folder)]
    patients = {case: whose for folder in folders for case, whose in read_patients(folder / PATIENTS).items()}
    if strange := sorted(patients.keys() - {case.id for case in found}):
        problem = f"names {', '.join(strange)}, which no data folder holds"
        raise InputError(folders[0] / PATIENTS, problem, "Fix the names, or give the folder of these cases, too.")
    cases = [_with_origin(case, patients) for case in found if case.label is not None]
    if not cases:
        raise InputError(folders[0], "holds no case with a segmentation", f"Add case_00000/{LABEL} and so on.")
    return distinct({os.path.realpath(case.image): case for case in cases}.values())


def holds_scans(folder: Path) -> bool:
    """Whether there are NIfTI scans in a folder, flat or in the KiTS layout."""
    return any(os.path.lexists(f / IMAGE) for f in _folders(folder)) or bool(_flat(folder))


def find_cases(data: Path) -> list[Case]:
    """The cases in a folder that have an image, sorted by id; see ``list_cases``.

    Raises:
        InputError: the folder is missing or holds no scan.
        UsageError: two files have the same id.
    """
    if cases := [case for case in list_cases(data) if not _is_missing(case.image)]:
        return cases
    raise InputError(data, f"none of its case folders holds {IMAGE}", _EXPECTED)


def collect_scans(paths: Sequence[Path]) -> list[Case]:
    """The scans that files, case folders and folders of scans name, sorted by id; the same file counts once.

    Raises:
        InputError: a path is missing or a folder holds no scan.
        UsageError: two files have the same id.
    """
    cases: list[Case] = []
    for path in paths:
        if path.is_dir():
            cases += find_cases(path)
        elif not path.exists():
            raise InputError(path, "there is no such file or folder", "Check the path")
        else:
            cases.append(Case(scan_id(path), path))
    return distinct({os.path.realpath(case.image): case for case in cases}.values())


def label_id(name: str) -> str:
    """The id that labels and scans share: ``case_00210`` where a name holds a KiTS number, else the name itself."""
    number = case_number(name)
    return name if number is None else case_name(number)


def find_labels(folder: Path) -> dict[str, Path]:
    """The label maps in a folder, KiTS layout or flat, or a single file, by case id.

    The id is ``case_00210`` where the name holds a KiTS number, so that ``prediction_00210.nii.gz`` and
    ``case_00210/segmentation.nii.gz`` meet; else it is the name without ``.nii.gz``.

    Raises:
        InputError: the folder is missing or holds no label maps.
        UsageError: two files have the same id.
    """
    if folder.is_file():
        return {_label_id(folder): folder}
    _check_folder(folder)
    files = sorted(f / LABEL for f in _folders(folder) if os.path.lexists(f / LABEL)) or _flat(folder)
    if not files:
        raise InputError(folder, "the folder holds no label maps", f"Give one of case_00000/{LABEL} or .nii.gz")
    cases = [Case(_label_id(f), f) for f in files]
    return {case.id: case.image for case in distinct(cases)}


def _with_origin(case: Case, patients: Mapping[str, str]) -> Case:
    """The case with the patients that it shows: its own, or those that a registered copy was made from."""
    path = case.image.with_name(ORIGIN)
    if case.image.name != IMAGE or not os.path.lexists(path):
        return replace(case, patients=(patients[case.id],)) if case.id in patients else case
    origin = COPY_ORIGIN.read(path)
    return replace(case, patients=origin.patients, sources=origin.sources)


def _label_id(path: Path) -> str:
    return label_id(printable(path.absolute().parent.name) if path.name == LABEL else _stem(path))


def _is_missing(path: Path) -> bool:
    """Whether there is nothing of that name; what lies behind a folder that may not be read isn't missing."""
    try:
        os.lstat(path)
    except OSError as error:
        return isinstance(error, FileNotFoundError | NotADirectoryError)
    return False


def _stem(path: Path) -> str:
    return printable(re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE))


def _folders(folder: Path) -> list[Path]:
    return [f for f in _visible(folder) if os.path.isdir(f)]


def _flat(folder: Path) -> list[Path]:
    return sorted(f for f in _visible(folder) if f.name.lower().endswith(SUFFIXES))


def _visible(folder: Path) -> list[Path]:
    """The files and folders in a folder, but for hidden ones, which may be half-written."""
    try:
        return [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise InputError(folder, f"it can't be read ({error.strerror})", "Name a folder that you may read.") from error


def distinct(cases: Iterable[Case]) -> list[Case]:
    """The cases sorted by id. Raises UsageError: two have the same id."""
    by_id: dict[str, Case] = {}
    for case in cases:
        if (other := by_id.setdefault(case.id, case)) is not case:
            raise UsageError(f"{other.image} and {case.image} are both called {case.id}. Rename one of them")
    return [by_id[name] for name in sorted(by_id)]


def _check_folder(folder: Path) -> None:
    if folder.is_file():
        raise InputError(folder, "it is a file, not a folder", _EXPECTED)
    if not folder.is_dir():
        raise InputError(folder, "there is no such folder", _EXPECTED)
