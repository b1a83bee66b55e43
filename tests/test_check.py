"""The check of a data folder: clean cases pass, each kind of damage has its row."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import nibabel
import numpy as np
import pytest
from conftest import kitseg

from kitseg.errors import InputError
from kitseg.labels import KITS19, KITS23, Scheme
from kitseg.types import Case, Geometry
from kitseg.volumes import nifti
from kitseg.volumes.check import CaseReport, check_case, looks_like_hu, refuse_labels, second_series

AFFINE = np.array([[0, 0, -5.0, 0], [0, -5.0, 0, 0], [-4.0, 0, 0, 0], [0, 0, 0, 1]])
SHAPE = (24, 64, 64)


def body(seed: int = 0, slices: int = SHAPE[0]) -> np.ndarray:
    """A trunk that narrows downward, with lungs at its top, a spine, and noise; (D, H, W) int16 HU."""
    z = np.linspace(0, 1, slices)[:, None, None]
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    rng = np.random.default_rng(seed)
    scan = np.where((x / 0.9) ** 2 + (y / 0.7) ** 2 < 1 - 0.3 * z, 45.0, -1000.0)
    lungs = ((np.abs(x) - 0.4) / 0.3) ** 2 + (y / 0.5) ** 2 < 0.8 - 2 * z
    scan[lungs] = -850
    scan[np.broadcast_to(x**2 + (y - 0.4) ** 2 < 0.02, scan.shape)] = 500
    return (scan + rng.normal(0, 20, scan.shape)).astype(np.int16)


def organs() -> np.ndarray:
    """100 voxels of kidney, 20 of tumor."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[10:14, 30:35, 20:25] = 1
    labels[14, 30:34, 20:25] = 2
    return labels


def write_case(folder: Path, scan: np.ndarray, labels: np.ndarray | None, affine: np.ndarray = AFFINE) -> Case:
    nifti.write_image(folder / "imaging.nii.gz", scan, Geometry(scan.shape, affine))
    if labels is not None:
        nifti.write_labels(folder / "segmentation.nii.gz", labels, Geometry(labels.shape, affine))
    return Case(folder.name, folder / "imaging.nii.gz", None if labels is None else folder / "segmentation.nii.gz")


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return write_case(tmp_path / "data" / "case_00000", body(), organs())


def only_problem(case: Case, fact: str, scheme: Scheme = KITS19) -> CaseReport:
    report = check_case(case, scheme)
    assert not report.ok
    assert len(report.problems) == 1
    assert fact in report.problems[0]
    return report


def test_a_clean_case(case: Case) -> None:
    report = check_case(case)
    assert report.ok
    assert report.problems == []
    assert (report.id, report.shape, report.spacing, report.orientation) == ("case_00000", SHAPE, (4, 5, 5), "IPL")
    assert report.hu_range == (body().min(), body().max())
    assert report.kidney_ml == pytest.approx(100 * 0.1)  # a voxel of 4 x 5 x 5 mm is 0.1 ml
    assert report.tumor_ml == pytest.approx(20 * 0.1)


def test_a_scan_without_labels_is_clean(tmp_path: Path) -> None:
    report = check_case(write_case(tmp_path / "case_00210", body(), None))
    assert report.ok
    assert report.kidney_ml is None


def test_labels_may_lie_in_another_orientation(case: Case) -> None:
    stored = nibabel.load(case.label)
    nibabel.save(nibabel.as_closest_canonical(stored), case.label)
    assert nibabel.load(case.label).shape != stored.shape
    assert check_case(case).ok


def test_missing_and_broken_files(case: Case) -> None:
    case.label.write_bytes(case.label.read_bytes()[:-100])
    report = only_problem(case, "segmentation.nii.gz: ")
    assert report.shape == SHAPE
    assert report.kidney_ml is None
    case.image.write_text("no scan")
    assert only_problem(case, "imaging.nii.gz: broken").shape is None
    case.image.unlink()
    only_problem(case, "imaging.nii.gz: there is no such file")


def test_labels_of_another_shape_and_place(case: Case) -> None:
    nifti.write_labels(case.label, organs()[1:], Geometry((23, 64, 64), AFFINE))
    only_problem(case, "the labels have shape (23, 64, 64), the image (24, 64, 64)")
    moved = AFFINE.copy()
    moved[0, 3] = 1
    nifti.write_labels(case.label, organs(), Geometry(SHAPE, moved))
    only_problem(case, "different affines")


def test_labels_of_another_scheme_and_none(case: Case) -> None:
    labels = organs()
    labels[0, 0, 0] = 3
    nifti.write_labels(case.label, labels, Geometry(SHAPE, AFFINE))
    only_problem(case, "label values 3")
    report = check_case(case, KITS23)
    assert report.ok
    assert report.kidney_ml == pytest.approx(101 * 0.1)  # a cyst is kidney
    nifti.write_labels(case.label, np.zeros(SHAPE, np.uint8), Geometry(SHAPE, AFFINE))
    only_problem(case, "label map is empty")


@pytest.mark.parametrize(("axis", "factor", "fact"), [(0, 3.0, "12 mm"), (0, 0.05, "0.2 mm"), (1, 2.0, "10 x 5")])
def test_spacing(tmp_path: Path, axis: int, factor: float, fact: str) -> None:
    affine = AFFINE.copy()
    affine[:, axis] *= factor
    only_problem(write_case(tmp_path / "a", body(), organs(), affine), fact)


def test_unknown_orientation(case: Case) -> None:
    image = nibabel.load(case.image)
    image.set_qform(None, 0)
    image.set_sform(None, 0)
    image.to_filename(case.image)
    case = Case(case.id, case.image)
    only_problem(case, "the header has no orientation")


