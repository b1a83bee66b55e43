"""Measure label maps, and write their surfaces as STL files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from kitseg.commands.case_record import (
    correction_beside,
    is_of_another_scan,
    of_other_models,
    record_beside,
    scheme_beside,
    stated_beside,
)
from kitseg.errors import InputError, UsageError
from kitseg.labels import CYST, KIDNEY, KITS19, TUMOR, Scheme
from kitseg.measurement import quality
from kitseg.measurement.findings import Findings, Kidney, Lesion
from kitseg.measurement.intervals import Calibration
from kitseg.measurement.measure import measure
from kitseg.measurement.mesh import stl, surface, volume
from kitseg.measurement.nephrometry import Nephrometry, nephrometry
from kitseg.measurement.renal_function import AfterSurgery, Patient, after_surgery
from kitseg.runtime import files
from kitseg.runtime.outcomes import without_paths
from kitseg.runtime.overwrite import refuse_overwrite
from kitseg.runtime.resume import Task
from kitseg.types import Case, Volume
from kitseg.volumes.check import NOT_HU, looks_like_hu, refuse_scans
from kitseg.volumes.kits import find_labels
from kitseg.volumes.names import is_volume_name
from kitseg.volumes.nifti import read_labels
from kitseg.volumes.scan import check_grid, place_doubts, place_on, read_scan, scans_of_labels

SCHEMA = 1
DECIMALS = 3
NO_RECORD = "no record states what made these labels: the intervals are of the calibrated network's errors"
OTHER_SCAN = "the labels were made from another scan than this one, by the record beside them or their own header"
NO_SLICES = "a DICOM segmentation ends with its labels: it takes the scan to know whether they are cut off there"
#: The parts that a mesh can show, by their label ids.
PARTS = {"kidney": (KIDNEY, TUMOR, CYST), "parenchyma": (KIDNEY,), "tumor": (TUMOR,), "cyst": (CYST,)}


@dataclass(frozen=True)
class LabelTask(Task):
    """A label map to work on, with its CT where there is one."""

    labels: Path
    scan: Case | None

    @property
    def is_dicom(self) -> bool:
        """Whether one of both is DICOM, whose files' names may name the patient."""
        return not is_volume_name(self.labels) or bool(self.scan and self.scan.slices)

    @property
    def files(self) -> tuple[Path, ...]:
        """Label map, what states how it is read and what made it, and CT."""
        return (self.labels, *stated_beside(self.labels), *(self.scan.files if self.scan else ()))

    def read(self, scheme: Scheme) -> tuple[Volume, Volume | None]:
        """The label map, and the CT on the same grid.

        Raises InputError: one can't be used, or they lie on different grids.
        """
        labels = read_labels(self.labels, self.case, scheme)
        scan = read_scan(self.scan) if self.scan else None
        if scan:
            labels = labels if is_volume_name(self.labels) else place_on(labels, scan)
            check_grid(self.labels, labels.geometry, scan.geometry)
        return labels, scan

    def doubts(self, labels: Volume, scan: Volume | None) -> tuple[str, ...]:
        """What its files leave open: whether the labels are of this scan, its HU, how it was built, place and end."""
        is_other = scan is not None and self.scan is not None and is_of_another_scan(self.labels, self.scan, scan)
        ends = scan is None and not is_volume_name(self.labels)
        unlike = scan is not None and not looks_like_hu(scan.array)
        known = [OTHER_SCAN * is_other, NO_SLICES * ends, NOT_HU * unlike, self.scan.note if self.scan else ""]
        return (*filter(None, known), *place_doubts(labels, scan))

    def format_error(self, error: Exception) -> str:
        """An error's text for a file that others may read."""
        paths = [self.labels, *([self.scan.image] if self.scan else []), *([self.output] if self.output else [])]
        return without_paths(self.case, error, paths, self.is_dicom)


