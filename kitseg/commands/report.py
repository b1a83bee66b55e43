"""HTML pages of label maps: one for each case, and one of all cases."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kitseg import __version__
from kitseg.commands.case_record import (
    ANY_RECORD,
    CaseRecord,
    correction_beside,
    of_other_models,
    record_of,
    refuse_other_labels,
    remove_stale,
    scheme_beside,
)
from kitseg.commands.measure import LabelTask
from kitseg.errors import InputError, KitsegError, UsageError
from kitseg.labels import KITS23, Scheme, to_kits19
from kitseg.measurement.intervals import Calibration
from kitseg.measurement.measure import measure
from kitseg.measurement.quality import BY_FRAME, assess
from kitseg.measurement.renal_function import Patient, after_surgery
from kitseg.report import as_sentence
from kitseg.report.case_page import CaseContent, write_case_page
from kitseg.report.html import INDEX, page_name
from kitseg.report.scores import ScoreTable, StudyScores
from kitseg.report.slices import Scene
from kitseg.report.study_page import CaseRow, thumbnail, write_study
from kitseg.runtime.files import file_digest
from kitseg.runtime.overwrite import refuse_overwrite
from kitseg.types import Geometry, Volume
from kitseg.volumes.check import refuse_scans
from kitseg.volumes.kits import find_labels
from kitseg.volumes.names import pair, shorten
from kitseg.volumes.nifti import read_labels
from kitseg.volumes.references import labels_digest, read_reference
from kitseg.volumes.scan import TOLERANCE, check_grid, scan_digest, scans_of_labels


@dataclass(frozen=True)
class PageTask(LabelTask):
    """A case for a page, with its scores; to: the folder; scheme: of the label map.

    truth: the scheme of the reference; scored_with: the hash of the reference that the scores are of, if known;
    intervals: of the figures; patient: what predicts the function after surgery.
    """

    scores: ScoreTable
    to: Path
    scheme: Scheme
    truth: Scheme = KITS23
    scored_with: str | None = None
    intervals: Calibration | None = None
    patient: Patient | None = None

    @property
    def record(self) -> Path:
        """The record of ``kitseg predict`` beside the labels; other tools write none."""
        return record_of(self.labels)

    @property
    def output(self) -> Path:
        """The page."""
        return self.to / page_name(self.case)


def plan_pages(
    predictions: Path,
    data: Sequence[Path],
    scores: StudyScores,
    to: Path,
    masks: Path | None = None,
    stated: Scheme | None = None,
) -> list[PageTask]:
    """The cases that there are label maps of, each with its scan; masks: the folder of the references.

    stated: the scheme of the references, and of predictions where ``scheme_beside`` finds none; None: KiTS23's.

    Raises InputError: a path is missing or holds nothing of the kind; UsageError: two files of one name, scans of none
    of the cases, scores of other label maps, references whose scheme nobody has stated and the predictions contradict,
    or files that kitseg did not write in the way.
    """
    labels = find_labels(predictions)
    refuse_scans(predictions, labels)
    scans, scored = scans_of_labels(labels, data, masks), pair(labels, scores.cases)
    if data and not scans:
        raise UsageError(f"{', '.join(map(str, data))} holds no scan of {', '.join(sorted(labels)[:3])}")
    if scores.cases and not scored:
        raise UsageError(f"the scores are of other cases ({', '.join(sorted(scores.cases)[:3])}) than {predictions}")
    usual = stated or KITS23
    if changed := [case for case, other in scored.items() if _is_changed(labels[case], other, scores, usual)]:
        problem = f"the scores are of other label maps of {shorten(changed)} than those in {predictions}"
        raise UsageError(f"{problem}. Make them again with `kitseg evaluate`")
    for name in (INDEX, *map(page_name, labels)):
        refuse_overwrite(to / name, "html")
    tasks = []
    for case, path in sorted(labels.items()):
        other = scored.get(case, "")
        figures, scored_with = scores.cases.get(other, {}), scores.references.get(other)
        scheme, scan = scheme_beside(path) or usual, scans.get(case)
        if stated is None and scan and scan.label:
            refuse_other_labels(path, scan.label, usual)
        tasks.append(PageTask(case, path.absolute(), scan, figures, to.absolute(), scheme, usual, scored_with))
    return tasks


def _is_changed(labels: Path, case: str, scores: StudyScores, usual: Scheme) -> bool:
    """Whether a label map is another one than that which was scored; one that can't be read is reported later.

    It may be in another file that shows the same.
    """
    scored, shown = scores.predictions.get(case), scores.shown.get(case)
    with suppress(InputError):
        if scored is None or file_digest(labels) == scored:
            return False
        found = read_labels(labels, case, scheme_beside(labels) or usual, strict=False)
        return shown is None or not shown.is_of(found, TOLERANCE)
    return False


def write_index(to: Path, rows: Sequence[CaseRow], scores: StudyScores, scheme: Scheme) -> None:
    """Write the study's page, ``index.html``; a row a case; scheme: names and colours."""
    facts = {"Cases": str(len(rows)), **_page_facts()}
    scored = pair([row.case for row in rows], scores.strata)
    scores = replace(scores, strata={case: scores.strata[other] for case, other in scored.items()})
    write_study(to / INDEX, "Kidneys and kidney tumors", rows, scores, facts, scheme)