@pytest.mark.parametrize(
    "scan",
    [
        (body() + 1024).clip(0),  # DICOM's stored values
        ((body().clip(-160, 240) + 160) / 400 * 255).astype(np.int16),  # a picture
        body().clip(-160, 240),  # a window
        np.where(body() < -500, -20000, body()).astype(np.int16),
        (body() // 500),
    ],
)
def test_values_that_are_no_hounsfield_units(tmp_path: Path, scan: np.ndarray) -> None:
    only_problem(write_case(tmp_path / "a", scan, organs()), "don't look like Hounsfield units")


def test_unit_interval_is_no_hounsfield_units() -> None:
    assert looks_like_hu(body())
    assert not looks_like_hu(((body() + 1024) / 2048).astype(np.float32))


@pytest.mark.parametrize("labels", [organs(), organs().astype(np.float32), np.where(organs(), 200, 0)])
def test_a_label_map_is_no_ct(labels: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"^a: it seems to be a label map, not a CT: its [23] different values"):
        refuse_labels("a", labels)


@pytest.mark.parametrize(
    "scan",
    [
        body(),
        ((body().clip(-160, 240) + 160) / 400 * 255).astype(np.int16),  # a picture
        organs() - np.int16(1),
        organs() + np.int16(1),
        organs() / 2,
        np.where(organs(), 256, np.int16(0)),
        np.zeros(SHAPE, np.int16),
    ],
)
def test_what_is_no_label_map_may_be_a_ct(scan: np.ndarray) -> None:
    refuse_labels("a", scan)


def test_commands_refuse_label_maps_in_place_of_scans(tmp_path: Path) -> None:
    write_case(tmp_path / "scans" / "case_00000", organs().astype(np.int16), organs())
    maps = tmp_path / "maps"
    maps.mkdir()
    shutil.copy(tmp_path / "scans" / "case_00000" / "segmentation.nii.gz", maps / "case_00000.nii.gz")
    for command in (
        ("measure", "maps", "--ct", "maps", "--json", "found.json"),
        ("preprocess", "scans", "--size", "tiny", "--jobs", "1"),
        ("predict", "maps", "-o", "labels"),
    ):
        done = kitseg(tmp_path, *command)
        assert (done.code, "a label map, not a CT" in " ".join(done.text.split())) == (1, True), done.text
    assert list(tmp_path.glob("labels/case*")) == []


def test_padding_far_below_air_is_common() -> None:
    scan = body()
    scan[:, :8] = -3024
    assert looks_like_hu(scan)


def test_one_series_is_one() -> None:
    for slices in (1, 2, 15, 16, 40, 200):
        assert second_series(body(slices=slices)) is None


@pytest.mark.parametrize("slices", [(24, 24), (24, 40), (40, 17), (30, 30, 30)])
def test_a_second_series(slices: tuple[int, ...]) -> None:
    joined = np.concatenate([body(seed, n) for seed, n in enumerate(slices)])
    assert second_series(joined) == slices[0]


def test_a_second_series_is_a_row(tmp_path: Path) -> None:
    twice = np.concatenate([body(0), body(1)])
    only_problem(write_case(tmp_path / "a", twice, None), "before slice 24 of 48")


def test_a_folder_with_broken_cases(case: Case, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(data / "case_00000", data / "case_00002")
    (data / "case_00001").mkdir()
    shutil.copy(case.label, data / "case_00001")
    (data / "case_00002" / "imaging.nii.gz").write_bytes(b"")
    done = kitseg(tmp_path, "check", "--jobs=1", "--json=check.json")
    assert (done.code, "1 of 3 cases are valid" in done.text) == (1, True)
    reports = json.loads((tmp_path / "check.json").read_text())["cases"]
    assert [report["id"] for report in reports] == ["case_00000", "case_00001", "case_00002"]
    problems = [" ".join(report["problems"]) for report in reports]
    assert problems[0] == ""
    assert "no such file" in problems[1]
    assert "is empty" in problems[2]


@pytest.mark.slow
def test_two_processes_give_the_same_result(case: Case, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for number in range(1, 4):
        shutil.copytree(data / "case_00000", data / f"case_{number:05d}")
    (data / "case_00002" / "imaging.nii.gz").write_bytes(b"")
    for jobs in (1, 2):
        assert kitseg(tmp_path, "check", f"--jobs={jobs}", f"--json={jobs}.json").code == 1
    assert (tmp_path / "1.json").read_text() == (tmp_path / "2.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "command"),
    [("check.check_case", ("check", "data")), ("phantom.write_case", ("phantom", "more", "--cases=2"))],
)
def test_a_killed_worker_is_reported(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: str, command: tuple[str, ...]
) -> None:
    monkeypatch.setattr(f"kitseg.volumes.{work}", lambda *given: os.kill(os.getpid(), signal.SIGKILL))
    done = kitseg(tmp_path, *command, "--jobs=2")
    assert done.code == 1
    assert "a worker process was killed. The machine may be short of memory: call again with" in done.text
    assert "Traceback" not in done.text


def test_an_error_nobody_thought_of_is_a_row(case: Case) -> None:
    only_problem(case, "can't be checked: imaging.nii.gz: AttributeError", "no scheme")


def test_a_real_ct_is_clean_and_twice_it_is_not(shared: Path) -> None:
    stored = shared / "body" / "ct.nii.gz"
    report = check_case(Case("ct", stored))
    assert report.ok, report
    assert report.orientation == "RAS"
    scan = nifti.read_image(stored, "ct").array
    assert second_series(np.concatenate([scan, scan])) == len(scan)
