"""Nephrometry of painted kidneys with a sinus: every part, however the array lies in the patient, and with a tilt."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from conftest import kitseg
from shapes import ORIENTATIONS, Ellipsoid, ball, lattice, paint

import kitseg as library
from kitseg.labels import BACKGROUND, KIDNEY
from kitseg.measurement import body_axes
from kitseg.measurement.nephrometry import Nephrometry, _location

KIDNEY_AND_SINUS = (
    Ellipsoid((60, 0, 0), (27, 25, 55), KIDNEY),
    Ellipsoid((33, 0, 0), (17, 11, 20), BACKGROUND),  # opens towards the midline, from −20 to 20 mm
)
OTHER = Ellipsoid((-60, 0, 0), (27, 25, 55), KIDNEY)
SIZE = (200, 100, 130)


@pytest.fixture(autouse=True)
def _upright(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kidneys that don't lean back, so that levels can be checked by hand."""
    monkeypatch.setattr(body_axes, "_LEANING", 0.0)


def scores(
    *tumor: Ellipsoid, tilt: tuple[float, float, float] = (0, 0, 0), codes: str = "IPL", slices: float = 2.5
) -> Nephrometry:
    """The scores of a tumor in the right kidney, in a straight scan of a patient who lies tilted."""
    geometry = lattice(codes, spacing=(slices, 1.2, 1.2), size=SIZE, degrees=tilt)
    straight = lattice(codes, spacing=(slices, 1.2, 1.2), size=SIZE)
    found = library.nephrometry(paint(geometry, *KIDNEY_AND_SINUS, OTHER, *tumor), straight.affine)
    assert found is not None
    return found


def test_a_small_tumor_on_the_lower_pole() -> None:
    found = scores(ball((72, 0, -48), 13))
    assert (found.renal.radius, found.renal.nearness, found.renal.face, found.renal.location) == (1, 1, "x", 1)
    assert (found.padua.location, found.padua.rim, found.padua.sinus, found.padua.size) == (1, 1, 1, 1)
    assert str(found.renal) == f"{found.renal.points}x"
    assert found.lines.upper == pytest.approx(20, abs=5)
    assert found.lines.lower == pytest.approx(-20, abs=5)
    assert np.array(found.lines.centre) == pytest.approx((60, 0, 0), abs=3)
    for axis, direction in (
        (found.lines.up, (0, 0, 1)),
        (found.lines.hilum, (-1, 0, 0)),
        (found.lines.front, (0, 1, 0)),
    ):
        assert np.array(axis) == pytest.approx(direction, abs=0.2)
    centres = np.hypot(12, 48)
    assert found.c_index == pytest.approx(centres / 13, rel=0.08)


def test_a_tumor_in_the_middle_of_the_kidney() -> None:
    found = scores(ball((56, 0, 3), 12))
    assert (found.renal.exophytic, found.renal.nearness, found.renal.location) == (3, 3, 3)
    assert (found.padua.exophytic, found.padua.sinus, found.padua.collecting, found.padua.location) == (3, 2, 2, 2)
    assert found.outside == 0
    assert found.nearness_mm == 0
    assert found.above == pytest.approx(0.5 + 3 / 12 * 0.75, abs=0.1)  # a ball's share beyond a plane 3 of 12 mm off


def test_a_large_tumor_on_the_front() -> None:
    found = scores(ball((66, 50, 0), 36))
    assert (found.renal.radius, found.renal.exophytic, found.renal.face, found.renal.location) == (3, 1, "a", 3)
    assert found.padua.size == 3
    assert found.anterior > 0.95


def test_the_gap_to_the_sinus() -> None:
    found = scores(ball((79, 0, 0), 20))  # from 59 on, and the sinus to 50
    assert found.nearness_mm == pytest.approx(9, abs=1.5)
    assert found.renal.nearness == 1
    assert scores(ball((73, 0, 0), 20)).renal.nearness == 3


def test_a_speck_is_no_part_of_the_sinus() -> None:
    for radius, location, nearness in ((1.5, 1, 1), (4, 2, 3)):  # a few voxels without a label, and a calyx
        found = scores(ball((66, 0, 36), radius, BACKGROUND), ball((72, 0, 32), 7))
        assert (found.padua.location, found.renal.nearness) == (location, nearness)


def test_a_notch_of_the_outer_surface_is_no_part_of_the_sinus() -> None:
    tumor = ball((78, 0, 22), 7)  # 15 mm and more from the sinus, beside the notch
    notch = Ellipsoid((90, 0, 0), (20, 10, 14), BACKGROUND)
    assert scores(notch, tumor).nearness_mm == pytest.approx(scores(tumor).nearness_mm, abs=2)


def test_padua_counts_between_the_ends_of_the_sinus() -> None:
    inner = Ellipsoid((56, 0, 0), (9, 9, 38), BACKGROUND)  # further up and down than it opens towards the midline
    found = scores(inner, ball((72, 0, 29), 7))
    assert found.lines.upper == pytest.approx(20, abs=5)
    assert found.lines.sinus_lines == pytest.approx((-35, 35), abs=3)  # 37, less the outermost 0.5 %
    assert (found.between, found.beside_sinus) == pytest.approx((0, 1), abs=0.1)
    assert (found.renal.location, found.padua.location) == (1, 2)


@pytest.mark.parametrize(
    ("between", "above", "points"), [(0, 1, 1), (0.3, 1, 2), (0.51, 1, 3), (0.3, 0.9, 3), (1, 0, 3)]
)
def test_points_for_the_location(between: float, above: float, points: int) -> None:
    assert _location(between, above) == points


