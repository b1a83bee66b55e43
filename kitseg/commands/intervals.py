"""Intervals for measurements: from predictions and references to a file, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from kitseg.commands.case_record import (
    correction_beside,
    describe_learning,
    recorded_learning,
    recorded_models,
    scheme_beside,
)
from kitseg.commands.evaluate import Job, Rules
from kitseg.errors import UsageError, format_error
from kitseg.measurement.intervals import Calibration, SizeError, calibrate, size_errors
from kitseg.measurement.measure import measure
from kitseg.models.run_folder import find_run
from kitseg.runtime.provenance import FileFormat
from kitseg.volumes.nifti import read_labels
from kitseg.volumes.references import read_reference
from kitseg.volumes.scan import check_grid

INTERVALS = "intervals.json"
_FORMAT = FileFormat(Calibration, 1, "Make it with `kitseg evaluate --intervals`, or with `kitseg validate RUN`.")


@dataclass(frozen=True)
class CaseErrors:
    """A case's errors, slice distance and models, or why it has none."""

    case: str
    errors: tuple[SizeError, ...] = ()
    slice_mm: float = 0.0
    error: str = ""
    models: tuple[str, ...] = ()


def case_errors(job: Job, rules: Rules) -> CaseErrors:
    """Measure a case's prediction and its reference; never raises."""
    try:
        if job.prediction is None:
            return CaseErrors(job.case, error=f"{job.case}: left out of the intervals: no prediction")
        if learned := recorded_learning(job.prediction):
            return CaseErrors(job.case, error=f"{job.case}: left out of the intervals: {describe_learning(learned)}")
        if changed := correction_beside(job.prediction):
            return CaseErrors(job.case, error=f"{job.case}: left out of the intervals: {changed}")
        truth = read_reference(job.reference, job.case, rules.scheme)
        found = read_labels(job.prediction, job.case, scheme_beside(job.prediction) or rules.scheme, strict=False)
        check_grid(job.prediction, found.geometry, truth.geometry, str(job.reference))
        adopt = partial(rules.protocol.adopt, scheme=rules.scheme)
        pred, ref = (measure(adopt(volume.array), volume.geometry) for volume in (found, truth))
        errors, models = tuple(size_errors(pred, ref, truth.geometry.affine)), recorded_models(job.prediction)
        return CaseErrors(job.case, errors, truth.geometry.spacing[0], models=models)
    except Exception as error:  # the other cases continue, whatever the error
        return CaseErrors(job.case, error=format_error(job.case, error))


def write_intervals(path: Path, cases: Sequence[CaseErrors], patients: Mapping[str, str]) -> Calibration | None:
    """Write the intervals of the cases that could be measured; None, and no file any more, without one.

    patients: whose case it is, where it isn't the patient's only one.
    """
    path.unlink(missing_ok=True)
    good = [case for case in cases if not case.error]
    if not good:
        return None
    whose = [patients.get(case.case, case.case) for case in good]
    found = calibrate([case.errors for case in good], [case.slice_mm for case in good], whose)
    found = replace(found, models=tuple(sorted({model for case in good for model in case.models})))
    _FORMAT.write(path, found)
    return found


def read_intervals(path: Path | None) -> Calibration | None:
    """Read a file of ``write_intervals``, or that of a validated run; None for None.

    Raises InputError: missing or damaged. UsageError: a folder that is not a run.
    """
    if path is None:
        return None
    if not path.is_dir():
        return _FORMAT.read(path)
    file = find_run(path)[0].validation(False) / INTERVALS
    if not file.exists():
        raise UsageError(f"{path} has no intervals. Make them with `kitseg validate {path}`")
    return _FORMAT.read(file)
