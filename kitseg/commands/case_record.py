"""The record beside a case's label map, ``<case>.json``: what the labels were made from, and what was found."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from kitseg.errors import InputError, KitsegError, UsageError
from kitseg.labels import KITS23, Scheme, data_set_places, predictions_scheme
from kitseg.measurement.flags import Quality
from kitseg.runtime.files import file_digest
from kitseg.runtime.overwrite import OVERWRITE, refuse_overwrite
from kitseg.runtime.provenance import FileFormat
from kitseg.types import Case, Volume
from kitseg.volumes.kits import folder_of, scan_id
from kitseg.volumes.names import BUNDLE, UNCERTAINTY, is_file_name, is_volume_name
from kitseg.volumes.nifti import CORRECTED_MARK, mark_of
from kitseg.volumes.scan import hu_digest, scan_digest


class ClickRow(TypedDict):
    """A click of a person, as ``refine.Click`` writes it."""

    x: float
    y: float
    z: float
    label: Literal["background", "kidney", "tumor", "cyst"]
    to: NotRequired[tuple[float, float, float]]


@dataclass(frozen=True)
class CaseRecord:
    """What kitseg reads of a record.

    files: hashes of the case's files by name; labels_sha256: of the label map among them; scan, scan_sha256,
    hu_sha256: the scan's name, and the hashes of its files and of its HU; recipe, block_sha256: hashes of the
    settings and of the probabilities, where labels depend on them; models, versions: what predicted; learned_from:
    those of the models that learned from the scan, None where unknown; volumes_ml, note, quality, signs: what was
    found; labels: the scheme of the label map, None in records of kitseg 0.1; corrected: the clicks of a person.
    """

    case: str = ""
    files: dict[str, str] = field(default_factory=dict)
    labels_sha256: str | None = None
    scan: str | None = None
    scan_sha256: str | None = None
    hu_sha256: str | None = None
    recipe: str | None = None
    block_sha256: str | None = None
    models: tuple[dict[str, Any], ...] = ()
    learned_from: tuple[str, ...] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    volumes_ml: dict[str, float] | None = None
    note: str = ""
    quality: Quality | None = None
    signs: dict[str, float] = field(default_factory=dict)
    labels: Scheme | None = None
    corrected: tuple[ClickRow, ...] = ()

    def is_of(self, digest: str) -> bool:
        """Whether a label map with this hash is as kitseg wrote it, as far as the record states."""
        return self.labels_sha256 is None or digest in (self.labels_sha256, *self.files.values())


CASE_RECORD = FileFormat(CaseRecord, 4)
ANY_RECORD = FileFormat(CaseRecord, None)  # also of another version
_KINDS = {".nii.gz": "nifti", UNCERTAINTY: "nifti", ".png": "png", ".mha": "mha", ".seg.nrrd": "nrrd"}
_KINDS |= dict.fromkeys((".dcm", ".sr.dcm", ".pdf.dcm"), "dicom")


def write_record(path: Path, facts: Mapping[str, Any], made: Mapping[str, str], files: Sequence[Path]) -> None:
    """Write a case's record, after its files, whose hashes it holds.

    made: the hashes of what the labels were made from, by the names of ``CaseRecord``.
    """
    digests = {file.name: file_digest(file) for file in files}
    CASE_RECORD.write(path, {**facts, **made, "labels_sha256": digests[files[0].name], "files": digests})


def read_record(path: Path, made: Mapping[str, str]) -> CaseRecord | None:
    """A case's record, if its files are current (see ``FileFormat.find``); else None."""
    return CASE_RECORD.find(path, made, lambda record: {path.with_name(name): d for name, d in record.files.items()})


def quality_facts(quality: Quality, agreement: Mapping[str, float] | None = None) -> dict[str, Any]:
    """What a record states about a case's quality; agreement: Dice of an ensemble's members by class."""
    return {"level": quality.level, **asdict(quality), "agreement": agreement}


def record_of(labels: Path) -> Path:
    """The record beside a label map; label maps of other tools have none."""
    name = labels.name
    for ending in (".gz", ".nii", ".dcm", ".mha", ".mhd", ".seg.nrrd", ".nrrd"):
        name = name.removesuffix(ending)
    return labels.with_name(f"{name}.json")


def record_beside(labels: Path) -> CaseRecord | None:
    """The record beside a label map, of any version; None where there is none that can be read."""
    try:
        return ANY_RECORD.read(record_of(labels))
    except InputError:
        return None


def is_of_another_scan(labels: Path, case: Case, scan: Volume) -> bool:
    """Whether the record of a label map, or else a DICOM segmentation itself, states another scan than this one.

    The record's scan in another file format is the same scan; the record counts, too, where the labels were changed.
    """
    record = record_beside(labels)
    if record and record.scan_sha256:
        return record.scan_sha256 != scan_digest(case) and record.hu_sha256 != hu_digest(scan)
    if is_volume_name(labels) or not case.slices:
        return False
    from kitseg.volumes.dicom.labels import is_of_another_series

    return is_of_another_series(labels, case.slices[0])


def recorded_learning(labels: Path) -> tuple[str, ...]:
    """The models that learned from the scan of a label map, by the record beside it."""
    record = record_beside(labels)
    return (record.learned_from or ()) if record else ()


def recorded_models(labels: Path) -> tuple[str, ...]:
    """The names of the runs or bundles that a label map was predicted with, by the record beside it."""
    record = record_beside(labels)
    return model_names(str(model.get("path", "")) for model in record.models) if record else ()


def is_predicted(labels: Path) -> bool:
    """Whether networks made a label map and nobody changed it since, by the record beside it."""
    record = record_beside(labels)
    return bool(record and record.models and not record.corrected and record.is_of(file_digest(labels)))