@dataclass(frozen=True)
class MeasureTask(LabelTask):
    """A label map to measure; patient: what predicts the function after surgery."""

    patient: Patient | None = None


@dataclass(frozen=True)
class Measured:
    """A case's findings, function after surgery and nephrometry, or its ``error``.

    labels: the ids of its label map; intervals: with a calibration, those of the kidneys and then of the lesions
    (``Calibration.of``); origin: how it was changed since a network made it (``correction_beside``); doubts: about its
    scan, its place in the patient, on which the sides depend, and what was labelled.
    """

    case: str
    findings: Findings = field(default_factory=lambda: Findings((), ()))
    error: str = ""
    after_surgery: AfterSurgery | None = None
    labels: str = ""
    nephrometry: Nephrometry | None = None
    intervals: tuple[dict[str, tuple[float, float] | None], ...] = ()
    origin: str = ""
    doubts: tuple[str, ...] = ()

    @property
    def parts(self) -> Iterator[tuple[Kidney | Lesion, Mapping[str, tuple[float, float] | None]]]:
        """The kidneys and lesions, each with its intervals by the names of its figures."""
        known = self.intervals or ({},) * (len(self.findings.kidneys) + len(self.findings.lesions))
        return zip((*self.findings.kidneys, *self.findings.lesions), known, strict=True)

    @property
    def remarks(self) -> tuple[str, ...]:
        """How it was changed, and the doubts."""
        return (*filter(None, [self.origin]), *self.doubts)

    @property
    def note(self) -> str:
        """Why there is nothing to list; empty where there is something."""
        empty = not (self.findings.kidneys or self.findings.lesions)
        return self.error or ("nothing found" if empty else "")


def plan_measures(labels: Path, ct: Path | None) -> list[MeasureTask]:
    """A label map, or those in a folder, each with the scan of the same name.

    With a file for the label map and one scan, which may be the CT of a DICOM study, names don't matter unless a series
    has the label map's. Raises InputError: a path is missing or holds nothing of the kind; UsageError: two files of one
    name, or no scan of a case.
    """
    maps = find_labels(labels)
    refuse_scans(labels, maps)
    scans = scans_of_labels(maps, [ct] if ct else [], alone=labels.is_file())
    if ct and (missing := sorted(maps.keys() - scans.keys())):
        raise UsageError(f"{ct} has no scan of {', '.join(missing[:5])}. Add it, or measure without --ct")
    return [MeasureTask(case, path.absolute(), scans.get(case)) for case, path in maps.items()]


def measure_case(
    task: MeasureTask, scheme: Scheme | None, scores: bool = False, calibration: Calibration | None = None
) -> Measured:
    """Measure a case, with nephrometry ``scores`` and intervals; never raises for a file that can't be used.

    scheme: of the label map; None: see ``scheme_beside``, else KiTS19's.
    """
    try:
        own = scheme or scheme_beside(task.labels) or KITS19
        labels, scan = task.read(own)
        origin = correction_beside(task.labels)
        hu = scan.array if scan else None
        findings = measure(labels.array, labels.geometry, hu)
        after = after_surgery(findings, task.patient, labels.array, labels.geometry) if task.patient else None
        found = nephrometry(labels.array, labels.geometry, findings, hu) if scores else None
        # they are of a model's errors, not of a person's
        intervals = calibration.of_all(findings, labels.geometry.spacing[0]) if calibration and not origin else ()
        unknown = [NO_RECORD] if intervals and record_beside(task.labels) is None else []
        if calibration and intervals and (other := of_other_models(task.labels, calibration.models)):
            unknown.append(other)
        shapes = quality.doubts(labels.array, labels.geometry, findings, hu)
        doubts = (*task.doubts(labels, scan), *shapes, *unknown)
        return Measured(task.case, findings, "", after, own.line, found, intervals, origin, doubts)
    except Exception as error:  # the other cases continue, whatever the error
        return Measured(task.case, error=task.format_error(error))


