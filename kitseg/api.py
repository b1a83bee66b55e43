"""kitseg as a library: arrays or paths in, arrays and figures out; nothing is printed, and failures are exceptions.

Label ids: 0 background, 1 kidney, 2 tumor, in kits23 3 cyst. Affines map voxel indices to mm in RAS+, as nibabel's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike

from kitseg import config
from kitseg.commands.case_record import scheme_beside
from kitseg.commands.preprocess import Stored
from kitseg.config import Method
from kitseg.errors import KitsegError, UsageError
from kitseg.labels import Scheme, find_scheme
from kitseg.measurement.findings import Findings
from kitseg.measurement.nephrometry import Nephrometry
from kitseg.measurement.renal_function import AfterSurgery, Patient
from kitseg.models.builtin import choose_model
from kitseg.models.members import Ensemble, Prediction, open_ensemble
from kitseg.runtime import console
from kitseg.runtime.outcomes import Outcome
from kitseg.runtime.sharding import Share
from kitseg.scoring.case import CaseScore
from kitseg.trust import everything
from kitseg.types import Case, Volume
from kitseg.volumes.arrays import Image, labels_from, scan_from
from kitseg.volumes.scan import check_grid, find_scans, read_scan

FilePath = Path | str
Models = Ensemble | FilePath | Sequence[FilePath]
Labels = Scheme | str | None


def load_model(
    model: FilePath | Sequence[FilePath],
    device: str = "auto",
    engine: str = "auto",
    precision: str = "auto",
    mirror: bool = False,
    trust: bool = False,
) -> Ensemble:
    """Load a run, a fold of one, an ensemble file or a bundle, or several, whose probabilities are averaged.

    Args:
        model: paths, addresses such as ``hf://owner/name@revision``, or ``builtin``, which ships with kitseg.
        device: auto, cpu, cuda or mps.
        engine: torch, openvino, winograd (kitseg's kernels), or auto, which on a CPU takes what is fastest.
        precision: auto (the training's on a GPU, float32 on a CPU), f32 or bf16.
        mirror: test-time augmentation, left-right flip.
        trust: also load parts that aren't kitseg's, which runs the code of the model's author.

    Raises:
        UsageError: not a model, or a device or engine that isn't there. InputError: unfinished or damaged.
    """
    with everything() if trust else nullcontext():
        return open_ensemble(_several(model), device, mirror=mirror, engine=engine, precision=precision)


def load_method(method: FilePath, size: str = "paper", overrides: Sequence[str] = ()) -> Method:
    """A method by its name or the path of its YAML file, resolved and checked.

    Args:
        method: such as ``two-phase``.
        size: one of the method's sizes.
        overrides: ``KEY=VALUE`` for any key of the configuration.

    Raises:
        UsageError: an unknown method, size or key.
    """
    return config.method_of(config.compose(str(method), size, overrides))


@overload
def predict(
    scans: Image | Sequence[Image], model: Models | None = None, output: None = None, device: str = "auto"
) -> list[Prediction]: ...
@overload
def predict(
    scans: FilePath | Sequence[FilePath], model: Models | None = None, *, output: FilePath, device: str = "auto"
) -> list[Outcome]: ...
def predict(
    scans: Image | Sequence[Image],
    model: Models | None = None,
    output: FilePath | None = None,
    device: str = "auto",
) -> list[Prediction] | list[Outcome]:
    """Predict scans; with ``output`` as `kitseg predict` does, into that folder.

    Args:
        scans: one or several: files, folders of them or of DICOM series, or images (see ``Ensemble.predict``).
        model: a loaded one, or what ``load_model`` takes; None: that of `kitseg predict` without --model.
        output: the folder for ``<id>.nii.gz``, ``<id>.json`` and ``<id>.png``; for scans in files only.
        device: auto, cpu, cuda or mps; a loaded model has its own.

    Returns:
        A prediction for each scan; with ``output`` an outcome, which holds the label file, volumes in ml and flags.

    Raises:
        KitsegError: a scan can't be used; with ``output``, after the others are done. UsageError: not files there.
    """
    if output is not None and not all(isinstance(scan, Path | str) for scan in _several(scans)):
        raise UsageError("with output, scans are files or folders; without it, images, too: save prediction.image")
    if not isinstance(model, Ensemble):
        model = load_model(model or choose_model(Path("runs")), device)
    if output is None:
        return [model.predict(scan) for image in _several(scans) for scan in _scans(image)]
    from kitseg.commands.predict import PredictOptions, PredictScans

    found = find_scans([Path(path) for path in _several(scans)])
    work = PredictScans(lambda: model, Path(output), PredictOptions(choices=found.choices))
    outcomes = work(found.cases, Share(), lambda _: None, lambda _: None)
    _raise_if([outcome.error for outcome in outcomes])
    return outcomes


def evaluate(
    prediction: Image | Prediction,
    reference: Image,
    affine: ArrayLike | None = None,
    protocol: str = "kits19",
    scheme: Labels = None,
) -> CaseScore:
    """Score a label map against a reference.

    Args:
        prediction: a ``Prediction``, a NIfTI file, an array or an image.
        reference: the same kinds.
        affine: (4, 4), of arrays; that of the other label map where it is None.
        protocol: the challenge whose rules apply, kits19, kits21 or kits23.
        scheme: of the label maps, see ``labels.find_scheme``; None: the protocol's, or its record's of a prediction.

    Returns:
        Dice, surface Dice, distances in mm and volume errors by class, and the tumors found.

    Raises:
        InputError: a label map can't be used, or they lie on different grids. UsageError: no such protocol.
    """
    from kitseg.commands.evaluate import rules
    from kitseg.scoring.case import score

    by = rules(protocol, None if scheme is None else find_scheme(scheme))
    if affine is None and isinstance(prediction, np.ndarray) and not isinstance(reference, np.ndarray):
        affine = _labels(reference, None, by.scheme).native.affine
    found = _labels(prediction, affine, None, by.scheme)
    truth = _labels(reference, found.native.affine if affine is None else affine, by.scheme)
    check_grid(Path(found.case_id), found.geometry, truth.geometry, "the reference")
    return score(found.array, truth.array, truth.geometry.spacing, by.protocol, by.scheme)


def measure(
    labels: Image | Prediction, affine: ArrayLike | None = None, ct: Image | None = None, scheme: Labels = None
) -> Findings:
    """Kidneys and lesions of a label map, in mm and ml; with the CT also in HU.

    Args:
        labels: a ``Prediction``, a NIfTI file, an array or an image.
        affine: (4, 4), of arrays.
        ct: the scan on the same grid: a file, an array or an image.
        scheme: of the label map, see ``labels.find_scheme``; None: of a file see ``scheme_beside``, else kits23.

    Raises:
        InputError: a file or an array can't be used, or they lie on different grids.
    """
    from kitseg.measurement.measure import measure as measure_labels

    found = _labels(labels, affine, scheme)
    if ct is None:
        return measure_labels(found.array, found.geometry)
    scan = scan_from(ct, found.native.affine if affine is None else affine)
    check_grid(Path(found.case_id), found.geometry, scan.geometry)
    return measure_labels(found.array, found.geometry, scan.array)


def after_surgery(
    labels: Image | Prediction, patient: Patient, affine: ArrayLike | None = None, scheme: Labels = None
) -> AfterSurgery | None:
    """Kidney function after radical and partial nephrectomy of the kidney with the largest tumor; see ``measure``.

    patient: eGFR before surgery, age and diabetes.

    Returns:
        New baseline GFR with its 90 % interval, and what a resection takes; None without a tumor or two kidneys.
    """
    from kitseg.measurement.renal_function import after_surgery as predict_function

    found = _labels(labels, affine, scheme)
    return predict_function(measure(found), patient, found.array, found.geometry)


def nephrometry(
    labels: Image | Prediction, affine: ArrayLike | None = None, scheme: Labels = None
) -> Nephrometry | None:
    """R.E.N.A.L., PADUA and C-index of the largest tumor; None without a tumor in a kidney. See ``measure``."""
    from kitseg.measurement import nephrometry as scores

    found = _labels(labels, affine, scheme)
    return scores.nephrometry(found.array, found.geometry, measure(found))


def preprocess(
    data: FilePath | Sequence[FilePath], method: Method | FilePath, to: FilePath, jobs: int = -1
) -> list[Stored]:
    """Resample cases to the grids of a method; finished and unchanged ones stay.

    Args:
        data: folders of cases.
        method: from ``load_method``, or what it takes.
        to: the folder for the preprocessed cases.
        jobs: cases at a time; -1: one a core.

    Raises:
        KitsegError: a case failed, after the others are done.
    """
    from kitseg.volumes.kits import find_cases

    cases = [case for folder in _several(data) for case in find_cases(Path(folder))]
    return _preprocess(cases, method if isinstance(method, Method) else load_method(method), to, jobs)


def train(
    method: FilePath,
    data: FilePath | Sequence[FilePath],
    folder: FilePath = ".",
    size: str = "paper",
    overrides: Sequence[str] = (),
    fold: int = 0,
    device: str = "auto",
) -> Path:
    """Train the stages of a method on a fold, or resume, as `kitseg train` does in ``folder`` with one process.

    Args:
        method: its name, or the path of its YAML file.
        data: folders of labelled cases.
        folder: gets ``preprocessed``, ``splits.json`` and ``runs``.
        size: one of the method's sizes.
        overrides: ``KEY=VALUE`` for any key of the configuration, such as ``stages.*.epochs=10``.
        fold: the outer fold.
        device: auto, cpu, cuda or mps.

    Returns:
        The run, which ``load_model`` takes.

    Raises:
        KitsegError: a case failed, the run there has another configuration, or its loss became NaN or infinite.
    """
    from kitseg.models.run_folder import Run
    from kitseg.runtime.device import Machine
    from kitseg.training.fit import fit
    from kitseg.training.plan import Start
    from kitseg.training.train import trainings_of_fold
    from kitseg.volumes.kits import labelled_cases

    configuration, to, machine = config.compose(str(method), size, overrides), Path(folder), Machine(device)
    run, store = Run(to / "runs" / f"{configuration['name']}-{size}"), to / "preprocessed"
    begin = Start(configuration, run, fold, to / "splits.json", store, machine)
    begin.check()
    with console.silent():
        cases = labelled_cases([Path(folder) for folder in _several(data)])
        _preprocess(cases, begin.method, store, -1)
        plan = begin.claim(cases, -1)
        for training in trainings_of_fold(plan, cases, -1, lambda _: None):
            fit(training, machine)
    return run.path


def _preprocess(cases: Sequence[Case], method: Method, to: FilePath, jobs: int) -> list[Stored]:
    from kitseg.commands import preprocess as steps

    stored = steps.preprocess(cases, steps.method_grids(method), Path(to), method.labels, jobs, lambda _: None)
    _raise_if([one.error for one in stored])
    return stored


def _several(given: Any) -> list[Any]:
    return list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]


def _scans(image: Image) -> Iterable[Volume]:
    return map(read_scan, find_scans([Path(image)]).cases) if isinstance(image, Path | str) else [scan_from(image)]


def _labels(labels: Image | Prediction, affine: ArrayLike | None, scheme: Labels, usual: Labels = None) -> Volume:
    if isinstance(labels, Prediction):
        return Volume(labels.canonical, labels.proba.geometry, labels.proba.native, labels.proba.case_id)
    if isinstance(labels, Volume):
        return labels
    beside = scheme_beside(Path(labels)) if isinstance(labels, Path | str) else None
    return labels_from(labels, affine, find_scheme(scheme or beside or usual or "kits23"))


def _raise_if(errors: Sequence[str]) -> None:
    if failed := [error for error in errors if error]:
        raise KitsegError("; ".join(failed))
