"""Expected Dice and calibrated probabilities: from predictions and references to a file, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from kitseg.commands.case_record import CaseRecord, correction_beside, record_beside, recorded_models
from kitseg.commands.evaluate import Job, Score
from kitseg.errors import UsageError
from kitseg.measurement.confidence import LEAST, Confidence, learn
from kitseg.models.run_folder import find_run
from kitseg.runtime.provenance import FileFormat
from kitseg.volumes.names import shorten

CONFIDENCE = "confidence.json"
_FORMAT = FileFormat(
    Confidence, 1, "Make it with `kitseg evaluate --confidence`, or with `kitseg validate RUN`.", 1 << 24
)


def write_confidence(
    path: Path, scored: Sequence[tuple[Job, Score]], patients: Mapping[str, str], temperature: float | None = None
) -> tuple[Confidence | None, list[str]]:
    """Learn from scored cases whose records hold signs; None, and no file any more, with too few of them.

    patients: whose case it is, where it isn't the patient's only one. Cases that a network learned from are left out,
    and label maps that were changed since they were predicted.

    Returns:
        What was learned, and why cases were left out: a line for each reason, with the cases.
    """
    path.unlink(missing_ok=True)
    good: list[tuple[str, CaseRecord, float]] = []
    models, others = set[str](), dict[str, list[str]]()
    for job, score in scored:
        record = _record_or_reason(job, score)
        if isinstance(record, str):
            others.setdefault(record, []).append(score.case)
        elif job.prediction:
            models.update(recorded_models(job.prediction))
            dice = score.classes["tumor"]["dice"]
            good.append((score.case, record, 1.0 if dice is None else dice))  # none where there is none
    left_out = [
        f"left out of the expected Dice, {why}: {len(cases)} of {len(scored)} cases ({shorten(cases)})"
        for why, cases in others.items()
        if why
    ]
    if len(good) < LEAST:
        return None, left_out
    found = learn(
        [record.signs for _, record, _ in good],
        np.array([dice for _, _, dice in good]),
        [record.quality for _, record, _ in good if record.quality],
        [patients.get(case, case) for case, _, _ in good],
        temperature,
    )
    if found:
        found = replace(found, models=tuple(sorted(models)))
        _FORMAT.write(path, found)
    return found, left_out


def _record_or_reason(job: Job, score: Score) -> CaseRecord | str:
    """The record of a scored case that can be learned from, or why it can't; "" where its scores already state that."""
    if job.prediction is None or score.error:
        return ""
    if score.learned_from:
        return "their networks learned from these scans"
    record = record_beside(job.prediction)
    if not (record and record.signs and record.quality and "tumor" in score.classes):
        return "without the signs that `kitseg predict` writes beside its labels"
    return correction_beside(job.prediction) or record


def read_confidence(path: Path | None) -> Confidence | None:
    """Read a file of ``write_confidence``, or that of a validated run; None for None.

    Raises InputError: missing or damaged. UsageError: a folder that is not a run, or without the file.
    """
    if path is None or not path.is_dir():
        return _FORMAT.read(path) if path else None
    file = find_run(path)[0].validation(False) / CONFIDENCE
    if not file.exists():
        raise UsageError(
            f"{path} has no {CONFIDENCE}, which takes {LEAST} cases. Make it with `kitseg validate {path}`"
        )
    return _FORMAT.read(file)
