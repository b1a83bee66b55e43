"""Follow-up of patients: label maps of two dates compared lesion by lesion, as tables and pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from kitseg.commands.case_record import correction_beside, recorded_models, remove_stale, scheme_beside
from kitseg.commands.measure import DECIMALS, LabelTask, plan_measures
from kitseg.errors import UsageError
from kitseg.labels import KITS19, Scheme
from kitseg.measurement import quality
from kitseg.measurement.followup import DAYS_A_YEAR, Change, Visit, followup
from kitseg.measurement.measure import measure
from kitseg.report import as_sentence
from kitseg.report.followup_page import FollowupContent, write_followup_page
from kitseg.report.html import page_name
from kitseg.runtime import files
from kitseg.runtime.overwrite import refuse_overwrite
from kitseg.runtime.resume import Task
from kitseg.types import Case
from kitseg.volumes.kits import LABEL, case_of
from kitseg.volumes.names import pair
from kitseg.volumes.scan import patient_of, scan_date

SCHEMA = 1
ONE_WITHOUT_CYSTS = "the label maps of one date have no cysts, which are kidney there: cysts may be new or vanished"
ONE_WITHOUT_KIDNEY = "one date shows no {} kidney: its lesions were not looked for there"
OTHER_PATIENT = "the DICOM files state different patient IDs: they may be of two patients"
OTHER_DATES = "the scans state other dates than --dates: {} and {}"
FAR_APART = "the {} kidney's surfaces are {:.1f} mm apart after alignment: another patient, outline, or a poor fit"
FAR_APART_MM = 2.0  # 46 of 47 kidneys of KiTS19, turned and resampled: up to 1.7; nine of ten of other patients: more
OTHER_MAKERS = "the labels are of {} at the first date, of {} at the second: outlines may differ without growth"
JOINED = "lesions that are apart at one date are one lesion at the other, whose change is that of all of them"
SAME_DATE = "both scans state the date {}: there is no change a year"
Dates = tuple[date, date]


@dataclass(frozen=True)
class FollowupTask(Task):
    """The label maps of a patient's two dates; dates: None where unknown; page: the HTML file to write."""

    before: LabelTask
    after: LabelTask
    dates: Dates | None
    page: Path


@dataclass(frozen=True)
class Followed:
    """A patient's lesions, a row each (``row_of``), or the ``error``.

    residual_mm: of the alignment of each kidney; doubts: about the place in the patient, on which the sides depend,
    about whether both are of one patient, about the alignment, about cysts and lesions that merged, about what made
    the labels, and about what the scans don't show.
    """

    case: str
    error: str = ""
    rows: tuple[dict[str, Any], ...] = ()
    dates: Dates | None = None
    residual_mm: Mapping[str, float] = field(default_factory=dict)
    doubts: tuple[str, ...] = ()


def plan_followups(
    before: Path, after: Path, ct: tuple[Path, Path] | None, dates: Dates | None, to: Path
) -> tuple[list[FollowupTask], list[str]]:
    """The patients of two label maps, or of two folders of them, by name; and the names that only one folder has.

    The scan is that of ``ct``, or ``imaging.nii.gz`` beside a KiTS case's label map.

    Raises:
        InputError: a path is missing or holds no label map.
        UsageError: no name is in both folders, a scan is missing, or the dates can't be used.
    """
    if dates and dates[0] >= dates[1]:
        raise UsageError(f"--dates: {dates[0]} isn't before {dates[1]}. Give the earlier one first")
    old, new = (plan_measures(path, scans) for path, scans in zip((before, after), ct or (None, None), strict=True))
    here, there = {task.case: task for task in old}, {task.case: task for task in new}
    pairs = pair(here, there) if len(old) > 1 or len(new) > 1 else {old[0].case: new[0].case}
    if not pairs:
        raise UsageError(f"{before} and {after} have no case of the same name. Rename the files of one date")
    if dates and len(pairs) > 1:
        remedy = "Give two files, or DICOM scans with --ct, which state their dates"
        raise UsageError(f"--dates is for one patient, but there are {len(pairs)}. {remedy}")
    tasks = []
    for name, other in pairs.items():
        page = to.absolute() / page_name(name if name == other else f"{name}-{other}")
        refuse_overwrite(page, "html")
        tasks.append(FollowupTask(name, _with_scan(here[name]), _with_scan(there[other]), dates, page))
    alone = {*(here.keys() - pairs.keys()), *(there.keys() - set(pairs.values()))}
    return tasks, sorted(alone)