def make_page(task: PageTask) -> CaseRow:
    """Write a case's page; its row of the study."""
    try:
        return write_page(task)
    except Exception as error:  # the other cases continue, whatever the error
        remove_stale(task.output)
        return CaseRow(task.case, error=task.format_error(error), scores=task.scores)


def write_page(task: PageTask) -> CaseRow:
    """Write a case's page; its row of the study. Raises KitsegError: a file can't be used or written."""
    labels, scan = task.read(task.scheme)
    reference = _reference(task, labels)
    scene = Scene(labels.array, labels.geometry, scan.array if scan else None, reference, task.scheme)
    findings = measure(scene.labels, scene.geometry, scene.hu)
    digest, scan_hash = file_digest(task.labels), scan_digest(task.scan) if task.scan else None
    record, notes = _record(task, digest)
    notes += [as_sentence(doubt) for doubt in task.doubts(labels, scan) if doubt not in record.note]
    quality = record.quality if record.is_of(digest) else None
    if quality and scan is None and len(findings.whole_kidneys) == 1:  # the record's flags are of a scan
        notes.append(BY_FRAME)
    quality = quality or assess(scene.labels, scene.hu, scene.geometry, findings, None, None)
    facts = _facts(task, scene.geometry, record, digest, scan_hash)
    changed = correction_beside(task.labels)
    if changed and not (record.corrected or record.labels_sha256):  # its header alone states it
        notes.append(as_sentence(changed))
    by_model = None if changed else task.intervals  # they are of a model's errors, not of a person's
    if by_model and (other := of_other_models(task.labels, by_model.models)):
        notes.append(as_sentence(other))
    intervals = by_model.of_all(findings, scene.geometry.spacing[0]) if by_model else ()
    after = after_surgery(findings, task.patient, scene.labels, scene.geometry) if task.patient else None
    content = CaseContent(
        task.case, scene, findings, quality, task.scores, facts, notes, intervals, task.patient, after
    )
    write_case_page(task.output, content)
    return CaseRow(task.case, "", quality, findings, thumbnail(scene, findings), task.scores)


def _reference(task: PageTask, labels: Volume) -> NDArray[np.uint8] | None:
    """The case's reference label map, unless it is the same file as the labels; without cysts, if these have none.

    Raises InputError: it can't be used, or is another one than that of the scores.
    """
    path = task.scan.label if task.scan else None
    if path is None or os.path.realpath(path) == os.path.realpath(task.labels):
        return None
    truth = read_reference(path, task.case, task.truth)
    check_grid(path, truth.geometry, labels.geometry, "the prediction")
    if task.scored_with and task.scored_with != labels_digest(truth):
        remedy = "Make them again with `kitseg evaluate`, or state the same --labels here."
        raise InputError(path, "the scores are of another reference, or of other labels in it", remedy)
    return truth.array if task.scheme.cyst else to_kits19(truth.array)


def _record(task: PageTask, digest: str) -> tuple[CaseRecord, list[str]]:
    """The record beside a label map, an empty one where there is none, and notes for the page."""
    if not os.path.exists(task.record):  # also where the name is too long
        return CaseRecord(), ["The labels came without a file that states how they were made."]
    try:
        record = ANY_RECORD.read(task.record)
    except KitsegError:
        return CaseRecord(), [f"{task.record.name} beside the labels can't be used: it isn't known how they were made."]
    notes = [as_sentence(record.note)] if record.note else []
    if not record.is_of(digest):
        notes.append("The labels were changed since they were predicted; the flags describe the changed labels.")
    return record, notes


def _facts(task: PageTask, geometry: Geometry, record: CaseRecord, digest: str, scan: str | None) -> dict[str, str]:
    """How the labels were made, by name; scan: the hash of the one on the page."""
    facts = {}
    if task.scan:
        facts["Scan"] = f"{task.scan.id if task.scan.slices else task.scan.image.name}\nsha256 {scan}"
    if record.scan_sha256 not in (None, scan):
        facts["Scan of the labels"] = f"{record.scan or ''}\nsha256 {record.scan_sha256}"
    depth, height, width = geometry.shape
    down, along, across = geometry.spacing
    facts["Grid"] = f"{width} × {height} × {depth} voxels of {across:.3g} × {along:.3g} × {down:.3g} mm"
    facts["Labels"] = f"{task.case if task.is_dicom else task.labels.name}, {task.scheme}\nsha256 {digest}"
    for number, model in enumerate(record.models, 1):
        facts[f"Model {number}"] = _model(model)
    if record.versions:
        facts["Predicted with"] = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    return {**facts, **_page_facts()}


def _model(model: Mapping[str, Any]) -> str:
    """A model's name, folds, weight, configuration and version."""
    parts = [Path(model["path"]).name]
    if model.get("folds"):
        parts.append(f"folds {', '.join(map(str, model['folds']))}")
    parts += [str(model["engine"])] if model.get("engine") else []
    parts += ["mirrored too"] if model.get("mirror") else []
    parts += [f"weight {model['weight']:g}"] if "weight" in model else []
    parts += [f"trained with kitseg {model['trained_with']}"] if model.get("trained_with") else []
    learned = model.get("trained_on") or ("phantoms, not on patients" if model.get("phantom") else "")
    parts += [f"trained on {learned}"] if learned else []
    return f"{', '.join(parts)}\nsha256 of configuration and weights {model['sha256']}"


def _page_facts() -> dict[str, str]:
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {"Page made": f"{now} with kitseg {__version__}"}
