"""Rules that choose the CT of a study to segment, with a reason for every series."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage

from kitseg.errors import UsageError
from kitseg.runtime.files import write_table
from kitseg.volumes.dicom.series import Series, pseudonym
from kitseg.volumes.dicom.stack import is_scout, orientation

FEWEST_SLICES = 10
WHOLE_KIDNEYS = 150.0  # mm along the body: a kidney is 100 to 120 mm long, and the two are at different heights
FINE_ENOUGH = 1.0  # mm between slices; thinner slices only add noise and computing time
SHARP_SIEMENS = 50  # the number in a kernel's name, such as B60f or Br64d
_CT = (CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage)
_MADE_OF_OTHERS = {
    "MIP", "MINIP", "PROJECTION IMAGE", "MAX_IP", "MIN_IP", "CSA MIP", "VOLREN", "SCREEN SAVE",
}  # fmt: skip
_MODALITIES = {
    "CT", "MR", "PT", "NM", "US", "CR", "DX", "XA", "SR", "PR", "KO", "SEG", "RTSTRUCT", "RTDOSE", "RTPLAN", "OT", "SC",
}  # fmt: skip
_UNITS = {"OD", "MGML", "Z_EFF", "ED", "EDW", "PCT"}  # of RescaleType, besides those for HU
#: The makers' names of kernels; another text could be about the patient.
_KERNEL = re.compile(r"[A-Z][a-z]?\d\d[a-z]?|FC\d\d|[A-EL]|Y[A-D]|STANDARD|STND|SOFT|LUNG|BONE(PLUS)?|EDGE|DETAIL")
_ELSEWHERE = re.compile(
    "HEAD|BRAIN|SKULL|SINUS|ORBIT|FACE|NECK|C?SPINE|ARM|HAND|WRIST|ELBOW|SHOULDER|LEG|KNEE|ANKLE|FOOT"
)
_SHARP = re.compile(r"LUNG|BONE|EDGE|DETAIL|SHARP|^Y[A-D]$|^FC(3|5|8)\d|^[DEL]$", re.IGNORECASE)
_UNENHANCED = re.compile(
    r"\bnativ|\bnat\b|non.?con|\bno con|without|ohne|\bsans|unenh|plain|\bw/?o\b|\bNC\b|\bNCCT", re.IGNORECASE
)
#: Of a study whose series all have its name, which states nothing of one of them.
_WITH_AND_WITHOUT = re.compile(
    r"\bw(ith)?\b\W*(and)?\W*w(ithout|/?o)\b|\bmit\W*(u|und)?\W*ohne\b|\bavec\W*(et)?\W*sans\b", re.IGNORECASE
)
_PHASES = (  # the challenge's scans are late arterial, so earlier phases are preferred
    re.compile(r"\bart(er|\b)|cortico", re.IGNORECASE),
    re.compile(r"nephrog|\bpv\b|portal|\bven(\b|ou?s|ö)", re.IGNORECASE),
    re.compile(r"delay|excret|urogr|\blate\b|sp[aä]t", re.IGNORECASE),
)


@dataclass(frozen=True)
class SeriesChoice:
    """A series, whether it is segmented, and the reason, which contains no patient data and no file name."""

    series: Series
    chosen: bool
    reason: str


def choose_series(found: Sequence[Series], wanted: Sequence[str] = ()) -> list[SeriesChoice]:
    """Choose one CT of each study, or the wanted series; returns all series with a reason, grouped by study.

    The rules exclude other modalities than CT, scouts, projections (MIP) and renderings, coronal and sagittal slices,
    and series with fewer than ``FEWEST_SLICES``. ``docs/how-to/dicom.md`` lists the preferences among the others.

    Args:
        found: the result of ``find_series``.
        wanted: SeriesInstanceUIDs or kitseg's own names of series, which override the rules.

    Raises:
        UsageError: a wanted series does not exist.
    """
    if wanted:
        return _named(found, wanted)
    return [choice for study in _studies(found) for choice in _of_study(study)]


def write_series_table(path: Path, choices: Sequence[SeriesChoice], identifiers: bool = False) -> None:
    """Write a CSV file with one row per series: whether it was chosen, the reason, and its properties.

    Without ``identifiers`` it contains no UID, path, date or free text of the files.
    """
    rows = [_facts(choice) | (_identifiers(choice.series) if identifiers else {}) for choice in choices]
    write_table(path, rows[0] if rows else ["case"], rows)


def coverage(series: Series) -> float:
    """Extent in mm from the first to the last slice, including their thickness; 0 if the slices form no volume."""
    return series.stack.native.shape[2] * series.stack.native.spacing[2] if series.stack else 0.0


def _studies(found: Sequence[Series]) -> list[list[Series]]:
    studies: dict[tuple[str, str], list[Series]] = {}
    for series in found:
        studies.setdefault((series.study, series.headers[0].patient), []).append(series)
    return list(studies.values())


def _named(found: Sequence[Series], wanted: Sequence[str]) -> list[SeriesChoice]:
    """The largest stack of each wanted series; one per patient if several patients share its UID."""
    chosen: set[Series] = set()
    for name in wanted:
        mine = [series for series in found if name in (series.case_id, series.uid)]
        if not mine:
            known = ", ".join(f"{s.case_id} ({_what(s)})" for s in found[:20]) or "none"
            raise UsageError(f"--series {name}: no such series. Available: {known}")
        chosen |= {max(study, key=lambda series: len(series.headers)) for study in _studies(mine)}
    return [SeriesChoice(s, s in chosen, f"{'' if s in chosen else 'not '}selected with --series") for s in found]


def _of_study(study: Sequence[Series]) -> list[SeriesChoice]:
    excluded = {series: _exclusion(series) for series in study}
    fit = [series for series in study if not excluded[series]]
    best = min(fit, key=lambda series: ([-value(series) for value, _ in PREFERENCES], series.case_id), default=None)
    return [_decide(series, best, excluded[series], len(fit)) for series in study]


def _decide(series: Series, best: Series | None, excluded: str, fit: int) -> SeriesChoice:
    if excluded or best is None:
        return SeriesChoice(series, False, excluded)
    if series is not best:
        better = (words for value, words in PREFERENCES if value(series) < value(best))
        lost = f"{best.case_id} {next(better, 'is equivalent, and first by name')}"
        return SeriesChoice(series, False, series.problem or lost)
    reason = "the only suitable CT of its study" if fit == 1 else f"the best of {fit} suitable CT series of its study"
    reasons = (f"{reason}: {_what(series)}", series.problem, series.note)
    return SeriesChoice(series, True, "; ".join(filter(None, reasons)))


def _exclusion(series: Series) -> str:
    """Why the rules exclude a series; empty if they don't. Invalid geometry is reported when the series is read."""
    first = series.headers[0]
    if first.broken:
        return series.problem
    if first.modality != "CT":
        return "not a CT" + (f" ({first.modality})" if first.modality in _MODALITIES else "")
    if first.sop_class not in _CT or first.samples != 1:
        return "not CT images (a screenshot or a report)"
    if first.unit not in ("", "HU", "HU_MOD", "US"):
        return "the values are not HU" + (f" ({first.unit})" if first.unit in _UNITS else "")
    if is_scout(first):
        return "a scout"
    if made := _MADE_OF_OTHERS & set(first.image_type):
        return f"computed from other slices ({min(made)})"
    if orientation(first) in ("coronal", "sagittal"):
        return f"{orientation(first)}, not axial"
    if first.frames == 1 and len(series.headers) < FEWEST_SLICES:
        return f"only {len(series.headers)} {'slice' if len(series.headers) == 1 else 'slices'}"
    return ""