def follow(task: FollowupTask, scheme: Scheme | None) -> Followed:
    """Compare a patient's dates and write the page; never raises for a file that can't be used.

    scheme: of both label maps; None: see ``scheme_beside``, else KiTS19's.
    """
    visits, schemes, doubts, current = list[Visit](), list[Scheme](), dict[str, None](), task.before
    try:
        doubts |= dict.fromkeys(_other_patient(task))
        dates, odd = _dates(task)
        doubts |= dict.fromkeys(odd)
        for current in (task.before, task.after):
            schemes.append(scheme or scheme_beside(current.labels) or KITS19)
            labels, scan = current.read(schemes[-1])
            hu = scan.array if scan else None
            findings = measure(labels.array, labels.geometry, hu)
            name = "second" if visits else "first"
            shapes = quality.doubts(labels.array, labels.geometry, findings, hu)
            doubts |= dict.fromkeys(f"{name} date: {doubt}" for doubt in (*current.doubts(labels, scan), *shapes))
            visits.append(Visit(labels.array, labels.geometry, findings, hu))
        if len({own.cyst is None for own in schemes}) > 1:
            doubts[ONE_WITHOUT_CYSTS] = None
        makers = [_maker(part.labels) for part in (task.before, task.after)]
        doubts |= dict.fromkeys([OTHER_MAKERS.format(*makers)] if makers[0] != makers[1] else [])
        days = (dates[1] - dates[0]).days if dates else None
        found = followup(*visits)
        rows = tuple(row_of(change, days) for change in found.changes)
        residuals = {side: round(own.residual_mm, DECIMALS) for side, own in found.alignments.items()}
        far = {side: mm for side, mm in residuals.items() if mm > FAR_APART_MM}
        doubts |= dict.fromkeys(FAR_APART.format(side, mm) for side, mm in far.items())
        doubts |= dict.fromkeys(ONE_WITHOUT_KIDNEY.format(side) for side in found.not_aligned)
        doubts |= dict.fromkeys([JOINED] if found.joined else [])
        names = tuple(map(str, dates)) if dates else ("First date", "Second date")
        shown = max(schemes, key=lambda own: own.cyst is not None)
        notes = [as_sentence(doubt) for doubt in doubts]
        ends = (visits[0], visits[1]), found, rows, (names[0], names[1])
        write_followup_page(task.page, FollowupContent(task.case, *ends, shown, notes))
        return Followed(task.case, "", rows, dates, residuals, tuple(doubts))
    except Exception as error:  # the other patients continue, whatever the error
        remove_stale(task.page)
        return Followed(task.case, current.format_error(error))


def row_of(change: Change, days: int | None) -> dict[str, Any]:
    """A lesion's change as plain values; those that can't be computed are None.

    Numbers are those of ``kitseg measure`` at each date; a change per year and the doubling time need the days.
    """
    one, other = change.before, change.after
    known = other or one
    assert known is not None
    row: dict[str, Any] = {"verdict": change.verdict, "kind": known.kind, "side": known.side}
    for name, lesion in (("before", one), ("after", other)):
        row[name] = lesion.number if lesion else None
        row[f"{name}_kind"] = lesion.kind if lesion else None
        row |= {f"{name}_{key}": getattr(lesion, key, None) for key in ("volume_ml", "diameter_mm", "axial_mm")}
    row |= {f"change_{key}": getattr(change, key) for key in ("volume_ml", "mean_mm", "diameter_mm", "axial_mm")}
    row |= {"change_share": change.share, "least_ml": change.least_ml, "least_mm": change.least_mm}
    for key in ("volume_ml", "mean_mm", "least_mm"):
        value = getattr(change, key)
        row[f"{key}_a_year"] = value * DAYS_A_YEAR / days if value is not None and days else None
    row |= {"doubling_days": change.doubling_days(days), "offset_mm": change.offset_mm}
    return {key: round(value, DECIMALS) if isinstance(value, float) else value for key, value in row.items()}


def write_followups(path: Path, results: Sequence[Followed]) -> None:
    """Write the rows of every patient as JSON."""
    good = [result for result in results if not result.error]
    content = {
        result.case: {
            "dates": [str(day) for day in result.dates] if result.dates else None,
            "residual_mm": result.residual_mm,
            **({"doubts": result.doubts} if result.doubts else {}),
            "lesions": result.rows,
        }
        for result in good
    }
    failed = {result.case: result.error for result in results if result.error}
    files.write_json(path, SCHEMA, {"followup": content, "failed": failed})


def write_followup_table(path: Path, results: Sequence[Followed]) -> None:
    """Write a CSV row for each lesion of every patient."""
    rows = [{"case": r.case, **row, "note": "; ".join(r.doubts)} for r in results for row in r.rows]
    rows += [{"case": r.case, "note": r.error or "no lesion at either date"} for r in results if not r.rows]
    files.write_table(
        path, dict.fromkeys(["case", "verdict", *(key for row in rows for key in row if key != "note"), "note"]), rows
    )


def _with_scan(task: LabelTask) -> LabelTask:
    """The task with the scan beside its label map in the KiTS layout, if it has none yet."""
    beside = case_of(task.labels.parent)
    known = task.scan or task.labels.name not in (LABEL, LABEL.removesuffix(".gz")) or not beside.image.exists()
    return task if known else LabelTask(task.case, task.labels, Case(beside.id, beside.image))


def _maker(labels: Path) -> str:
    """What made a label map, by its record, and whether it was changed since."""
    return (" + ".join(recorded_models(labels)) or "unknown origin") + (", changed" * bool(correction_beside(labels)))


def _dates(task: FollowupTask) -> tuple[Dates | None, list[str]]:
    """The dates that were given, else those of DICOM scans, None where one is unknown or both are equal; and doubts.

    Raises UsageError: the second scan's is earlier.
    """
    first, second = (scan_date(part.scan) if part.scan else None for part in (task.before, task.after))
    if task.dates:
        is_odd = any(stated not in (None, day) for stated, day in zip((first, second), task.dates, strict=True))
        return task.dates, [OTHER_DATES.format(first or "unknown", second or "unknown")] if is_odd else []
    if not (first and second):
        return None, []
    if first > second:
        problem = f"the first scan is of {first}, the second of {second}"
        raise UsageError(f"{task.case}: {problem}. Give the earlier one first, or state --dates")
    return ((first, second), []) if first < second else (None, [SAME_DATE.format(first)])


def _other_patient(task: FollowupTask) -> list[str]:
    """A doubt where the DICOM scans or segmentations state different patients."""
    files = [
        file
        for part in (task.before, task.after)
        for file in (part.labels, *(part.scan.files[:1] if part.scan else ()))
    ]
    return [OTHER_PATIENT] if len({patient for file in files if (patient := patient_of(file))}) > 1 else []
