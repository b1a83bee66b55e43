"""Kidney function after surgery: patients from the command line or from KiTS's clinical data, and their comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from kitseg.commands.measure import Measured
from kitseg.errors import UsageError
from kitseg.measurement.gfr_study import Study, study
from kitseg.measurement.renal_function import CEILING, PARTIAL, RADICAL, Patient
from kitseg.volumes.names import pair
from kitseg.volumes.tables import CLINICAL, Clinical, Egfr, read_records

_OPERATIONS = {"radical_nephrectomy": RADICAL, "partial_nephrectomy": PARTIAL}
_DIABETES = ("uncomplicated_diabetes_mellitus", "diabetes_mellitus_with_end_organ_damage")
_WINDOW, _MIDDLE = (30, 730), 180  # days after surgery


def patient_of(egfr: float | None, age: float | None, diabetes: bool) -> Patient | None:
    """The patient of the options ``--egfr``, ``--age`` and ``--diabetes``; UsageError if one is missing or unusual."""
    if egfr is None and age is None and not diabetes:
        return None
    if egfr is None or age is None:
        raise UsageError("the function after surgery needs both --egfr and --age")
    try:
        return Patient(egfr, age, diabetes)
    except ValueError as error:
        raise UsageError(f"--egfr {egfr:g}, --age {age:g}: {error}") from error


def patients_of(cases: Sequence[str], folders: Sequence[Path], patient: Patient | None) -> dict[str, Patient]:
    """The patients of cases, as far as known: the one given, else those of ``kits.json`` in the folders, by number.

    Raises UsageError: one patient for several cases; InputError: ``kits.json`` can't be read.
    """
    if patient and len(cases) > 1:
        raise UsageError(f"--egfr and --age describe one patient, {folders[0]} holds {len(cases)} label maps")
    if patient:
        return dict.fromkeys(cases, patient)
    records = {case: record for folder in folders for case, record in clinical_records(folder).items()}
    known = {case: eligible(records[other]) for case, other in pair(cases, records).items()}
    return {case: found for case, found in known.items() if found}


def clinical_records(labels: Path) -> dict[str, Clinical]:
    """The patients of a folder in the KiTS layout; empty without its ``kits.json``."""
    return read_records(labels / CLINICAL) if labels.is_dir() else {}


def eligible(record: Clinical) -> Patient | None:
    """A patient with everything that the formulas need, by the rules in docs/explanation/renal_function.md."""
    egfr, age = _value(record.last_preop_egfr), record.age_at_nephrectomy
    if egfr is None or age is None:
        return None
    try:
        return Patient(egfr, age, any(record.comorbidities.get(name) for name in _DIABETES))
    except ValueError:
        return None


def new_baseline(record: Clinical) -> float | None:
    """The eGFR 30 to 730 days after surgery, nearest to day 180; None where none is recorded."""
    low, high = _WINDOW
    found = [
        (abs(egfr.days_before_nephrectomy - _MIDDLE), value)
        for egfr in (record.first_postop_egfr, record.last_postop_egfr)
        if egfr and egfr.days_before_nephrectomy is not None and low <= egfr.days_before_nephrectomy <= high
        if (value := _value(egfr)) is not None
    ]
    return min(found)[1] if found else None


def compare_formulas(results: Sequence[Measured], records: Mapping[str, Clinical]) -> Study | None:
    """The formulas against the patients' new baselines; None with fewer than ten patients of an operation."""
    rows, names = [], pair((result.case for result in results), records)
    for result in sorted(results, key=lambda result: result.case):
        record, found = records.get(names.get(result.case, "")), result.after_surgery
        operation = _OPERATIONS.get((record and record.surgical_procedure) or "")
        measured = new_baseline(record) if record else None
        if found and operation and measured is not None:
            predicted = found.radical if operation == RADICAL else found.partial
            rows.append((measured, operation == RADICAL, predicted.volume, predicted.clinical))
    if not rows:
        return None
    table = np.array(rows)
    return study(table[:, 0], table[:, 1].astype(bool), table[:, 2], table[:, 3])


def _value(egfr: Egfr | None) -> float | None:
    """A recorded eGFR; ``>=90`` is 90, values above are 90 too, and any other text counts as not recorded."""
    if egfr is None or egfr.value is None or (isinstance(egfr.value, str) and egfr.value != ">=90"):
        return None
    return min(float(egfr.value), CEILING) if not isinstance(egfr.value, str) else CEILING
