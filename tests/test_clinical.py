"""Measures of real label maps against the clinical records of the same patients (docs/explanation/measure.md).

By default on five small cases; on all 210 where KITSEG_ALL=1 (several minutes of one core), in KITSEG_JOBS processes.
``pytest -s`` prints the agreement.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from joblib import Parallel, delayed

from kitseg.commands.measure import MeasureTask, measure_case
from kitseg.labels import KITS19
from kitseg.measurement.findings import Findings

ALL = os.environ.get("KITSEG_ALL") == "1"
#: Few slices each. 30 and 88: tumors that leave little of their kidney; 194: one kidney.
SAMPLE = (24, 30, 88, 97, 194)
#: One kidney, and its side; 5 lies to the left of the spine as a whole, fused from two.
SINGLE = {5: "left", 165: "right", 194: "right"}
STAGES = ("1a", "1b", "2a", "2b")

Cases = Mapping[int, Findings]


@pytest.fixture(scope="module")
def cases(shared: Path) -> Cases:
    files = sorted((shared / "kits19").glob("case_*/segmentation.nii.gz"))
    assert len(files) == 210
    tasks = (MeasureTask(file.parent.name, file, None) for n, file in enumerate(files) if ALL or n in SAMPLE)
    jobs = int(os.environ.get("KITSEG_JOBS", "1"))
    found = Parallel(n_jobs=jobs)(delayed(measure_case)(task, KITS19) for task in tasks)
    assert not any(measured.error for measured in found)
    return {int(measured.case[-5:]): measured.findings for measured in found}


@pytest.fixture(scope="module")
def records(shared: Path) -> dict[int, dict[str, Any]]:
    rows = json.loads((shared / "kits19" / "kits.json").read_text())
    return {int(row["case_id"][-5:]): row for row in rows}


def agreement(cases: Cases, records: dict[int, dict[str, Any]], figure: str, size: str) -> dict[str, float]:
    """The largest lesion's diameter minus the recorded size, in cm."""
    measured = np.array([getattr(found.lesions[0], figure) / 10 for found in cases.values()])
    recorded = np.array([records[case][size] for case in cases], float)
    difference = measured - recorded
    bias, spread = difference.mean(), 1.96 * difference.std(ddof=1)
    figures = {
        "r": np.corrcoef(measured, recorded)[0, 1],
        "error": np.abs(difference).mean(),
        "median error": np.median(np.abs(difference)),
        "bias": bias,
        "low": bias - spread,
        "high": bias + spread,
    }
    print(f"\n{figure} against {size}:", ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
    return {name: float(value) for name, value in figures.items()}


def test_kidneys_and_their_sides(cases: Cases) -> None:
    for case, found in cases.items():
        expected = [SINGLE[case]] if case in SINGLE else ["right", "left"]
        assert [kidney.side for kidney in found.kidneys] == expected
        assert all(20 < kidney.parenchyma_ml <= kidney.volume_ml < 2500 for kidney in found.kidneys)


def test_every_lesion_is_plausible(cases: Cases) -> None:
    for found in cases.values():
        assert found.lesions
        for lesion in found.lesions:
            assert lesion.axial_mm <= lesion.diameter_mm * 1.001
            assert lesion.volume_ml <= np.pi / 6 * (lesion.diameter_mm + 5) ** 3 / 1000
            assert lesion.exophytic is not None
            assert 0 <= lesion.exophytic <= 1
            assert lesion.contact_mm2 is not None


def test_the_sample_is_near_its_records(cases: Cases, records: dict[int, dict[str, Any]]) -> None:
    for case in SAMPLE:
        assert cases[case].lesions[0].axial_mm / 10 == pytest.approx(records[case]["radiographic_size"], abs=1.5)


# --- all 210 cases ---------------------------------------------------------------------------------------------------

all_cases = pytest.mark.skipif(not ALL, reason="a figure of all 210 cases, which takes KITSEG_ALL=1")


@all_cases
@pytest.mark.parametrize(
    ("figure", "size", "r", "others"),
    [
        ("axial_mm", "radiographic_size", 0.967, {"error": 0.63, "bias": 0.42, "low": -1.15, "high": 1.98}),
        ("axial_mm", "pathologic_size", 0.919, {"error": 0.92, "bias": 0.47, "low": -2.03, "high": 2.98}),
        ("diameter_mm", "radiographic_size", 0.961, {"error": 1.12, "bias": 1.08, "low": -0.97, "high": 3.13}),
        ("diameter_mm", "pathologic_size", 0.919, {"error": 1.35, "bias": 1.13, "low": -1.64, "high": 3.91}),
    ],
)
def test_agreement_with_the_records(
    cases: Cases, records: dict[int, dict[str, Any]], figure: str, size: str, r: float, others: dict[str, float]
) -> None:
    found = agreement(cases, records, figure, size)
    assert found["r"] == pytest.approx(r, abs=0.0006)
    assert {name: found[name] for name in others} == pytest.approx(others, abs=0.006)


@all_cases
def test_size_class_and_pathology_stage(cases: Cases, records: dict[int, dict[str, Any]]) -> None:
    stages = {case: records[case]["pathology_t_stage"] for case in cases}
    table = Counter((stages[case], found.lesions[0].size_class) for case, found in cases.items())
    rows = [[table[stage, name] for name in ("T1a", "T1b", "T2a", "T2b")] for stage in STAGES]
    assert rows == [[76, 16, 0, 0], [4, 34, 3, 0], [0, 2, 5, 2], [0, 0, 0, 3]]
    assert Counter(stage for stage in stages.values() if stage not in STAGES) == {"3": 44, "0": 18, "4": 3}
