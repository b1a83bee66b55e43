"""Kidney function after surgery: hand-checked formulas, and the command on label maps with KiTS's clinical data."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from conftest import kitseg
from shapes import Ellipsoid, ball, lattice, paint

import kitseg as library
from kitseg.commands.renal_function import eligible, new_baseline, patients_of
from kitseg.labels import KIDNEY, TUMOR
from kitseg.measurement.gfr_study import auc, conformal, study
from kitseg.measurement.renal_function import PARTIAL, RADICAL, Patient, from_clinic, from_volume
from kitseg.measurement.resection import parenchyma_lost
from kitseg.volumes.tables import Clinical, Egfr

KIDNEYS = (Ellipsoid((60, 0, 0), (25, 25, 50), KIDNEY), Ellipsoid((-60, 0, 0), (25, 25, 40), KIDNEY))


def test_formulas_by_hand() -> None:
    assert from_volume(80, 0.6, RADICAL) == pytest.approx(1.24 * 80 * 0.6)
    assert from_volume(80, 0.6, PARTIAL) == pytest.approx(71.2)
    assert from_clinic(Patient(80, 60), 40, PARTIAL) == pytest.approx(35 + 52 - 15)
    assert from_clinic(Patient(80, 60, diabetes=True), 71, RADICAL) == pytest.approx(35 + 52 - 15 - 18 + 3 - 2)


@pytest.mark.parametrize("spacing", [(1.0, 0.9, 0.9), (5.0, 0.9, 0.9)])
def test_parenchyma_within_a_margin(spacing: tuple[float, float, float]) -> None:
    geometry = lattice(spacing=spacing, size=(90, 90, 90), degrees=(0, 0, 10))
    labels = paint(geometry, ball((0, 0, 0), 42, KIDNEY), ball((2, 3, 4), 12))
    shells = [4 / 3 * np.pi * ((12 + mm) ** 3 - 12**3) / 1000 for mm in (2, 5, 10)]
    assert parenchyma_lost(labels, geometry, labels == TUMOR) == pytest.approx(shells, rel=0.05)
    assert parenchyma_lost(labels, geometry, labels == 9) == (0, 0, 0)


def test_a_patient_from_python(tmp_path: Path) -> None:
    geometry = lattice()
    labels = paint(geometry, *KIDNEYS, ball((90, 0, 0), 15))
    found = library.after_surgery(labels, Patient(egfr=120, age=60), geometry.affine)
    assert found is not None
    share = KIDNEYS[1].ml / (KIDNEYS[0].ml + KIDNEYS[1].ml)  # the tumor takes some of the right kidney
    assert found.side == "right"
    assert found.other_share == pytest.approx(share, abs=0.03)
    assert found.radical.volume == pytest.approx(1.24 * 90 * found.other_share)  # an eGFR above 90 counts as 90
    assert found.radical.both == (found.radical.volume + found.radical.clinical) / 2
    assert found.partial.low < found.partial.both < found.partial.high <= 90
    assert 0 < found.lost_ml[0] < found.lost_ml[1] < found.lost_ml[2]
    whole = labels == KIDNEY
    assert found.lost_gfr[2] == pytest.approx(90 * found.lost_ml[2] / (whole.sum() * geometry.voxel_ml))
    assert library.after_surgery(labels * (labels == KIDNEY), Patient(80, 60), geometry.affine) is None
    speck = paint(geometry, KIDNEYS[0], ball((90, 0, 0), 15), ball((-60, 0, 0), 6, KIDNEY))
    assert len(library.measure(speck, geometry.affine).kidneys) == 2
    assert library.after_surgery(speck, Patient(80, 60), geometry.affine) is None  # 0.9 ml are no second kidney


@pytest.mark.parametrize(("egfr", "age"), [(14.9, 60), (251, 60), (75, 17), (75, 121), (float("nan"), 60)])
def test_the_formulas_are_for_adults_with_some_function(egfr: float, age: float) -> None:
    with pytest.raises(ValueError, match="an eGFR within 15 and 250"):
        Patient(egfr, age)


def record(**values: object) -> Clinical:
    given = {"age_at_nephrectomy": 50.0, "last_preop_egfr": Egfr(70.0, 3), **values}
    return Clinical("case_00000", **given)  # type: ignore[arg-type]


def test_rules_of_inclusion() -> None:
    assert eligible(record()) == Patient(70, 50)
    assert eligible(record(last_preop_egfr=Egfr(">=90", 3))) == Patient(90, 50)
    assert eligible(record(comorbidities={"uncomplicated_diabetes_mellitus": True})) == Patient(70, 50, diabetes=True)
    for missing in (None, Egfr(None), Egfr("age<16", 3), Egfr(14.0, 3)):
        assert eligible(record(last_preop_egfr=missing)) is None
    assert eligible(record(age_at_nephrectomy=17.0)) is None
    first, last = Egfr(40.0, 100), Egfr(50.0, 250)
    assert new_baseline(record(first_postop_egfr=first, last_postop_egfr=last)) == 50  # 70 days from day 180, not 80
    assert new_baseline(record(first_postop_egfr=Egfr(40.0, 29), last_postop_egfr=Egfr(50.0, 731))) is None
    assert new_baseline(record(first_postop_egfr=Egfr(">=90", 30))) == 90


def test_predictions_by_the_challenges_name_are_of_their_patients(tmp_path: Path) -> None:
    row = {"case_id": "case_00007", "age_at_nephrectomy": 50, "last_preop_egfr": {"value": 70.0}}
    (tmp_path / "kits.json").write_text(json.dumps([row]))
    assert patients_of(["other", "prediction_00007"], [tmp_path], None) == {"prediction_00007": Patient(70, 50)}


def test_statistics_by_hand() -> None:
    assert conformal(np.arange(1.0, 20.0)) == 18  # the ⌈20 × 0.9⌉-th of 19
    assert conformal(np.array([3.0, 1.0])) == 3
    assert auc(np.array([40.0, 44, 45, 80]), np.array([30.0, 60, 50, 70])) == 0.75
    assert np.isnan(auc(np.array([50.0, 60]), np.array([1.0, 2])))
    measured = np.linspace(30, 80, 24)
    radical = np.arange(24) < 12
    found = study(measured, radical, measured + 4, measured - 2)
    assert found is not None
    assert found.agreement("both").bias == pytest.approx(1)
    assert found.agreement("fitted", radical).error == pytest.approx(0, abs=1e-9)
    assert found.differences("both", "volume")["error"].value == pytest.approx(-3)
    assert found.half_width == pytest.approx((1, 1))
    assert study(measured, measured > 75, measured, measured) is None


def test_the_command(tmp_path: Path) -> None:
    geometry = lattice("RAS", spacing=(8, 6, 6))
    rows = []
    for n in range(21):
        case = f"case_{n:05d}"
        (tmp_path / "data" / case).mkdir(parents=True)
        other = [] if n else [ball((-90, 0, 0), 10)]
        labels = paint(geometry, *KIDNEYS, ball((90, 0, 0), 12 + n % 7), *other)
        nibabel.save(nibabel.Nifti1Image(labels, geometry.affine), tmp_path / "data" / case / "segmentation.nii.gz")
        surgery = "radical_nephrectomy" if n % 2 else "partial_nephrectomy"
        after = {"value": 40.0 + n, "days_before_nephrectomy": 90}
        before = {"value": 60.0 + n, "days_before_nephrectomy": 9}
        ages = {"case_id": case, "age_at_nephrectomy": 40 + n}
        rows.append({**ages, "surgical_procedure": surgery, "last_preop_egfr": before, "first_postop_egfr": after})
    one = kitseg(tmp_path, "measure", "data/case_00000/segmentation.nii.gz", "--egfr=75", "--age=60", "--json=one.json")
    assert one.code == 0, one.text
    assert "90 %" in one.text
    assert "The other kidney has a tumor too" in one.text
    (found,) = json.loads((tmp_path / "one.json").read_text())["cases"].values()
    assert found["after_surgery"]["partial"]["volume"] == pytest.approx(66.75)
    assert found["after_surgery"]["patient"] == {"egfr": 75, "age": 60, "diabetes": False}
    paged = kitseg(tmp_path, "report", "data/case_00000/segmentation.nii.gz", "--egfr=75", "--age=60", "-o", "pages")
    assert paged.code == 0, paged.text
    page = (tmp_path / "pages" / "case_00000.html").read_text()
    assert "Function after surgery on the right kidney" in page
    assert "Labels without cysts: they count as kidney" in " ".join(one.text.split())
    assert "The other kidney has a tumor too" in page
    assert '<th scope="row">partial nephrectomy</th><td>67</td>' in page
    lost, cost = (found["after_surgery"][name][1] for name in ("lost_ml", "lost_gfr"))
    assert f'<th scope="row">5 mm</th><td>{lost:.0f}</td><td>{cost:.1f}</td>' in page
    for options, problem in (
        (["--egfr=75"], "both --egfr and --age"),
        (["--egfr=75", "--age=600"], "an age within 18 and 120"),
        (["--egfr=9", "--age=60"], "--egfr 9, --age 60: the formulas are for an eGFR within 15"),
    ):
        refused = kitseg(tmp_path, "measure", "data/case_00000/segmentation.nii.gz", *options)
        assert refused.code == 2
        assert problem in " ".join(refused.text.split())
    assert "describe one patient" in kitseg(tmp_path, "measure", "data", "--egfr=75", "--age=60").text
    assert "94 patients of KiTS19" in page
    assert "94 patients of KiTS19" in " ".join(one.text.split())
    rows[20]["last_preop_egfr"] = None
    (tmp_path / "data" / "kits.json").write_text(json.dumps(rows))
    study = kitseg(tmp_path, "measure", "data", "--jobs=1", "--calibration=plot.png")
    assert study.code == 0, study.text
    assert "radical (10)" in study.text
    assert "partial (10)" in study.text
    assert "an eGFR and an age: case_00020" in " ".join(study.text.split())
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
