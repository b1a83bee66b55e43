"""Intervals of volumes and diameters: hand-checked ranks, coverage, and the way from evaluate to measure and report."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from conftest import kitseg
from scipy.stats import binomtest
from shapes import Ellipsoid, ball, lattice, paint

from kitseg.commands.evaluate import Job, rules
from kitseg.commands.intervals import case_errors, read_intervals, write_intervals
from kitseg.commands.measure import NO_RECORD, measure_case, plan_measures, write_lesion_table
from kitseg.labels import KIDNEY, KITS19
from kitseg.measurement.intervals import Calibration, ErrorRange, SizeError, calibrate
from kitseg.runtime.files import file_digest
from kitseg.volumes.nifti import CORRECTED_MARK, read_labels, write_labels

GEOMETRY = lattice(spacing=(3.0, 2.0, 2.0), size=(160, 70, 90))
KIDNEYS = (Ellipsoid((45, -8, 6), (20, 18, 30), KIDNEY), Ellipsoid((-45, -8, 6), (20, 18, 30), KIDNEY))


def save(path: Path, radius: float) -> None:
    path.parent.mkdir(exist_ok=True)
    labels = paint(GEOMETRY, *KIDNEYS, ball((52, -8, 20), radius))
    nibabel.save(nibabel.Nifti1Image(labels, GEOMETRY.affine), path)


@pytest.mark.parametrize(("count", "low", "high"), [(19, 0, 18), (38, 0, 37), (39, 1, 37), (99, 4, 94)])
def test_the_bounds_are_ordered_errors(count: int, low: int, high: int) -> None:
    errors = [[SizeError("tumor diameter_mm", 30.0 + n, float(n))] for n in reversed(range(count))]
    found = calibrate(errors, [3.0] * count).quantities["tumor diameter_mm"]
    assert (found.low_mm, found.high_mm, found.count) == (low, high, count)
    assert found.predicted_mm == (30, 29 + count)


def test_patients_are_counted_not_their_errors() -> None:
    def bounds(*patients: tuple[float, ...]) -> tuple[float, float, int] | None:
        cases = [[SizeError("cyst axial_mm", 9.0, error) for error in errors] for errors in patients]
        found = calibrate(cases, [3.0] * len(cases)).quantities.get("cyst axial_mm")
        return found and (found.low_mm, found.high_mm, found.patients)

    assert bounds(*[(0.0, 1.0)] * 10) is None  # 20 errors, of ten patients
    assert bounds((-50.0,) * 100, *((float(n),) for n in range(38))) == (0, 36, 39)  # the second of 39 from either end
    assert bounds(*((n - 0.1, n + 0.1) for n in range(39))) == pytest.approx((0.9, 37.1, 39))
    halves = [[SizeError("cyst axial_mm", 9.0, float(n))] for n in range(20)]
    assert calibrate(halves, [3.0] * 20, [f"p{n // 2}" for n in range(20)]).quantities == {}


def test_too_few_errors_and_other_cases_have_no_interval() -> None:
    errors = [[SizeError("tumor diameter_mm", 30.0, n / 10), SizeError("cyst axial_mm", 9.0, 1.0)] for n in range(19)]
    found = calibrate([*errors[:-1], errors[-1][:1]], [1.0, 5.0])
    assert list(found.quantities) == ["tumor diameter_mm"]
    assert found.interval("diameter_mm", "tumor", 30.5, 3.0) == pytest.approx((30.5, 32.3))
    for name, kind, value, slice_mm in (
        ("axial_mm", "cyst", 9.0, 3.0),  # too few
        ("diameter_mm", "tumor", 33.0, 3.0),  # larger
        ("diameter_mm", "tumor", 28.0, 3.0),  # smaller
        ("diameter_mm", "tumor", 30.0, 8.0),  # thicker slices
    ):
        assert found.interval(name, kind, value, slice_mm) is None


def test_the_intervals_cover_nine_of_ten() -> None:
    """Made-up errors, skewed and biased: a thousand times 40 to calibrate, and a new one."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(1000):
        errors = rng.gamma(2, 1.5, 41) - 2
        found = calibrate([[SizeError("tumor diameter_mm", 30.0, error)] for error in errors[1:]], [3.0])
        known = found.quantities["tumor diameter_mm"]
        covered += bool(known.low_mm <= errors[0] <= known.high_mm)
    interval = binomtest(covered, 1000).proportion_ci(0.95)
    assert interval.low <= 37 / 41 <= interval.high  # ranks 2 and 39 of 40


