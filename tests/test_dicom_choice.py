"""The choice of the series of a study to segment, and its table."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path

import numpy as np
import pytest
from dicom_files import AXIAL, WORDS, hu, uid, write_series
from pydicom.uid import SecondaryCaptureImageStorage

from kitseg.errors import UsageError
from kitseg.volumes.dicom.choice import SeriesChoice, choose_series, write_series_table
from kitseg.volumes.dicom.series import find_series

CORONAL = AXIAL[:, [1, 0, 2, 3]]


def add(folder: Path, seed: int, slices: int = 16, mm: float = 10.0, **tags: object) -> list[Path]:
    """A small series of a study with that many slices so far apart."""
    there = AXIAL @ np.diag([mm / 2.5, 1, 1, 1])
    return write_series(folder / f"{seed}", hu((slices, 2, 2)), there, seed, SliceThickness=str(mm), **tags)


def choose(folder: Path, *wanted: str) -> dict[int, SeriesChoice]:
    """The choices by the seeds of their series."""
    choices = choose_series(find_series(folder), wanted)
    return {n: choice for choice in choices for n in range(1, 20) if choice.series.uid == uid(f"series {n}")}


BETTER_FIRST = {
    "contrast": ({"ContrastBolusAgent": "APPLIED"}, {}, "has contrast"),
    "a soft kernel": ({"ConvolutionKernel": "Br38f"}, {"ConvolutionKernel": ["Br64f", "3"]}, "soft-tissue kernel"),
    "a soft kernel of GE": ({"ConvolutionKernel": "STANDARD"}, {"ConvolutionKernel": "LUNG"}, "soft-tissue kernel"),
    "thinner slices": ({"slices": 32, "mm": 5.0}, {}, "thinner slices"),
    "coverage before thinness": ({}, {"mm": 1.0}, "covers 150 mm or more"),
    "more coverage": ({"slices": 18}, {}, "covers more"),
    "original": ({}, {"ImageType": ["DERIVED", "SECONDARY", "REFORMATTED"]}, "is original"),
    "the abdomen": ({"BodyPartExamined": "ABDOMEN"}, {"BodyPartExamined": "HEAD", "ContrastBolusAgent": "X"}, "body"),
    "the trunk": ({"BodyPartExamined": "NECKCHESTABDPELV"}, {"BodyPartExamined": "NECK"}, "body"),
    "arterial": ({"SeriesDescription": "Abd arteriell"}, {"SeriesDescription": "Abd portal venous"}, "earlier"),
    "venous": ({"SeriesDescription": "Abd portal venous"}, {"SeriesDescription": "delayed 10 min"}, "earlier"),
    "not native": (
        {"SeriesDescription": "portal venous"},
        {"SeriesDescription": "nativ", "ContrastBolusAgent": "X"},
        "has contrast",
    ),
    "not native, although thicker": (
        {"SeriesDescription": "Abd 5.0"},
        {"SeriesDescription": "Abd nativ 1.0", "ContrastBolusAgent": "X", "slices": 32, "mm": 5.0},
        "is not stated to be without contrast",
    ),
    **{
        f"named {words}": ({"SeriesDescription": f"ABD {words} 5.0", "ContrastBolusAgent": "X"}, {}, "has contrast")
        for words in ("W WO CONTRAST", "w/wo", "with and without", "w & w/o", "mit und ohne KM")
    },
}


@pytest.mark.parametrize("name", BETTER_FIRST)
def test_what_is_preferred(tmp_path: Path, name: str) -> None:
    better, worse, fact = BETTER_FIRST[name]
    for first in (1, 2):  # whichever comes first by name
        folder = tmp_path / str(first)
        add(folder, first, **better)
        add(folder, 3 - first, **worse)
        found = choose(folder)
        assert found[first].chosen
        assert not found[3 - first].chosen
        assert found[3 - first].reason.startswith(found[first].series.case_id)
        assert fact in found[3 - first].reason


@pytest.mark.parametrize(
    ("tags", "fact"),
    [
        ({"Modality": "MR"}, "not a CT (MR)"),
        ({"SOPClassUID": SecondaryCaptureImageStorage}, "not CT images (a screenshot or a report)"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "a scout"),
        ({"ImageType": ["DERIVED", "SECONDARY", "AXIAL", "MIP"]}, "computed from other slices (MIP)"),
        ({"slices": 9}, "only 9 slices"),
    ],
)
def test_what_is_never_taken_by_rule(tmp_path: Path, tags: dict[str, object], fact: str) -> None:
    add(tmp_path, 1, **tags)
    (choice,) = choose_series(find_series(tmp_path))
    assert not choice.chosen
    assert choice.reason == fact


def test_coronal_slices_are_not_taken(tmp_path: Path) -> None:
    write_series(tmp_path / "1", hu((40, 4, 4)), CORONAL, 1, ContrastBolusAgent="X")
    add(tmp_path, 2)
    found = choose(tmp_path)
    assert found[1].reason == "coronal, not axial"
    assert found[2].chosen


def test_one_of_each_study(tmp_path: Path) -> None:
    for n in (1, 2, 3, 4):
        add(tmp_path, n, study=f"study {n // 3}", slices=12 + 2 * n)
    assert {n for n, choice in choose(tmp_path).items() if choice.chosen} == {2, 4}


def test_a_series_with_a_gap_loses_but_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    for path in add(tmp_path, 1, ContrastBolusAgent="X")[4:6]:
        path.unlink()
    alone = choose(tmp_path)[1]
    assert alone.chosen  # so that the error is reported when it is read
    assert "2 slices are missing" in alone.reason
    add(tmp_path, 2)
    found = choose(tmp_path)
    assert found[2].chosen
    assert "2 slices are missing" in found[1].reason


def test_a_series_that_is_asked_for(tmp_path: Path) -> None:
    for n in (1, 2, 3):
        add(tmp_path, n, slices=16 + n)
    assert choose(tmp_path)[3].chosen
    for name in (uid("series 1"), choose(tmp_path)[1].series.case_id):
        found = choose(tmp_path, name)
        assert [found[n].chosen for n in (1, 2, 3)] == [True, False, False]
        assert found[3].reason == "not selected with --series"
    with pytest.raises(UsageError, match=r"--series 1\.2\.3: .*series_.*19 slices 10 mm apart"):
        choose(tmp_path, "1.2.3")


def test_the_table(tmp_path: Path) -> None:
    add(tmp_path / "Zwiebelfisch", 1, ConvolutionKernel="Br38f", ContrastBolusAgent="Zwiebelfisch 120 ml")
    strange = {"ConvolutionKernel": "Quacksalber^K", "Modality": "PID-4711-XYZ", "BodyPartExamined": "ALIAS-99"}
    with warnings.catch_warnings(action="ignore"):  # pydicom doesn't like these values either
        add(tmp_path / "Zwiebelfisch", 2, **strange)
    choices = choose_series(find_series(tmp_path))
    write_series_table(tmp_path / "series.csv", choices)
    with (tmp_path / "series.csv").open() as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    assert len(rows) == 2
    (row,) = [row for row in rows.values() if row["chosen"] == "yes"]
    assert row["reason"].endswith("CT of its study: 16 slices 10 mm apart, with contrast")
    assert (row["files"], row["slice_mm"], row["coverage_mm"], row["kernel"]) == ("16", "10", "160", "Br38f")
    written = (tmp_path / "series.csv").read_bytes()
    for secret in (*WORDS, b"1.2.", str(tmp_path).encode()):
        assert secret not in written, secret


def test_the_table_with_identifiers(tmp_path: Path) -> None:
    add(tmp_path, 1)
    write_series_table(tmp_path / "series.csv", choose_series(find_series(tmp_path)), identifiers=True)
    with (tmp_path / "series.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["series_uid"] == uid("series 1")
    assert row["patient_id"] == "PID-4711-XYZ"
    assert row["folder"] == str(tmp_path / "1")


@pytest.mark.parametrize(("unit", "text"), [("MGML", " (MGML)"), ("Zwiebelfisch H", "")])
def test_other_units_are_not_taken(tmp_path: Path, unit: str, text: str) -> None:
    write_series(tmp_path, hu(), RescaleType=unit, ConvolutionKernel="Zwiebel")
    (choice,) = choose_series(find_series(tmp_path))
    assert (choice.chosen, choice.reason) == (False, f"the values are not HU{text}")
    write_series_table(tmp_path / "series.csv", [choice])
    assert "zwiebel" not in (tmp_path / "series.csv").read_text().lower()
