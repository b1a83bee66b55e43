"""Tables beside the cases: which of them show the same patient, and the challenge's clinical data."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path

from kitseg.errors import InputError
from kitseg.runtime.provenance import FileFormat
from kitseg.volumes.names import clean_name

PATIENTS, CLINICAL = "patients.csv", "kits.json"


@dataclass(frozen=True)
class Egfr:
    """A record of eGFR in ml/min/1.73 m²: a number or a text such as ``>=90``, and the days to or from surgery."""

    value: float | str | None = None
    days_before_nephrectomy: int | None = None


@dataclass(frozen=True)
class Clinical:
    """A patient's record in ``kits.json``, under the file's own names; None where nothing is recorded."""

    case_id: str
    tumor_histologic_subtype: str | None = None
    surgical_procedure: str | None = None
    age_at_nephrectomy: float | None = None
    comorbidities: dict[str, bool | None] = field(default_factory=dict)
    last_preop_egfr: Egfr | None = None
    first_postop_egfr: Egfr | None = None
    last_postop_egfr: Egfr | None = None


_CLINICAL = FileFormat(list[Clinical], None, "Take it from the KiTS19 repository.")


def read_patients(path: Path) -> dict[str, str]:
    """Each case's patient from a table with the columns ``case`` and ``patient``; empty where there is no file.

    Columns are separated by commas, semicolons or tabs, and their names may have capitals.

    Raises:
        InputError: unreadable, other columns, or a case with two patients.
    """
    if not path.exists():
        return {}
    try:
        first, *lines = path.read_text(encoding="utf-8-sig").splitlines() or [""]
        mark = max(",;\t", key=first.count)
        columns = [column.strip().casefold() for column in next(csv.reader([first], delimiter=mark), [])]
        table = [dict(zip(columns, row, strict=False)) for row in csv.reader(lines, delimiter=mark) if any(row)]
        rows = [(clean_name(row["case"].strip()), row["patient"].strip()) for row in table]
    except UnicodeDecodeError as error:
        raise InputError(path, "is not UTF-8 text", "Save it as CSV in UTF-8.") from error
    except (OSError, KeyError, csv.Error) as error:
        raise InputError(path, "is not a table of cases", "It needs the columns case and patient.") from error
    if odd := sorted({case for case, patient in rows if not patient or (case, patient) not in dict(rows).items()}):
        raise InputError(path, f"gives no patient, or two, to {', '.join(odd)}", "Fix the file.")
    return dict(rows)


def read_records(path: Path) -> dict[str, Clinical]:
    """Each case's record in ``kits.json``, if there is one. Raises InputError: not a list of cases."""
    return {row.case_id: row for row in _CLINICAL.read(path)} if path.exists() else {}


def read_clinical(path: Path) -> dict[str, dict[str, str]]:
    """Each case's histology and surgery from ``kits.json``, if there is one. Raises InputError: not a list of cases."""
    names = {"histology": "tumor_histologic_subtype", "surgery": "surgical_procedure"}
    return {
        case: {name: group for name, column in names.items() if (group := getattr(row, column))}
        for case, row in read_records(path).items()
    }