def test_from_evaluate_to_measure_and_report(tmp_path: Path) -> None:
    for n in range(20):
        save(tmp_path / "ref" / f"p{n:02d}.nii.gz", 11)
        save(tmp_path / "pred" / f"p{n:02d}.nii.gz", 10 if n else 12)
    done = kitseg(tmp_path, "evaluate", "pred", "ref", "--intervals=i.json", "--jobs=1")
    assert done.code == 0, done.text
    assert "90% intervals from 20 cases" in done.text
    ranges = json.loads((tmp_path / "i.json").read_text())["quantities"]
    assert (ranges["tumor volume_ml"]["low_mm"], ranges["tumor volume_ml"]["high_mm"]) == pytest.approx(
        (-2, 2), abs=0.3
    )
    assert ranges["kidney parenchyma_ml"]["count"] == 40
    assert ranges["kidney parenchyma_ml"]["patients"] == 20
    measured = kitseg(tmp_path, "measure", "pred/p01.nii.gz", "--intervals=i.json", "--json=m.json", "--csv=m.csv")
    assert measured.code == 0, measured.text
    (lesion,) = json.loads((tmp_path / "m.json").read_text())["cases"]["p01"]["lesions"]
    low, high = lesion["intervals"]["volume_ml"]
    assert low < 4 / 3 * np.pi * 1.1**3 < high
    with (tmp_path / "m.csv").open() as file:
        row = next(row for row in csv.DictReader(file) if row["kind"] == "tumor")
    assert [float(row["volume_ml_low"]), float(row["volume_ml_high"])] == [low, high]
    save(tmp_path / "large.nii.gz", 17)
    assert "(?)" in kitseg(tmp_path, "measure", "large.nii.gz", "--intervals=i.json").text
    assert kitseg(tmp_path, "report", "pred/p01.nii.gz", "--intervals=i.json", "-o", "pages", "--jobs=1").code == 0
    assert f"{low:.1f} to {high:.1f}</small>" in (tmp_path / "pages" / "p01.html").read_text()
    click = {"x": 1.0, "y": 2.0, "z": 3.0, "label": "tumor"}
    record = {"schema": 4, "note": "corrected by a person", "corrected": [click]}
    (tmp_path / "pred" / "p01.json").write_text(json.dumps(record))
    for command in (("measure", "--json=m.json"), ("report", "-o", "pages", "--jobs=1")):
        name, *options = command
        again = kitseg(tmp_path, name, "pred/p01.nii.gz", "--intervals=i.json", "--overwrite", *options)
        assert again.code == 0, again.text
    assert "intervals" not in (tmp_path / "m.json").read_text()
    assert "90 % intervals" not in (tmp_path / "pages" / "p01.html").read_text()