def write_findings(path: Path, results: Sequence[Measured]) -> None:
    """Write the findings of every case as JSON, rounded to 0.001."""
    cases = {result.case: _rounded(_content(result)) for result in results if not result.error}
    failed = {result.case: result.error for result in results if result.error}
    labels = "; ".join(sorted({result.labels for result in results if result.labels}))
    files.write_json(path, SCHEMA, {"labels": labels, "cases": cases, "failed": failed})


def write_lesion_table(path: Path, results: Sequence[Measured]) -> None:
    """Write a CSV row for each kidney and each lesion of every case; ``kind`` is kidney, tumor or cyst.

    A case without any has a row with a note: nothing found, or the error. How a case was changed and doubts about it
    are a note in each of its rows.
    """
    kept = [entry.name for kind in (Lesion, Kidney) for entry in fields(kind) if entry.name not in ("box", "centre")]
    rows = [row for result in results for row in _rows(result)]
    ends = [name for row in rows for name in row if name.endswith(("_low", "_high"))]
    columns = list(dict.fromkeys(["case", "kind", "side", *kept, *ends, "note"]))
    files.write_table(path, columns, ({key: row[key] for key in columns if key in row} for row in rows))


def write_mesh(labels: Path, to: Path, part: str, stated: Scheme | None) -> tuple[int, float]:
    """Write the surface of a part of a label map (``PARTS``) as STL, in mm, in the patient's space (RAS+).

    Returns:
        The number of triangles, and the volume in them in ml.

    Raises:
        InputError: the label map can't be read or doesn't hold that part.
        UsageError: there is no such part, or the output's name doesn't end in .stl.
    """
    if part not in PARTS:
        raise UsageError(f"unknown part '{part}'. Choose from {', '.join(PARTS)}")
    if to.suffix.lower() != ".stl":
        raise UsageError(f"{to}: the mesh must be an .stl file. Change --output")
    refuse_overwrite(to, "stl")
    scheme = stated or scheme_beside(labels) or KITS19
    segmentation = read_labels(labels, labels.name, scheme)
    mask = np.isin(segmentation.array, PARTS[part])
    if not mask.any():
        what = f"no {part} (the labels are {scheme})" if segmentation.array.any() else "only background"
        raise InputError(labels, f"contains {what}", "There is nothing to make a mesh of")
    vertices, faces = surface(mask, segmentation.geometry)
    with files.atomic_write(to) as partial:
        partial.write_bytes(stl(vertices, faces))
    return len(faces), volume(vertices, faces) / 1000


def _rows(result: Measured) -> Iterator[dict[str, Any]]:
    doubts = "; ".join(result.remarks)
    if result.note:
        yield {"case": result.case, "note": "; ".join(filter(None, [result.note, doubts]))}
    for part, intervals in result.parts:
        ends = {name: known or (None, None) for name, known in intervals.items()}
        low, high = ({f"{name}_{end}": pair[n] for name, pair in ends.items()} for n, end in enumerate(("low", "high")))
        yield {"case": result.case, "kind": "kidney", **_rounded({**asdict(part), **low, **high}), "note": doubts}


def _content(result: Measured) -> dict[str, Any]:
    content = asdict(result.findings)
    for part, intervals in zip((*content["kidneys"], *content["lesions"]), result.intervals, strict=False):
        part["intervals"] = intervals
    known = {name: value for name in ("origin", "doubts") if (value := getattr(result, name))}
    if result.after_surgery:
        content["after_surgery"] = asdict(result.after_surgery)
    if found := result.nephrometry:
        content["nephrometry"] = asdict(found)
        for name, score in (("renal", found.renal), ("padua", found.padua)):
            content["nephrometry"][name]["score"] = str(score)
    return {**known, **content}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, DECIMALS)
    if isinstance(value, Mapping):
        return {name: _rounded(part) for name, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list | tuple) else value
