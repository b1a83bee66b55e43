"""From scans to labels: ``infer``, ``ensemble`` and ``postprocess`` at once, with measures, flags and a picture."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kitseg import __version__
from kitseg.errors import KitsegError, UsageError
from kitseg.files import write_json
from kitseg.measure.measure import measure
from kitseg.measure.quality import assess
from kitseg.pipeline.clean import build_steps, clean, save_labels, spare_scan
from kitseg.pipeline.machine import versions
from kitseg.pipeline.members import Ensemble, choose_run, open_ensemble
from kitseg.pipeline.memory import Limit
from kitseg.pipeline.outcome import OnDone, Outcome, each
from kitseg.report.pictures import case_picture
from kitseg.screen import say
from kitseg.splits import held_out
from kitseg.types import Case, Volume
from kitseg.volumes.check import looks_like_hu
from kitseg.volumes.nifti import file_digest
from kitseg.volumes.scan import Scans, find_scans, knows_its_place, read_scan, scan_digest, scan_geometry

SCHEMA = 3
SERIES_TABLE = "series.csv"


@dataclass(frozen=True)
class Wanted:
    """What `predict` writes beside labels, figures and a picture.

    dicom_seg: a DICOM segmentation of each DICOM series; keep_identifiers: who the patient is, into that and the table
    of series; limit: of main memory, for each scan.
    """

    dicom_seg: bool = False
    keep_identifiers: bool = False
    limit: Limit | None = None


def predict_scans(
    model: Ensemble, scans: Sequence[Case], to: Path, on_done: OnDone, wanted: Wanted = Wanted()
) -> list[Outcome]:
    """Labels, figures and a picture for each scan: ``infer``, ``ensemble`` and ``postprocess`` without the files.

    Raises:
        UsageError: a file of another origin is in the way, or a DICOM segmentation of a scan that is no DICOM series.
    """
    steps, origin, experience = build_steps(model.postprocess), model.origin(), model.experience()
    methods = " + ".join(sorted({one.method.name for one in model.models}))
    by_id = {scan.id: scan for scan in scans}
    for case, scan in by_id.items():
        spare_scan(scan.image, to / f"{case}.nii.gz")
        _spare_foreign(to / f"{case}.json")
        if wanted.dicom_seg and not scan.slices:
            raise UsageError(f"{scan.image} is no DICOM series, so that there is nothing for a DICOM segmentation")

    def work(case: str) -> Outcome:
        begun, source = time.perf_counter(), by_id[case]
        if wanted.limit:
            wanted.limit.check(scan_geometry(source), case)
        scan = read_scan(source)
        probabilities, agreement = model.believe(scan)
        labels = clean(probabilities, scan, steps)
        written = save_labels(to, case, labels, probabilities)
        findings = measure(labels, scan.geometry, scan.array)
        quality = assess(labels, scan.array, scan.geometry, findings, agreement, experience)
        note = "; ".join(filter(None, [written.note, *doubts(source, scan)]))
        outcome = replace(written, note=note, quality=quality)
        if wanted.dicom_seg:
            _write_segmentation(to / f"{case}.dcm", labels, source, methods, wanted.keep_identifiers)
        facts = {
            "case": case,
            "scan": case if source.slices else source.image.name,
            "scan_sha256": scan_digest(source),
            "labels_sha256": file_digest(to / f"{case}.nii.gz"),
            "volumes_ml": outcome.volumes_ml,
            "note": note,
            "seconds": round(time.perf_counter() - begun, 2),
            "models": origin,
            "versions": versions(),
            "findings": asdict(findings),
            "quality": {"level": quality.level, **asdict(quality), "agreement": agreement},
        }
        write_json(to / f"{case}.json", SCHEMA, facts)
        case_picture(to / f"{case}.png", scan, labels, title=case)
        return outcome

    return each(list(by_id), work, on_done)


def predict(
    scans: Path | str | Sequence[Path | str],
    model: Path | str | Sequence[Path | str] | None = None,
    output: Path | str = "predictions",
    device: str = "auto",
) -> list[Outcome]:
    """``kitseg predict`` from Python.

    Args:
        scans: NIfTI files, folders of them, or folders of DICOM series.
        model: runs, folds or ensemble files; the only finished run under ``runs/`` where it is None.
        output: the folder for ``<id>.nii.gz``, ``<id>.json`` and ``<id>.png``.
        device: auto, cpu or cuda.

    Returns:
        One outcome a scan, with the label file, the volumes in ml and the flags, or the error in words.
    """
    opened = open_ensemble(_paths(model) if model else [choose_run(Path("runs")).path], device)
    say(opened.describe())
    found = find_scans(_paths(scans))
    write_choices(Path(output), found, keep_identifiers=False)
    return predict_scans(opened, found.cases, Path(output), lambda _: None)


def choose_scans(paths: Sequence[Path], split: Path | None, fold: int | None, series: Sequence[str] = ()) -> Scans:
    """The scans in files and folders, or those of them that a split holds out.

    Raises:
        UsageError: a held-out case that isn't there.
    """
    found, wanted = find_scans(paths, series), held_out(split, fold)
    if missing := sorted(set(wanted) - {case.id for case in found.cases}):
        raise UsageError(f"{', '.join(missing)} of {split} can't be found in {', '.join(map(str, paths))}")
    return replace(found, cases=tuple(case for case in found.cases if not wanted or case.id in wanted))


def write_choices(to: Path, found: Scans, keep_identifiers: bool) -> None:
    """Write which DICOM series were chosen and why, where there are any.

    Raises:
        KitsegError: none of them was.
    """
    if not found.choices:
        return
    from kitseg.volumes.dicom.choice import write_series_table

    write_series_table(to / SERIES_TABLE, found.choices, keep_identifiers)
    if not found.cases:
        reasons = "; ".join(f"{choice.series.case_id}: {choice.reason}" for choice in found.choices[:5])
        raise KitsegError(
            f"none of {len(found.choices)} DICOM series is a CT to segment ({reasons}). See {SERIES_TABLE}."
        )


def doubts(case: Case, scan: Volume) -> list[str]:
    """What makes a scan's labels doubtful: values that don't look like HU, an orientation that the file doesn't say."""
    found = [case.note] if case.note else []
    if not looks_like_hu(scan.array):
        found.append("its values don't look like Hounsfield units")
    return found if knows_its_place(case) else [*found, "the file doesn't say its orientation"]


def _write_segmentation(path: Path, labels: NDArray[np.uint8], source: Case, method: str, keep: bool) -> None:
    from kitseg.volumes.dicom.segmentation import Algorithm, write_segmentation
    from kitseg.volumes.dicom.series import open_series

    series = open_series(source.slices, source.id)
    write_segmentation(path, labels, series, Algorithm(f"kitseg {method}", __version__), keep)


def _paths(given: Path | str | Sequence[Path | str]) -> list[Path]:
    return [Path(given)] if isinstance(given, str | Path) else [Path(path) for path in given]


def _spare_foreign(path: Path) -> None:
    """Never write over a file that kitseg didn't make."""
    if path.exists():
        try:
            json.loads(path.read_text(encoding="utf-8"))["versions"]["kitseg"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} was not written by kitseg; choose another folder with --output") from error