def _is_elsewhere(series: Series) -> bool:
    part = series.headers[0].body_part
    return "ABD" not in part and bool(_ELSEWHERE.search(part))


def _phase(series: Series) -> int | None:
    """The index in ``_PHASES`` of the phase in the description, whose text is never written anywhere."""
    text = series.headers[0].description
    return next((n for n, words in enumerate(_PHASES) if words.search(text)), None)


def _earliness(series: Series) -> int:
    phase = _phase(series)
    return -1 if phase is None else -phase  # unknown phases are mostly venous


def _contrast(series: Series) -> str:
    """Whether it has contrast: yes, no or unknown."""
    first = series.headers[0]
    if _UNENHANCED.search(_WITH_AND_WITHOUT.sub("", first.description)):
        return "no"
    return "yes" if first.contrast or _phase(series) is not None else "unknown"


def _sharp(series: Series) -> bool:
    kernel = series.headers[0].kernel
    siemens = re.match(r"[A-Z][a-z]?(\d\d)", kernel)
    return int(siemens[1]) >= SHARP_SIEMENS if siemens else bool(_SHARP.search(kernel))


def _spacing(series: Series) -> float:
    return series.stack.native.spacing[2] if series.stack else 99.0


#: In order of priority, what is preferred where it is higher, and the advantage: the first in which two series differ
#: decides.
PREFERENCES: tuple[tuple[Callable[[Series], float], str], ...] = (
    (lambda s: s.stack is not None, "can be read as a volume"),
    (lambda s: not _is_elsewhere(s), "does not show another part of the body"),
    (lambda s: "ORIGINAL" in s.headers[0].image_type, "is original, not derived"),
    (lambda s: coverage(s) >= WHOLE_KIDNEYS, f"covers {WHOLE_KIDNEYS:.0f} mm or more"),
    (lambda s: _contrast(s) == "yes", "has contrast according to its headers"),
    (lambda s: _contrast(s) != "no", "is not stated to be without contrast"),
    (_earliness, "is of an earlier contrast phase"),
    (lambda s: not _sharp(s), "has a soft-tissue kernel"),
    (lambda s: -round(max(_spacing(s), FINE_ENOUGH), 2), "has thinner slices"),
    (lambda s: round(coverage(s), -1), "covers more"),
)


def _what(series: Series) -> str:
    if series.stack is None:
        return f"{len(series.headers)} files"
    contrast = {"yes": "with contrast", "no": "without contrast", "unknown": "contrast unknown"}[_contrast(series)]
    sharp = ", sharp kernel" if _sharp(series) else ""
    return f"{len(series.headers)} slices {_spacing(series):.3g} mm apart, {contrast}{sharp}"


def _facts(choice: SeriesChoice) -> dict[str, object]:
    series, first = choice.series, choice.series.headers[0]
    made = series.stack
    return {
        "case": series.case_id,
        "chosen": "yes" if choice.chosen else "no",
        "reason": choice.reason,
        "study": pseudonym("study", series.study),
        "modality": first.modality if first.modality in _MODALITIES else "",
        "files": len(series.headers),
        "slice_mm": f"{made.native.spacing[2]:.4g}" if made else "",
        "pixel_mm": f"{first.spacing[0]:.4g}" if first.spacing else "",
        "rows": first.size[0],
        "columns": first.size[1],
        "coverage_mm": f"{coverage(series):.0f}" if made else "",
        "orientation": orientation(first),
        "contrast": _contrast(series),
        "kernel": first.kernel if _KERNEL.fullmatch(first.kernel) else "",
        "original": "yes" if "ORIGINAL" in first.image_type else "no",
    }


def _identifiers(series: Series) -> dict[str, object]:
    first = series.headers[0]
    return {
        "patient_id": first.patient,
        "study_uid": series.study,
        "series_uid": series.uid,
        "description": first.description,
        "folder": series.folder,
    }
