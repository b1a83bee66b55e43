"""Which files belong to which case: the KiTS layout ``case_00210/imaging.nii.gz``, flat folders, and nnU-Net's."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kitseg.errors import InputError, UsageError, printable
from kitseg.labels import scheme_of
from kitseg.runtime.provenance import FileFormat
from kitseg.types import Case
from kitseg.volumes.check import refuse_scans
from kitseg.volumes.folders import LABELS, describe_others, folders_in, images_in, scans, stem, visible, volumes
from kitseg.volumes.names import clean_name, is_volume_name, pair, shorten
from kitseg.volumes.tables import PATIENTS, read_patients

IMAGE, LABEL = "imaging.nii.gz", "segmentation.nii.gz"
MAJORITY = "aggregated_MAJ_seg.nii.gz"  # KiTS21's label map
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".7z", ".rar")
_EXPECTED = f"Give a folder of case_00000/{IMAGE}, or of .nii.gz files"


@dataclass(frozen=True)
class CopyOrigin:
    """How a registered copy was made, or why it was rejected, which is its ``reason``.

    patients, sources: the patients and the cases that it shows; settings, made_from: the registration's settings
    and the hashes of the files; labels: the ids of the label map; convention: the scheme's name in files of kitseg
    0.1; dice_before, dice_after: overlap of the kidneys.
    """

    patients: tuple[str, ...]
    sources: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    labels: str = ""
    convention: str = ""
    made_from: tuple[str, ...] = ()
    reason: str | None = None
    dice_before: float = 0.0
    dice_after: float = 0.0

    def __post_init__(self) -> None:
        if self.convention:
            object.__setattr__(self, "labels", scheme_of(self.convention).line)


ORIGIN, COPY_ORIGIN = "origin.json", FileFormat(CopyOrigin, 1, "Make the copy again with `kitseg augment`.")


def scan_id(path: Path) -> str:
    """A scan's id: its folder's name in the KiTS layout, else the file's name without ``.nii.gz``.

    Control characters and bytes that are not UTF-8 are escaped, so that the name can be written and shown anywhere;
    accents are composed (NFC), so that names from macOS and from Linux are equal.
    """
    return clean_name(path.absolute().parent.name) if path.name in _forms(IMAGE) else stem(path)


def folder_of(scan: Path) -> Path:
    """The folder that holds a scan under its id: the file's own, or in the KiTS layout that of its case's folder."""
    return scan.absolute().parent.parent if scan.name in _forms(IMAGE) else scan.absolute().parent


def case_of(folder: Path) -> Case:
    """A KiTS case folder as a case; its image may be missing."""
    label = _label_in(folder) or (None if _is_missing(folder / LABEL) else folder / LABEL)
    return Case(clean_name(folder.absolute().name), _found(folder, IMAGE) or folder / IMAGE, label)


def list_cases(data: Path) -> list[Case]:
    """Every case in a folder, sorted by id, also those whose image is missing from their ``case_*`` folder.

    Everything with a scan's name counts, even a folder or a broken link: reading it reports the problem. A folder holds
    cases in the KiTS layout and NIfTI files (without labels), or is one case itself, or a raw data set of nnU-Net, of
    which ``imagesTr`` and ``labelsTr`` are used.

    Raises:
        InputError: the folder is missing or holds no cases.
        UsageError: two files have the same id.
    """
    _check_folder(data)
    data = data.absolute()  # worker processes may stand in another folder
    if _found(data, IMAGE):
        return [with_origin(case_of(data), {})]
    folders = [f for f in folders_in(data) if f.name.startswith("case_") or _found(f, IMAGE)]
    cases = distinct([*map(case_of, folders), *(Case(scan_id(f), f) for f in scans(images_in(data)))])
    if not cases:
        raise InputError(data, *_no_scans(data))
    patients = read_patients(data / PATIENTS)
    cases = with_labels(cases, data / LABELS if (data / LABELS).is_dir() else None)
    return [with_origin(case, patients) for case in cases]


def with_labels(cases: Sequence[Case], masks: Path | None) -> list[Case]:
    """The cases with the label maps of a folder, as far as it has one; the others keep what lies beside their scan.

    Raises:
        InputError: the folder is missing, or holds no label maps, or of none of the cases. UsageError: see ``pair``.
    """
    if masks is None:
        return list(cases)
    maps = find_labels(masks.absolute())
    refuse_scans(masks, maps)
    names = [case.id for case in cases]
    pairs = pair(names, maps)
    if cases and not pairs:
        problem = f"its label maps ({shorten([*maps], 3)}) have other names than the scans ({shorten(names, 3)})"
        raise InputError(masks, problem, "Rename them, or choose another folder.")
    return [replace(case, label=maps[pairs[case.id]]) if case.id in pairs else case for case in cases]


def left_out(data: Sequence[Path], cases: Sequence[Case], masks: Path | None = None, labels: bool = True) -> list[str]:
    """What folders of these cases hold that isn't used, a line each; labels: also maps and scans without the other."""
    used, lines = {os.path.realpath(file) for case in cases for file in case.files}, []
    for folder in (inside for path in data if path.is_dir() for inside in folders_in(path)):
        files = {os.path.realpath(file) for file in volumes(folder)}
        if files and not files & used and not os.path.lexists(folder / IMAGE):
            lines.append(f"ignored: {len(files)} NIfTI files in {folder}")
    lines += [line for path in data if path.is_dir() for line in describe_others(images_in(path))]
    if not labels:
        return lines
    for folder in [masks] if masks else [path / LABELS for path in data if (path / LABELS).is_dir()]:
        if alone := [name for name, path in find_labels(folder).items() if os.path.realpath(path) not in used]:
            lines.append(f"ignored: {len(alone)} label maps in {folder} without a scan: {shorten(alone)}")
    if unlabelled := [case.id for case in cases if case.label is None]:
        where = "; --masks names their folder" if masks is None else ""
        lines.append(f"{len(unlabelled)} of {len(cases)} scans have no label map: {shorten(unlabelled)}{where}")
    return lines


