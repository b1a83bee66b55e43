"""From scans to labels: ``infer``, ``ensemble`` and ``postprocess`` at once, with measures, flags and a picture."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kitseg import __version__
from kitseg.commands.postprocess import refuse_scan_overwrite, save_labels
from kitseg.errors import KitsegError, UsageError
from kitseg.measure.measure import measure
from kitseg.measure.quality import Flag, Quality, assess
from kitseg.models.members import Ensemble, choose_run, open_ensemble
from kitseg.models.memory import Limit
from kitseg.models.postprocessing import build_steps, clean
from kitseg.report.pictures import case_picture
from kitseg.runtime.console import print_plain
from kitseg.runtime.device import versions
from kitseg.runtime.locks import folder_lock
from kitseg.runtime.outcomes import UNCHANGED, OnDone, Outcome, each
from kitseg.runtime.provenance import forget, read_record, recipe, refuse_overwrite, write_record
from kitseg.runtime.sharding import Share
from kitseg.runtime.workers import Log
from kitseg.splits import held_out
from kitseg.types import Case, Volume
from kitseg.volumes.check import looks_like_hu
from kitseg.volumes.scan import Scans, find_scans, knows_its_place, read_scan, scan_digest, scan_geometry

if TYPE_CHECKING:
    from kitseg.volumes.dicom.choice import SeriesChoice

SERIES_TABLE = "series.csv"


@dataclass(frozen=True)
class PredictOptions:
    """What `predict` writes beside labels, figures and a picture.

    dicom_seg: a DICOM segmentation of each DICOM series; keep_identifiers: who the patient is, into that and the table
    of series; choices: the series in that table; max_memory: a scan that may need more bytes fails before it is read.
    """

    dicom_seg: bool = False
    keep_identifiers: bool = False
    choices: Sequence[SeriesChoice] = ()
    max_memory: int | None = None


@dataclass(frozen=True)
class Prediction:
    """Labels, figures and a picture for each scan: ``infer``, ``ensemble`` and ``postprocess`` without their files.

    Work for one process or several. open_ensemble: opens the models, in the process that works with them.
    """

    open_ensemble: Callable[[], Ensemble]
    to: Path
    wanted: PredictOptions = PredictOptions()

    def __call__(self, scans: Sequence[Case], share: Share, log: Log, on_done: OnDone) -> list[Outcome]:
        """Predict these scans, which are a share of all; what is done and unchanged stays.

        Raises:
            UsageError: a file of another origin is in the way, or a DICOM segmentation of a scan that is no DICOM
                series. KitsegError: somebody writes there.
        """
        for scan in scans:
            refuse_scan_overwrite(scan.image, self.to / f"{scan.id}.nii.gz")
            refuse_overwrite(self.to / f"{scan.id}.json")
            if self.wanted.dicom_seg and not scan.slices:
                raise UsageError(f"{scan.image} is no DICOM series, so that there is nothing for a DICOM segmentation")
        model = self.open_ensemble()
        log(model.describe())
        with folder_lock(self.to, "labels", share.part):
            write_choices(self.to, self.wanted.choices, self.wanted.keep_identifiers)
            desk = CasePredictor(model, self.to, self.wanted)
            by_id = {scan.id: scan for scan in scans}
            return each(list(by_id), lambda case: desk.predict(by_id[case]), on_done)


class CasePredictor:
    """Where scans become labels, with what is the same for all of them."""

    def __init__(self, model: Ensemble, to: Path, wanted: PredictOptions) -> None:
        self.model, self.to, self.wanted = model, to, wanted
        self.steps, self.training_domain = build_steps(model.postprocess), model.training_domain()
        self.limit = Limit(wanted.max_memory, model.models)
        self.facts = {"models": model.origin(), "postprocess": model.postprocess, "versions": versions()}
        outputs = (wanted.dicom_seg, wanted.dicom_seg and wanted.keep_identifiers)
        self.recipe = recipe(**self.facts, outputs=outputs)

    def predict(self, source: Case) -> Outcome:
        """Labels, figures and a picture of a scan, unless they are there; its record is written last."""
        begun, record = time.perf_counter(), self.to / f"{source.id}.json"
        made = {"recipe": self.recipe, "scan_sha256": scan_digest(source)}
        if before := read_record(record, made):
            return _as_before(before, record)
        self.limit.check(scan_geometry(source), source.id)
        scan = read_scan(source)
        probabilities, agreement = self.model.predict_proba(scan)
        labels = clean(probabilities, scan, self.steps)
        findings = measure(labels, scan.geometry, scan.array)
        quality = assess(labels, scan.array, scan.geometry, findings, agreement, self.training_domain)
        files = [self.to / f"{source.id}{end}" for end in (".nii.gz", ".png", *[".dcm"] * self.wanted.dicom_seg)]
        forget(record, files)
        written = save_labels(self.to, source.id, labels, probabilities)
        case_picture(files[1], scan, labels, title=source.id)
        if self.wanted.dicom_seg:
            self._write_segmentation(files[2], labels, source)
        note = "; ".join(filter(None, [written.note, *doubts(source, scan)]))
        facts = {
            "case": source.id,
            "scan": source.id if source.slices else source.image.name,
            "volumes_ml": written.volumes_ml,
            "note": note,
            "seconds": round(time.perf_counter() - begun, 2),
            "findings": asdict(findings),
            "quality": {"level": quality.level, **asdict(quality), "agreement": agreement},
        }
        write_record(record, {**facts, **self.facts}, made, files)
        return replace(written, note=note, quality=quality)

    def _write_segmentation(self, path: Path, labels: NDArray[np.uint8], source: Case) -> None:
        from kitseg.volumes.dicom.segmentation import Algorithm, write_segmentation
        from kitseg.volumes.dicom.series import open_series

        methods = " + ".join(sorted({one.method.name for one in self.model.models}))
        series, algorithm = open_series(source.slices, source.id), Algorithm(f"kitseg {methods}", __version__)
        write_segmentation(path, labels, series, algorithm, self.wanted.keep_identifiers)


def _as_before(facts: Mapping[str, Any], record: Path) -> Outcome:
    """The outcome that a case had, by its record."""
    found = facts["quality"]
    quality = Quality(tuple(Flag(**flag) for flag in found["flags"]), found["phase"])
    note = "; ".join(filter(None, [facts["note"], UNCHANGED]))
    return Outcome(
        facts["case"], note=note, result=record.with_suffix(".nii.gz"), volumes_ml=facts["volumes_ml"], quality=quality
    )


def predict(
    scans: Path | str | Sequence[Path | str],
    model: Path | str | Sequence[Path | str] | None = None,
    output: Path | str = "predictions",
    device: str = "auto",
) -> list[Outcome]:
    """``kitseg predict`` from Python.

    Args:
        scans: NIfTI files, folders of them, or folders of DICOM series.
        model: runs, folds, ensemble files, bundles or their addresses; the only finished run under ``runs/`` where it
            is None.
        output: the folder for ``<id>.nii.gz``, ``<id>.json`` and ``<id>.png``.
        device: auto, cpu or cuda.

    Returns:
        One outcome a scan, with the label file, the volumes in ml and the flags, or the error in words.
    """
    opened = partial(open_ensemble, _models(model) if model else [choose_run(Path("runs")).path], device)
    found = find_scans(_paths(scans))
    work = Prediction(opened, Path(output), PredictOptions(choices=found.choices))
    return work(found.cases, Share(), print_plain, lambda _: None)


def choose_scans(paths: Sequence[Path], split: Path | None, fold: int | None, series: Sequence[str] = ()) -> Scans:
    """The scans in files and folders, or those of them that a split holds out.

    Raises:
        UsageError: a held-out case that isn't there.
    """
    found, wanted = find_scans(paths, series), held_out(split, fold)
    if missing := sorted(set(wanted) - {case.id for case in found.cases}):
        raise UsageError(f"{', '.join(missing)} of {split} can't be found in {', '.join(map(str, paths))}")
    return replace(found, cases=tuple(case for case in found.cases if not wanted or case.id in wanted))


def write_choices(to: Path, choices: Sequence[SeriesChoice], keep_identifiers: bool) -> None:
    """Write which DICOM series were chosen and why, where there are any.

    Raises:
        KitsegError: none of them was.
    """
    if not choices:
        return
    from kitseg.volumes.dicom.choice import write_series_table

    write_series_table(to / SERIES_TABLE, choices, keep_identifiers)
    if not any(choice.chosen for choice in choices):
        reasons = "; ".join(f"{choice.series.case_id}: {choice.reason}" for choice in choices[:5])
        raise KitsegError(f"none of {len(choices)} DICOM series is a CT to segment ({reasons}). See {SERIES_TABLE}.")


def doubts(case: Case, scan: Volume) -> list[str]:
    """What makes a scan's labels doubtful: values that don't look like HU, an orientation that the file doesn't say."""
    found = [case.note] if case.note else []
    if not looks_like_hu(scan.array):
        found.append("its values don't look like Hounsfield units")
    return found if knows_its_place(case) else [*found, "the file doesn't say its orientation"]


def _models(given: Path | str | Sequence[Path | str]) -> list[Path | str]:
    return [given] if isinstance(given, str | Path) else list(given)


def _paths(given: Path | str | Sequence[Path | str]) -> list[Path]:
    return [Path(given)] if isinstance(given, str | Path) else [Path(path) for path in given]
