"""Two dates of a patient: lesions found again on other grids and in another position, their growth, and its page."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import nibabel
import numpy as np
import pytest
from conftest import kitseg
from dicom_files import AXIAL, write_series
from scipy.spatial.transform import Rotation
from shapes import Ellipsoid, ball, lattice, paint

from kitseg.commands.followup import OTHER_PATIENT, FollowupTask, _other_patient
from kitseg.commands.measure import LabelTask
from kitseg.labels import BACKGROUND, CYST, KIDNEY, find_scheme, scheme_of
from kitseg.measurement.followup import Visit, followup
from kitseg.measurement.measure import measure
from kitseg.types import Geometry
from kitseg.volumes.check import NOT_HU
from kitseg.volumes.nifti import read_labels

KIDNEYS = (
    Ellipsoid((60, 0, 0), (29, 21, 55), KIDNEY),
    Ellipsoid((38, 6, 0), (14, 11, 20), BACKGROUND),
    Ellipsoid((-60, 0, 5), (29, 21, 52), KIDNEY),
    Ellipsoid((-38, 6, 5), (14, 11, 20), BACKGROUND),
)
CYST_BELOW = ball((60, -5, -45), 8, CYST)
OTHER_CYST = ball((-70, 5, 40), 6, CYST)
SIZE = (210, 120, 150)
DATES = ("--dates", "2023-01-01", "2024-01-01")


def save(path: Path, *shapes: Ellipsoid, moved: bool = False) -> Path:
    """The label map of a patient; moved: who lies tilted, on another grid, elsewhere in the scanner."""
    spacing = (3.0, 0.9, 0.9) if moved else (2.0, 0.8, 0.8)
    painted = lattice(spacing=spacing, size=SIZE, degrees=(8, -6, 12) if moved else (0, 0, 0))
    stored = lattice(spacing=spacing, size=SIZE, centre=(20, 30, 500) if moved else (1.3, -8.4, 6.2))
    nibabel.save(nibabel.Nifti1Image(paint(painted, *shapes), stored.affine), path)
    return path


def rows(folder: Path, *arguments: str) -> dict[str, dict]:
    """The rows of a follow-up by their verdicts."""
    found = kitseg(folder, "followup", *arguments, "--labels", "kits23", "--json", "f.json", "--csv", "f.csv")
    assert found.code == 0, found.text
    (case,) = json.loads((folder / "f.json").read_text())["followup"].values()
    with (folder / "f.csv").open() as file:
        assert [row["verdict"] for row in csv.DictReader(file)] == [row["verdict"] for row in case["lesions"]]
    return {row["verdict"]: row for row in case["lesions"]}


def test_a_tumor_grows_while_the_patient_and_the_grid_move(tmp_path: Path) -> None:
    before = save(tmp_path / "a.nii.gz", *KIDNEYS, ball((80, 0, 20), 12), CYST_BELOW, OTHER_CYST)
    new = ball((-60, -15, -30), 9)
    after = save(tmp_path / "b.nii.gz", *KIDNEYS, ball((80, 0, 20), 15), CYST_BELOW, new, moved=True)
    found = rows(tmp_path, before.name, after.name, *DATES)
    assert {verdict: row["kind"] for verdict, row in found.items()} == {
        "larger": "tumor",
        "unchanged": "cyst",
        "vanished": "cyst",
        "new": "tumor",
    }
    grown, old, ball_ml = found["larger"], found["unchanged"], 4 / 3 * np.pi / 1000
    assert grown["before_volume_ml"] == pytest.approx(ball_ml * 12**3, rel=0.02)
    assert grown["after_volume_ml"] == pytest.approx(ball_ml * 15**3, rel=0.02)
    assert grown["change_mean_mm"] == pytest.approx(6, abs=0.3)
    assert grown["change_diameter_mm"] == pytest.approx(6, abs=1)
    assert grown["change_share"] == pytest.approx(15**3 / 12**3 - 1, rel=0.05)
    assert grown["mean_mm_a_year"] == pytest.approx(grown["change_mean_mm"] * 365.25 / 365, rel=1e-3)
    assert grown["doubling_days"] == pytest.approx(365 * np.log(2) / np.log(15**3 / 12**3), rel=0.05)
    assert grown["offset_mm"] < 2
    assert old["offset_mm"] < 2
    assert abs(old["change_volume_ml"]) <= old["least_ml"] < 0.1 * ball_ml * 8**3
    assert old["doubling_days"] is None
    assert found["new"]["side"] == found["vanished"]["side"] == "left"
    page = (tmp_path / "followup" / "a-b.html").read_text()
    assert {"2023-01-01", "2024-01-01"} <= set(re.findall(r"<h3>(.*?)</h3>", page))
    assert page.count("data:image/webp") == 4 * 2 * 3
    assert 'class="reference tumor"' in page
    assert f"<td>+{grown['change_mean_mm']:.1f}</td>" in page
    assert f"<td>+{grown['mean_mm_a_year']:.1f} ({grown['least_mm'] * 365.25 / 365:.1f})</td>" in page


def test_a_kidney_that_is_gone_takes_its_lesions_along(tmp_path: Path) -> None:
    before = save(tmp_path / "a.nii.gz", *KIDNEYS, ball((80, 0, 20), 12), OTHER_CYST)
    after = save(tmp_path / "b.nii.gz", *KIDNEYS[2:], OTHER_CYST, ball((60, 0, 0), 12, KIDNEY))  # a false 7 ml is left
    found = rows(tmp_path, before.name, after.name)
    assert found["no kidney"]["side"] == "right"
    assert "vanished" not in found
    assert found["unchanged"]["side"] == "left"
    assert found["unchanged"]["mean_mm_a_year"] is None  # no dates
    page = (tmp_path / "followup" / "a-b.html").read_text()
    assert "not aligned" in page
    assert "One date shows no right kidney: its lesions were not looked for there." in page
    back = rows(tmp_path, after.name, before.name, "--overwrite")
    assert (back["no kidney"]["side"], "new" in back) == ("right", False)


def test_what_the_other_scan_does_not_show_is_not_said_to_be_gone(tmp_path: Path) -> None:
    before = save(tmp_path / "a.nii.gz", *KIDNEYS, ball((60, 0, -52), 9), ball((80, 0, 20), 12))
    whole = nibabel.load(before)
    upper = np.asarray(whole.dataobj)[: round((75 + 6 + 36) / 2)]  # the scan ends 36 mm below the kidneys' centre
    nibabel.save(nibabel.Nifti1Image(upper, whole.affine), tmp_path / "b.nii.gz")
    found = rows(tmp_path, "a.nii.gz", "b.nii.gz")
    assert found["not scanned"]["before_volume_ml"] == pytest.approx(4 / 3 * np.pi * 0.9**3, rel=0.05)
    assert found["unchanged"]["offset_mm"] < 3
    (case,) = json.loads((tmp_path / "f.json").read_text())["followup"].values()
    (doubt,) = case["doubts"]
    assert doubt.startswith("second date: kidney or tumor reaches the edge of the scan (bottom)")
    assert "Second date: kidney or tumor reaches the edge" in (tmp_path / "followup" / "a-b.html").read_text()
    back = rows(tmp_path, "b.nii.gz", "a.nii.gz", "--overwrite")
    assert back["not scanned"]["after_volume_ml"] == found["not scanned"]["before_volume_ml"]


def test_the_dates_come_from_dicom_and_folders_go_by_names(tmp_path: Path) -> None:
    shape, affine = (40, 60, 100), AXIAL @ np.diag([1, 2, 2, 1])
    cube = np.zeros(shape, np.uint8)
    cube[5:35, 20:40, 10:30] = 1
    for date, size in (("20230301", 6), ("20230901", 8)):
        labels = cube.copy()
        labels[10 : 10 + size, 20 : 20 + size, 12 : 12 + size] = 2
        (tmp_path / date).mkdir()
        tags = {"AcquisitionDate": date, "PatientID": f"P{size}"}
        series = write_series(tmp_path / "ct" / date, np.zeros(shape, np.int16), affine, **tags)
        assert len(series) == shape[0]
        nibabel.save(nibabel.Nifti1Image(labels, affine), tmp_path / date / "patient.nii.gz")
    (tmp_path / "20230301" / "other.nii.gz").write_bytes((tmp_path / "20230301" / "patient.nii.gz").read_bytes())
    files = [f"{date}/patient.nii.gz" for date in ("20230301", "20230901")]
    found = rows(tmp_path, *files, "--ct", "ct/20230301", "ct/20230901")
    assert found["larger"]["doubling_days"] == pytest.approx(184 * np.log(2) / np.log(8**3 / 6**3), abs=0.1)
    alone = (LabelTask(date, next((tmp_path / "ct" / date).glob("*")), None) for date in ("20230301", "20230901"))
    task = FollowupTask("a", *alone, None, tmp_path)
    assert _other_patient(task) == [OTHER_PATIENT], "as of segmentations without scans"
    doubt = "the DICOM files state different patient IDs"
    assert doubt in json.loads((tmp_path / "f.json").read_text())["followup"]["patient"]["doubts"][0]
    assert doubt[1:] in (tmp_path / "followup" / "patient.html").read_text()
    swapped = ("followup", *reversed(files), "--ct", "ct/20230901", "ct/20230301", "-o", "swapped")
    refused = kitseg(tmp_path, *swapped)
    assert refused.code == 1
    assert "patient: the first scan is of 2023-09-01, the second of 2023-03-01. Give" in " ".join(refused.text.split())
    assert not list(tmp_path.glob("swapped/*"))
    stated = kitseg(tmp_path, *swapped, "--dates", "2023-01-01", "2023-02-01")
    assert stated.code == 0, "a person knows better"
    assert "the scans state other dates than --dates: 2023-09-01 and 2023-03-01" in " ".join(stated.text.split())
    same = rows(tmp_path, *files, "--ct", "ct/20230301", "ct/20230301", "--overwrite")
    assert same["larger"]["mean_mm_a_year"] is same["larger"]["doubling_days"] is None
    doubts = json.loads((tmp_path / "f.json").read_text())["followup"]["patient"]["doubts"]
    unlike = [f"{date} date: {NOT_HU}" for date in ("first", "second")]
    assert doubts == ["both scans state the date 2023-03-01: there is no change a year", *unlike]
    both = kitseg(tmp_path, "followup", "20230301", "20230901", "-o", "pages", "--json", "all.json")
    assert both.code == 0, both.text
    assert "left out, without the other date: other" in both.text
    assert [path.name for path in (tmp_path / "pages").iterdir()] == ["patient.html"]


def test_cysts_at_one_date_only_may_be_the_labels(tmp_path: Path) -> None:
    for name, scheme in (("a", "kits19"), ("b", "kits23")):
        save(tmp_path / f"{name}.nii.gz", *KIDNEYS, *([OTHER_CYST] if name == "b" else []))
        record = {"case": name, "labels": scheme_of(scheme).plain(), "models": [{"path": f"runs/{scheme}"}]}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    done = kitseg(tmp_path, "followup", "a.nii.gz", "b.nii.gz")
    assert done.code == 0, done.text
    assert "the label maps of one date have no cysts, which are kidney there" in " ".join(done.text.split())
    assert "the labels are of kits19 at the first date, of kits23 at the second" in " ".join(done.text.split())
    back = kitseg(tmp_path, "followup", "b.nii.gz", "a.nii.gz")
    assert back.code == 0, back.text
    assert '<th scope="row">cyst 1 → –</th>' in (tmp_path / "followup" / "b-a.html").read_text()


def test_a_tumor_that_was_called_a_cyst_keeps_both_names(tmp_path: Path) -> None:
    before = save(tmp_path / "a.nii.gz", *KIDNEYS, ball((80, 0, 20), 12, CYST))
    after = save(tmp_path / "b.nii.gz", *KIDNEYS, ball((80, 0, 20), 15))
    (row,) = rows(tmp_path, before.name, after.name).values()
    assert (row["before_kind"], row["after_kind"], row["verdict"]) == ("cyst", "tumor", "larger")
    page = (tmp_path / "followup" / "a-b.html").read_text()
    assert '<th scope="row">cyst 1 → tumor 1</th>' in page
    assert "<strong>Cyst 1 → tumor 1</strong>" in page


def test_lesions_that_grow_together_have_not_vanished(tmp_path: Path) -> None:
    apart = save(tmp_path / "a.nii.gz", *KIDNEYS, ball((75, 0, 5), 8), ball((75, 0, 27), 6))
    joined = save(tmp_path / "b.nii.gz", *KIDNEYS, ball((75, 0, 5), 13), ball((75, 0, 27), 10))
    for first, second, verdicts in (
        (apart, joined, {"larger": 1, "merged": 2}),
        (joined, apart, {"smaller": 1, "split off": 2}),
    ):
        found = rows(tmp_path, first.name, second.name, "--overwrite")
        assert {verdict: row["before"] or row["after"] for verdict, row in found.items()} == verdicts
        (case,) = json.loads((tmp_path / "f.json").read_text())["followup"].values()
        assert [doubt[:42] for doubt in case["doubts"]] == ["lesions that are apart at one date are one"]


def test_another_patients_kidney_is_doubted(tmp_path: Path) -> None:
    """Kidneys of the same place, a third shorter and wider at the second date; a tumor that grows alone is no doubt."""
    before = save(tmp_path / "a.nii.gz", *KIDNEYS, ball((80, 0, 20), 12))
    other = Ellipsoid((60, 0, 0), (38, 29, 38), KIDNEY)
    after = save(tmp_path / "b.nii.gz", other, *KIDNEYS[1:], ball((80, 0, 20), 15))
    found = kitseg(tmp_path, "followup", before.name, after.name, "--json", "f.json")
    assert found.code == 0
    assert "the right kidney's surfaces are" in " ".join(found.text.split())
    (case,) = json.loads((tmp_path / "f.json").read_text())["followup"].values()
    assert case["residual_mm"]["right"] > 2 > case["residual_mm"]["left"]
    assert [doubt[:31] for doubt in case["doubts"]] == ["the right kidney's surfaces are"]
    assert "surfaces are" in (tmp_path / "followup" / "a-b.html").read_text()


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(tmp_path / f"{name}.nii.gz", *KIDNEYS)
    backwards = kitseg(tmp_path, "followup", "a.nii.gz", "b.nii.gz", "--dates", "2024-01-01", "2023-01-01")
    assert (backwards.code, "isn't before" in backwards.text) == (2, True)
    page = tmp_path / "followup" / "a-b.html"
    assert kitseg(tmp_path, "followup", "a.nii.gz", "b.nii.gz").code == 0
    assert page.exists()
    (tmp_path / "b.nii.gz").write_bytes(b"no image")
    broken = kitseg(tmp_path, "followup", "a.nii.gz", "b.nii.gz")
    assert broken.code == 1
    assert "b.nii.gz" in broken.text
    assert not page.exists(), "it would be that of an earlier call"
    assert "→" not in broken.text, "there is no page to open"


@pytest.mark.parametrize("number", [3, 47])
def test_a_real_patient_without_growth_is_unchanged(shared: Path, number: int) -> None:
    """The same real label map, turned, moved, and with every other slice: no tumor has grown."""
    case = f"case_{number:05d}"
    first = read_labels(shared / "kits19" / case / "segmentation.nii.gz", case, find_scheme("kits19"))
    motion = np.eye(4)
    motion[:3, :3] = Rotation.from_euler("xyz", (9, -7, 12), degrees=True).as_matrix()
    motion[:3, 3] = 25, -40, 300
    thinned = np.ascontiguousarray(first.array[::2])
    affine = motion @ first.geometry.affine @ np.diag([2, 1, 1, 1])
    second = Geometry((thinned.shape[0], thinned.shape[1], thinned.shape[2]), affine)
    visits = [Visit(first.array, first.geometry, measure(first.array, first.geometry))]
    visits.append(Visit(thinned, second, measure(thinned, second)))
    found = followup(*visits)
    for change in found.changes:
        assert change.verdict == "unchanged"
        assert abs(change.mean_mm) < 1
        assert change.offset_mm < 5
    for alignment in found.alignments.values():
        assert Rotation.from_matrix(alignment.rotation.T @ motion[:3, :3]).magnitude() < np.deg2rad(6)