def labelled_cases(folders: Sequence[Path], masks: Path | None = None) -> list[Case]:
    """The cases of folders that have a label to learn from; ``masks``: see ``with_labels``.

    Raises:
        InputError: there are none. UsageError: two cases have the same name, or one scan has two label maps.
    """
    found = with_labels([case for folder in folders for case in find_cases(folder)], masks)
    names, patients = {case.id for case in found}, dict[str, str]()
    for folder in folders:
        patients |= (table := read_patients(folder / PATIENTS))
        if strange := sorted(table.keys() - names):
            problem = f"names {', '.join(strange)}, which no data folder holds"
            raise InputError(folder / PATIENTS, problem, "Fix the names, or give the folder of these cases, too.")
    cases = [with_origin(case, patients) for case in found if case.label is not None]
    if not cases:
        remedy = f"Add case_00000/{LABEL} and so on, or name the folder of the label maps with --masks."
        raise InputError(folders[0], "holds no case with a segmentation", remedy)
    once: dict[str, Case] = {}
    for case in cases:
        other = once.get(os.path.realpath(case.image), case)
        if os.path.realpath(str(other.label)) != os.path.realpath(str(case.label)):
            problem = f"{other.id} and {case.id} are one scan ({os.path.realpath(case.image)}) with two label maps"
            raise UsageError(f"{problem}. Leave one of them out")
        once[os.path.realpath(case.image)] = case
    return distinct(once.values())


def holds_scans(folder: Path) -> bool:
    """Whether there are NIfTI scans in a folder, flat or in the KiTS layout."""
    return any(_found(f, IMAGE) for f in folders_in(folder)) or bool(scans(folder))


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


def find_labels(folder: Path) -> dict[str, Path]:
    """The label maps in a folder, KiTS layout, flat or nnU-Net's, or a single file, by the names of their cases.

    In a folder without NIfTI files, the DICOM segmentations below it.

    Raises:
        InputError: the folder is missing or holds no label maps.
        UsageError: two files have the same name.
    """
    if folder.is_file():
        return {_label_id(folder): folder}
    _check_folder(folder)
    if alone := _label_in(folder):
        return {_label_id(alone): alone}
    flat = volumes(folder / LABELS if (folder / LABELS).is_dir() else folder)
    files = [*filter(None, map(_label_in, folders_in(folder))), *flat]
    if not files:
        from kitseg.volumes.dicom.labels import find_segmentations

        files = find_segmentations(folder)
    if not files:
        raise InputError(folder, "the folder holds no label maps", f"Give one of case_00000/{LABEL} or .nii.gz")
    return {case.id: case.image for case in distinct(Case(_label_id(f), f) for f in files)}


def with_origin(case: Case, patients: Mapping[str, str]) -> Case:
    """The case with the patients that it shows: its own, or those that a registered copy was made from."""
    path = case.image.with_name(ORIGIN)
    if case.image.name not in (*_forms(IMAGE), *_forms(LABEL)) or not os.path.lexists(path):
        return replace(case, patients=(patients[case.id],)) if case.id in patients else case
    origin = COPY_ORIGIN.read(path)
    return replace(case, patients=origin.patients, sources=origin.sources)


def _label_in(folder: Path) -> Path | None:
    """The label map in a case's folder; of KiTS21's several, the majority of the annotators."""
    return _found(folder, LABEL) or _found(folder, MAJORITY)


def _label_id(path: Path) -> str:
    if not is_volume_name(path):
        from kitseg.volumes.dicom.labels import case_of_segmentation, is_segmentation

        if is_segmentation(path):
            return case_of_segmentation(path)
    return clean_name(path.absolute().parent.name) if path.name in (*_forms(LABEL), MAJORITY) else stem(path)


def _is_missing(path: Path) -> bool:
    """Whether there is nothing of that name; what lies behind a folder that may not be read isn't missing."""
    try:
        os.lstat(path)
    except OSError as error:
        return isinstance(error, FileNotFoundError | NotADirectoryError)
    return False


def _forms(name: str) -> tuple[str, str]:
    """The names of a file of the KiTS layout, zipped and not."""
    return name, name.removesuffix(".gz")


def _found(folder: Path, name: str) -> Path | None:
    """A file of the KiTS layout in a folder; None where it is missing."""
    return next((folder / form for form in _forms(name) if os.path.lexists(folder / form)), None)


def _no_scans(folder: Path) -> tuple[str, str]:
    """The problem of a folder without scans, and the remedy."""
    from kitseg.volumes.dicom.series import holds_dicom

    if inside := sorted(found.name for found in folders_in(folder) if holds_scans(found)):
        remedy = f"Give a subfolder ({shorten(inside)}); one of label maps goes to --masks, where a command has it"
        return "the folder holds no scans", remedy
    if archive := next((path.name for path in visible(folder) if path.suffix.lower() in _ARCHIVES), ""):
        return f"the folder holds no scans, but the archive {printable(archive)}", "Unpack it, and give that folder"
    if holds_dicom(folder):
        return "the folder holds DICOM files", "Only `kitseg predict` reads them. Convert them to NIfTI for the rest"
    return "the folder holds no scans", _EXPECTED


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
