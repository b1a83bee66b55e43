"""From scans to labels: ``infer``, ``ensemble`` and ``postprocess`` in one, with measures, flags and a picture."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kitseg import __version__
from kitseg.commands.case_record import (
    describe_learning,
    file_ending,
    model_names,
    quality_facts,
    read_record,
    refuse_case_overwrite,
    refuse_scan_overwrite,
)
from kitseg.commands.postprocess import Write, write_case
from kitseg.errors import KitsegError, UsageError
from kitseg.labels import Scheme
from kitseg.measurement.confidence import Confidence, uncertainty
from kitseg.models.members import Ensemble, Prediction
from kitseg.models.memory import check_memory
from kitseg.models.origin import learned_from, origin_path
from kitseg.report import as_sentence
from kitseg.runtime.device import versions
from kitseg.runtime.locks import folder_lock
from kitseg.runtime.outcomes import UNCHANGED, OnDone, Outcome, each
from kitseg.runtime.overwrite import refuse_overwrite
from kitseg.runtime.provenance import recipe
from kitseg.runtime.sharding import Share
from kitseg.runtime.workers import Log
from kitseg.splits import held_out
from kitseg.types import Case, Volume
from kitseg.volumes.check import NOT_HU, looks_like_hu
from kitseg.volumes.names import UNCERTAINTY, pair
from kitseg.volumes.nifti import write_labels, write_volume
from kitseg.volumes.scan import Scans, find_scans, hu_digest, read_scan, scan_digest

if TYPE_CHECKING:
    from kitseg.volumes.dicom.choice import SeriesChoice

SERIES_TABLE = "series.csv"
#: The endings of what each format writes beside the NIfTI file.
FORMATS = {
    "nifti": (),
    "mha": (".mha",),
    "seg.nrrd": (".seg.nrrd",),
    "uncertainty": (UNCERTAINTY,),
    "dicom-seg": (".dcm",),
    "dicom-sr": (".dcm", ".sr.dcm"),
    "dicom-pdf": (".pdf.dcm",),
}


@dataclass(frozen=True)
class PredictOptions:
    """What `predict` writes beside labels, figures and a picture.

    endings: of the files in other formats, of DICOM series ``.dcm`` the segmentation, ``.sr.dcm`` the measurements
    and ``.pdf.dcm`` the page;
    anonymous: DICOM files without patient and study; identifiers: patient and UIDs in the table of series; choices: the
    series in that table; max_memory: a scan that may need more bytes fails before it is read; part: of the work, such
    as ``1/2``, empty for the whole; labels: the scheme of the label maps, the model's where it is None; confidence:
    what flags cases by their expected Dice, and calibrates the uncertainty map.
    """

    endings: Sequence[str] = ()
    anonymous: bool = False
    identifiers: bool = False
    choices: Sequence[SeriesChoice] = ()
    max_memory: int | None = None
    part: str = ""
    labels: Scheme | None = None
    confidence: Confidence | None = None


@dataclass(frozen=True)
class PredictScans:
    """Labels, figures and a picture for each scan, in one process or several.

    open_ensemble: opens the models, in the process that works with them.
    """

    open_ensemble: Callable[[], Ensemble]
    to: Path
    options: PredictOptions = PredictOptions()

    def __call__(self, scans: Sequence[Case], share: Share, log: Log, on_done: OnDone) -> list[Outcome]:
        """Predict these scans, which are a share of all; finished and unchanged ones stay.

        Raises UsageError: a file of another origin is in the way, or a DICOM segmentation of a scan that is not a DICOM
        series; KitsegError: another process writes there.
        """
        endings = (".nii.gz", ".png", *self.options.endings)
        if self.options.choices:
            refuse_overwrite(self.to / SERIES_TABLE, "series table")
        for scan in scans:
            refuse_scan_overwrite(scan.image, self.to / f"{scan.id}.nii.gz")
            refuse_case_overwrite(self.to / f"{scan.id}.json", endings)
            if any(map(_is_dicom, self.options.endings)) and not scan.slices:
                raise UsageError(f"{scan.image} is not a DICOM series, which DICOM output needs")
        model = self.open_ensemble()
        log(model.describe())
        if self.options.labels and self.options.labels.cyst is None and "cyst" in model.models[0].outputs:
            log(f"cysts are written as {self.options.labels.kidney.name}: the labels are {self.options.labels}")
        for line in fitted_to_others(model, self.options.confidence):
            log(line)
        with folder_lock(self.to, "labels", share.part):
            write_choices(self.to, self.options.choices, self.options.identifiers)
            predictor = CasePredictor(model, self.to, self.options)
            return each(scans, predictor.predict, on_done)


class CasePredictor:
    """Predicts scans one by one, with what is the same for all of them."""

    def __init__(self, model: Ensemble, to: Path, options: PredictOptions) -> None:
        self.model, self.to, self.options = model, to, options
        self.scheme = options.labels or model.models[0].method.labels
        self.shared_doubts = [model.loses] if model.loses and self.scheme.cyst else []
        self.shared_doubts += fitted_to_others(model, options.confidence)
        self.facts: dict[str, Any] = {"postprocess": model.postprocess}
        self.facts |= {"labels": self.scheme.plain(), "versions": versions()}
        if options.confidence:
            sure = options.confidence
            self.facts["confidence"] = asdict(sure.model) | {"temperature": sure.temperature, "models": sure.models}
        self.recipe = recipe(models=model.origin(), **self.facts, outputs=(*options.endings, options.anonymous))

    def predict(self, source: Case) -> Outcome:
        """Labels, figures and a picture of a scan, unless they are there; its record is written last."""
        start, record = time.perf_counter(), self.to / f"{source.id}.json"
        made = {"recipe": self.recipe, "scan_sha256": scan_digest(source)}
        if before := read_record(record, made):
            note, labels = "; ".join(filter(None, [before.note, UNCHANGED])), record.with_suffix(".nii.gz")
            return Outcome(source.id, "", note, labels, before.volumes_ml, before.quality)
        check_memory(self.options.max_memory, self.model.models, source)
        scan = read_scan(source)
        found = self.model.predict(scan, scheme=self.scheme)
        from kitseg.report.pictures import case_picture

        more: dict[str, Write] = {
            ".png": partial(case_picture, ct=scan, labels=found.canonical, title=source.id, scheme=self.scheme)
        }
        sure = self.options.confidence
        quality = sure.judge(found.signs, found.quality) if sure else found.quality
        for ending in self.options.endings:
            if ending == UNCERTAINTY:
                percent = uncertainty(found.proba, (sure and sure.temperature) or 1.0)
                more[ending] = partial(write_labels, labels=percent, native=scan.native)
            elif not _is_dicom(ending):
                more[ending] = partial(write_volume, labels=found.canonical, native=scan.native, scheme=self.scheme)
        hu_sha256, doubted = hu_digest(scan), [*doubts(source, scan), *self.shared_doubts]
        learned = learned_from(self.model.models, made["scan_sha256"], hu_sha256)
        if any(map(_is_dicom, self.options.endings)):
            remarks = [*filter(None, [describe_learning(learned)]), *doubted]
            more |= self._dicom_files(source, replace(found, quality=quality), scan, remarks)
        facts: dict[str, Any] = {
            "scan": source.id if source.slices else source.image.name,
            "hu_sha256": hu_sha256,
            "seconds": round(time.perf_counter() - start, 2),
            "findings": asdict(found.findings),
            "learned_from": learned,
            **({"part": self.options.part} if self.options.part else {}),
            "quality": quality_facts(quality, found.agreement),
            "signs": found.signs,
            "models": self.model.origin(),  # now, because an engine may have left a network to PyTorch
            **self.facts,
        }
        written = write_case(self.to, found.canonical, found.proba, facts, made, doubted, more)
        return replace(written, quality=quality)

    def _dicom_files(self, source: Case, found: Prediction, scan: Volume, remarks: Sequence[str]) -> dict[str, Write]:
        """The writers of the DICOM files of a series, by their endings; remarks: doubts beside the quality flags."""
        from kitseg.volumes.dicom.document import patient_line, write_document
        from kitseg.volumes.dicom.segmentation import Algorithm, SegmentedSeries, write_segmentation
        from kitseg.volumes.dicom.series import open_series, pseudonym
        from kitseg.volumes.dicom.structured_report import write_report

        methods = " + ".join(sorted({one.method.name for one in self.model.models}))
        labels, findings = found.canonical, found.findings
        series, algorithm = open_series(source.slices, source.id), Algorithm(f"kitseg {methods}", __version__)
        notes = [as_sentence(remark) for remark in remarks]
        texts = (*(f"{flag.level}: {flag.reason}" for flag in found.quality.flags), *notes)
        hidden = self.options.anonymous
        made = SegmentedSeries(series, labels, findings, algorithm, scan.array, self.scheme, hidden, texts)

        def write_pages(path: Path) -> None:
            from kitseg.report.case_page import CaseContent
            from kitseg.report.pdf import case_pdf
            from kitseg.report.slices import Scene

            scene = Scene(labels, scan.geometry, scan.array, None, self.scheme)
            facts = {"Series": pseudonym("series", series.uid), "Made by": f"{algorithm.name} {algorithm.version}"}
            content = CaseContent(source.id, scene, findings, found.quality, {}, facts, notes)
            write_document(path, made, case_pdf(content, patient_line(made), made.image_numbers))

        writers: dict[str, Write] = {
            ".dcm": partial(write_segmentation, found=made),
            ".sr.dcm": partial(write_report, found=made, segmentation=self.to / f"{source.id}.dcm"),
            ".pdf.dcm": write_pages,
        }
        return {ending: write for ending, write in writers.items() if ending in self.options.endings}


def output_endings(formats: str, option: str = "--format ") -> list[str]:
    """The endings of the files in comma-separated formats. Raises UsageError: an unknown one."""
    wanted = [name.strip() for name in formats.split(",")]
    if unknown := [name for name in wanted if name not in FORMATS]:
        raise UsageError(f"{option}{unknown[0]}: give {', '.join(FORMATS)}, or several with commas between")
    return list(dict.fromkeys(ending for name in wanted for ending in FORMATS[name]))


def choose_scans(paths: Sequence[Path], split: Path | None, fold: int | None, series: Sequence[str] = ()) -> Scans:
    """The scans in files and folders, or those of them that a split holds out.

    Raises UsageError: a held-out case is missing.
    """
    found, wanted = find_scans(paths, series), held_out(split, fold)
    there = pair(wanted, [case.id for case in found.cases])
    if missing := sorted(set(wanted) - there.keys()):
        raise UsageError(f"{', '.join(missing)} of {split} can't be found in {', '.join(map(str, paths))}")
    chosen = set(there.values())
    return replace(found, cases=tuple(case for case in found.cases if not wanted or case.id in chosen))


def name_output(scans: Scans, output: Path, endings: Sequence[str]) -> tuple[Scans, Path, list[str]]:
    """The scans, the folder of their outputs, and the endings of files beside the NIfTI file.

    Of one scan, ``output`` may be the label map, a .nii.gz, .mha or .seg.nrrd file.

    Raises:
        UsageError: a file's name for several scans, or a name that label maps don't have.
    """
    ending = file_ending(output, len(scans.cases), (".nii.gz", ".mha", ".seg.nrrd"))
    if not ending:
        return scans, output, [*endings]
    more = dict.fromkeys([*endings, *([ending] if ending != ".nii.gz" else [])])
    return replace(scans, cases=(replace(scans.cases[0], id=output.name.removesuffix(ending)),)), output.parent, [*more]


def write_choices(to: Path, choices: Sequence[SeriesChoice], identifiers: bool) -> None:
    """Write which DICOM series were chosen and why, where there are any.

    Raises KitsegError: none of them was chosen.
    """
    if not choices:
        return
    from kitseg.volumes.dicom.choice import write_series_table

    write_series_table(to / SERIES_TABLE, choices, identifiers)
    if not any(choice.chosen for choice in choices):
        reasons = "; ".join(f"{choice.series.case_id}: {choice.reason}" for choice in choices[:5])
        raise KitsegError(f"none of {len(choices)} DICOM series is a CT to segment ({reasons}). See {SERIES_TABLE}.")


def _is_dicom(ending: str) -> bool:
    return ending.endswith(".dcm")


def fitted_to_others(model: Ensemble, sure: Confidence | None) -> list[str]:
    """A line where the expected Dice was fitted to other models than these, by their names."""
    here = model_names(map(origin_path, model.models))
    if sure is None or not sure.models or model_names(sure.models) == here:
        return []
    return [f"the expected Dice was fitted to {' and '.join(sure.models)}, not to {' and '.join(here)}"]


def doubts(case: Case, scan: Volume) -> list[str]:
    """What makes a scan's labels doubtful: values unlike HU, an orientation that the file doesn't state."""
    unlike = [] if looks_like_hu(scan.array) else [NOT_HU]
    return [*filter(None, [case.note]), *scan.native.doubts, *unlike]