def test_labels_that_were_changed_have_no_intervals_and_calibrate_none(tmp_path: Path) -> None:
    """By a person without the record, or by another program beside it."""
    bounds = ErrorRange(-1.0, 1.0, 19, (1.0, 99.0), 19)
    calibration = Calibration(0.9, 19, (0.5, 9.0), {"tumor volume_ml": bounds})
    for name in ("alone", "kept", "edited"):
        save(tmp_path / f"{name}.nii.gz", 11)
    labels = read_labels(tmp_path / "alone.nii.gz", "alone")
    write_labels(tmp_path / "alone.nii.gz", labels.array, labels.native, CORRECTED_MARK)
    for name, digest in (("kept", file_digest(tmp_path / "kept.nii.gz")), ("edited", "0" * 64)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"schema": 4, "labels_sha256": digest}))
    found = {}
    for name in ("alone", "kept", "edited"):
        (task,) = plan_measures(tmp_path / f"{name}.nii.gz", None)
        found[name] = measure_case(task, None, calibration=calibration)
    assert {name: bool(one.intervals) for name, one in found.items()} == {"alone": False, "kept": True, "edited": False}
    assert [one.origin for one in found.values()] == [
        "corrected by a person", "", "changed since its record was written",
    ]  # fmt: skip
    assert NO_RECORD not in found["kept"].doubts
    write_lesion_table(tmp_path / "m.csv", [found["alone"]])
    with (tmp_path / "m.csv").open() as file:
        assert {row["note"] for row in csv.DictReader(file)} == {"corrected by a person"}
    (tmp_path / "kept.json").unlink()
    (task,) = plan_measures(tmp_path / "kept.nii.gz", None)
    assert NO_RECORD in measure_case(task, None, calibration=calibration).doubts
    of_kits19 = rules("kits19", KITS19)
    for name, why in (("alone", "corrected by a person"), ("edited", "changed since"), ("kept", "")):
        job = Job(name, prediction=tmp_path / f"{name}.nii.gz", reference=tmp_path / "kept.nii.gz")
        errors = case_errors(job, of_kits19)
        assert (why in errors.error) if why else errors.errors, errors.error


def test_intervals_of_another_models_errors_are_stated(tmp_path: Path) -> None:
    save(tmp_path / "a.nii.gz", 11)

    def labelled_by(*paths: str) -> None:
        record = {"schema": 4, "models": [{"path": path, "folds": [n]} for n, path in enumerate(paths)]}
        (tmp_path / "a.json").write_text(json.dumps(record))

    def doubts() -> list[str]:
        (task,) = plan_measures(tmp_path / "a.nii.gz", None)
        found = measure_case(task, None, calibration=replace(calibration, quantities={"tumor volume_ml": bounds}))
        assert found.intervals
        return [doubt for doubt in found.doubts if "errors" in doubt]

    bounds, job = ErrorRange(-1.0, 1.0, 19, (1.0, 99.0), 19), Job("a", tmp_path / "a.nii.gz", tmp_path / "a.nii.gz")
    labelled_by("runs/mine", "/elsewhere/runs/mine")
    calibration = write_intervals(tmp_path / "intervals.json", [case_errors(job, rules("kits19", KITS19))], {})
    assert calibration is not None
    assert calibration == read_intervals(tmp_path / "intervals.json")
    assert (calibration.models, doubts()) == (("mine",), [])
    labelled_by("mine.kitseg")
    assert doubts() == []
    labelled_by("builtin.kitseg")
    assert doubts() == ["the intervals are of the errors of mine, the labels are of builtin"]
    calibration = replace(calibration, models=())  # of an earlier version
    assert doubts() == []


def test_cases_that_were_learned_from_and_bad_files_are_left_out(tmp_path: Path) -> None:
    save(tmp_path / "ref" / "a.nii.gz", 11)
    save(tmp_path / "pred" / "a.nii.gz", 11)
    (tmp_path / "pred" / "a.json").write_text('{"schema": 4, "learned_from": ["run"]}')
    done = kitseg(tmp_path, "evaluate", "pred", "ref", "--intervals=i.json", "--jobs=1")
    assert "left out of the intervals: its networks learned from this scan" in done.text
    assert not (tmp_path / "i.json").exists()
    (tmp_path / "i.json").write_text("{}")
    bad = kitseg(tmp_path, "measure", "pred/a.nii.gz", "--intervals=i.json")
    assert (bad.code, "kitseg evaluate --intervals" in bad.text) == (1, True)
    assert kitseg(tmp_path, "measure", "pred/a.nii.gz", "--intervals=pred").code == 2