def test_orientation_and_tilt_change_no_part() -> None:
    tumor = ball((70, 22, 12), 14)
    found = scores(tumor)
    parts = found.renal, found.padua
    for codes in ORIENTATIONS[5::20]:
        turned = scores(tumor, codes=codes)
        assert (turned.renal, turned.padua) == parts
    for tilt in ((20, 0, 0), (0, -14, 14)):
        turned = scores(tumor, tilt=tilt)
        assert (turned.renal, turned.padua) == parts


def test_a_hump_beside_the_kidney_turns_no_line() -> None:
    found = scores(Ellipsoid((88, 0, 30), (20, 18, 18), KIDNEY), ball((72, 0, -48), 13))
    assert np.rad2deg(np.arccos(found.lines.up[2])) < 8
    assert found.lines.upper - found.lines.lower == pytest.approx(36, abs=5)
    assert found.renal.location == 1


def test_a_sinus_that_labels_fill_has_the_lines_of_a_usual_kidney() -> None:
    found = scores(KIDNEY_AND_SINUS[0], ball((72, 0, -48), 13))  # painted once more
    assert found.nearness_mm is None
    assert (found.lines.lower, found.lines.upper) == pytest.approx((-22, 22), abs=1.5)  # 0.2 of 110 mm
    assert found.lines.sinus_lines == pytest.approx((-27.5, 27.5), abs=1.5)
    assert np.array(found.lines.hilum) == pytest.approx((-np.cos(np.pi / 6), 0.5, 0), abs=0.1)


def test_thick_slices_move_the_lines_little() -> None:
    thin, thick = (scores(ball((72, 0, -48), 13), slices=mm).lines for mm in (1.2, 5.0))
    assert (thin.lower, thin.upper) == pytest.approx((thick.lower, thick.upper), abs=2.5)


@pytest.mark.parametrize(("x", "z", "radius"), [(66, -42, 13), (75, -35, 20)])
def test_thick_slices_leave_a_tumors_share_outside(x: float, z: float, radius: float) -> None:
    """Between a slice of kidney and one of tumor either has its half, even where the kidney is thin."""
    thin, thick = (scores(ball((x, 0, z), radius), slices=slices).outside for slices in (1.0, 5.0))
    assert thick == pytest.approx(thin, abs=0.015)


def test_a_tumor_in_place_of_the_sinus() -> None:
    found = scores(ball((36, 0, 0), 25))
    assert found.renal.nearness == 3
    assert found.padua.sinus == 2


def test_a_single_kidney_is_on_one_side_in_all_of_a_cases_figures(tmp_path: Path) -> None:
    geometry = lattice("RAS", spacing=(3, 2, 2), size=SIZE)
    labels = paint(geometry, *KIDNEY_AND_SINUS, ball((72, 0, -48), 13))
    hu = np.full(geometry.shape, -1000, np.int16)
    hu[80:] = 0  # the scan's middle is to the left of the kidney, the body's to its right
    for name, array in (("case", labels), ("ct", hu)):
        nibabel.save(nibabel.Nifti1Image(array, geometry.affine), tmp_path / f"{name}.nii.gz")
    sides = {}
    for name, options in (("alone", []), ("scanned", ["--ct=ct.nii.gz"])):
        shown = kitseg(tmp_path, "measure", "case.nii.gz", "--nephrometry", "--json=m.json", "--overwrite", *options)
        assert shown.code == 0, shown.text
        found = json.loads((tmp_path / "m.json").read_text())["cases"]["case"]
        sides[name] = found["lesions"][0]["side"]
        assert found["nephrometry"]["renal"]["location"] == 1
        assert found["nephrometry"]["lines"]["centre"] == pytest.approx((60, 0, 0), abs=3)
    assert sides == {"alone": "right", "scanned": "left"}


def test_the_command_and_nothing_to_score(tmp_path: Path) -> None:
    geometry = lattice("RAS", spacing=(3, 2, 2), size=SIZE)
    labels = paint(geometry, *KIDNEY_AND_SINUS, OTHER, ball((72, 0, -48), 13))
    nibabel.save(nibabel.Nifti1Image(labels, geometry.affine), tmp_path / "case.nii.gz")
    shown = kitseg(tmp_path, "measure", "case.nii.gz", "--nephrometry", "--json=found.json")
    assert shown.code == 0, shown.text
    assert "PADUA" in shown.text
    (found,) = json.loads((tmp_path / "found.json").read_text())["cases"].values()
    parts = found["nephrometry"]["renal"]
    points = sum(parts[name] for name in ("radius", "exophytic", "nearness", "location"))
    assert parts["score"] == f"{points}{parts['face']}"
    assert parts["score"] in shown.text
    nibabel.save(nibabel.Nifti1Image(np.where(labels == 1, 0, labels), geometry.affine), tmp_path / "alone.nii.gz")
    alone = kitseg(tmp_path, "measure", "alone.nii.gz", "--nephrometry")
    assert (alone.code, "No nephrometry, which takes a tumor in a kidney" in alone.text) == (0, True)
    assert "R.E.N.A.L." not in alone.text
    assert library.nephrometry(np.minimum(labels, KIDNEY), geometry.affine) is None
    page = kitseg(tmp_path, "report", "case.nii.gz", "--output=pages")
    assert page.code == 0, page.text
    (text,) = [path.read_text() for path in (tmp_path / "pages").glob("*.html") if path.name != "index.html"]
    assert "R.E.N.A.L. <strong>" in text
    assert 'class="prediction polar"' in text
    assert "0.0 % of the tumor, 0.0 % above the midline" in text