def model_names(paths: Iterable[str]) -> tuple[str, ...]:
    """The names of runs and bundles, sorted; a bundle that has its run's name is that run."""
    return tuple(sorted({Path(path).name.removesuffix(BUNDLE) for path in paths}))


def of_other_models(labels: Path, known: Sequence[str]) -> str:
    """A line where a label map is of other models than those, by name, whose errors are known; else empty."""
    here = recorded_models(labels)
    if not (here and known) or here == model_names(known):
        return ""
    return f"the intervals are of the errors of {' and '.join(known)}, the labels are of {' and '.join(here)}"


def correction_beside(labels: Path) -> str:
    """How a label map was changed since a network made it, by its record and its header; empty where neither states it.

    Raises InputError: it can't be read.
    """
    record = record_beside(labels)
    if record and record.corrected:
        return record.note
    if is_volume_name(labels) and mark_of(labels) == CORRECTED_MARK:
        return "corrected by a person"
    return "changed since its record was written" if record and not record.is_of(file_digest(labels)) else ""


def scheme_beside(labels: Path) -> Scheme | None:
    """The scheme of a label map by the record beside it, or without one by nnU-Net's ``dataset.json``; None by neither.

    Of DICOM segmentations KiTS23's.
    """
    if (record := record_beside(labels)) and record.labels:
        return record.labels
    return predictions_scheme(labels) if is_volume_name(labels) else KITS23


def stated_beside(labels: Path) -> list[Path]:
    """The files that ``scheme_beside`` reads, where they are there."""
    return [record_of(labels), *data_set_places(labels)]


def refuse_other_labels(prediction: Path, reference: Path, assumed: Scheme) -> None:
    """Refuse a reference of a scheme that nobody has stated where an id is another class by ``scheme_beside``.

    A DICOM segmentation states its classes itself.

    Raises:
        UsageError: it is.
    """
    own = scheme_beside(prediction) if is_volume_name(prediction) and is_volume_name(reference) else None
    if own and own.contradicts(assumed):
        raise UsageError(
            f"{prediction} has the labels {own}, and its reference {reference} would be read as {assumed}. State those "
            f"of the references with --labels {own.line}, or --labels {assumed.line}"
        )


def describe_learning(models: Sequence[str] | None) -> str:
    """A note where networks learned from the scan that they predicted."""
    return f"its networks learned from this scan ({'; '.join(models)})" if models else ""


def refuse_scan_overwrite(scan: Path, target: Path) -> None:
    """Never write over the scan itself, nor a label map that would be a second scan of its name in its folder."""
    real = os.path.realpath  # unlike Path.resolve, accepts links in a circle
    if real(target) == real(scan):
        raise UsageError(f"{target} is the scan itself; choose another folder with --output")
    if scan.is_file() and scan_id(target) == scan_id(scan) and real(target.parent) == real(folder_of(scan)):
        both = f"{scan} and its labels {target} would both be called {scan_id(scan)}"
        raise UsageError(f"{both}; choose another folder with --output")


def refuse_case_overwrite(path: Path, endings: Sequence[str]) -> None:
    """Refuse (UsageError) to replace files beside a record that kitseg didn't write, or labels corrected since."""
    refuse_overwrite(path, "case")
    record, labels, is_marked = CaseRecord(), path.with_suffix(".nii.gz"), False
    with suppress(KitsegError):
        record = ANY_RECORD.read(path)
    with suppress(KitsegError):  # a label map that lost its record
        is_marked = ".nii.gz" in endings and os.path.exists(labels) and mark_of(labels) == CORRECTED_MARK
    if (record.corrected or is_marked) and OVERWRITE not in os.environ:
        raise UsageError(
            f"{path.stem} was corrected by a person. Choose another output, or replace it with --overwrite"
        )
    known = record.files
    for ending in endings:
        file = path.with_suffix(ending)
        if os.path.exists(file) and known.get(file.name) != file_digest(file):
            refuse_overwrite(file, _KINDS[ending])
            if file.name in known and _is_whole(file) and OVERWRITE not in os.environ:
                problem = "was changed since kitseg wrote it"
                raise UsageError(f"{file} {problem}. Choose another output, or replace it with --overwrite")


def _is_whole(file: Path) -> bool:
    """Whether a compressed file is undamaged; what is damaged may be written again."""
    with suppress(OSError, EOFError, zlib.error):
        return file.suffix == ".gz" and bool(gzip.decompress(file.read_bytes()))
    return False


def file_ending(output: Path, count: int, endings: Sequence[str] = (".nii.gz",)) -> str:
    """The ending of ``output`` where it names the label map of a single case; empty where it names a folder.

    Raises UsageError: a file's name for several cases, or with another ending than these.
    """
    if not is_file_name(output):
        return ""
    found = next((ending for ending in endings if output.name.endswith(ending) and output.name != ending), "")
    if count != 1 or not found:
        remedy = f"a folder, or for one scan a file that ends with {' or '.join(endings)} (scans here: {count})"
        raise UsageError(f"--output {output}: give {remedy}")
    return found


def remove_stale(page: Path) -> None:
    """Remove the page of an earlier call where the case now fails, so that it isn't taken for today's."""
    with suppress(OSError):
        page.unlink(missing_ok=True)


def forget(path: Path, files: Sequence[Path]) -> None:
    """Remove a case's record before its files are written again, and those of its files that won't be."""
    with suppress(InputError):
        for name in CASE_RECORD.read(path).files:
            if name.startswith(f"{path.stem}.") and path.with_name(name) not in files:
                path.with_name(name).unlink(missing_ok=True)
    path.unlink(missing_ok=True)
