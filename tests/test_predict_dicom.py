"""`kitseg predict` on a hospital's export: one CT a study, labels that lie on it, and nobody's name anywhere."""

from __future__ import annotations

import csv
import gzip
import io
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pypdf
import pytest
from conftest import Result, kitseg
from dicom_files import WORDS, write_series
from test_dicom_seg import lies_on

from kitseg.volumes.dicom.series import find_series
from kitseg.volumes.nifti import read_image, read_labels

pytestmark = pytest.mark.slow
OUTPUT = ["series_??????????.dcm", "*.sr.dcm", "*.pdf.dcm"]
FORMATS = "--format=dicom-seg,dicom-sr,dicom-pdf"
MODEL = "--model=runs/two-phase-tiny"


@pytest.fixture(scope="module")
def planes(trained: Path) -> tuple[np.ndarray, np.ndarray]:
    """A phantom as planes from below upwards, and the affine of (slice, row, column)."""
    scan = read_image(trained / "test" / "case_00000" / "imaging.nii.gz", "case_00000")
    affine = scan.geometry.affine @ np.diag([-1.0, 1, 1, 1])
    affine[:3, 3] = (scan.geometry.affine @ [len(scan.array) - 1, 0, 0, 1])[:3]
    return scan.array[::-1].astype(np.int16), affine


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory, planes: tuple[np.ndarray, np.ndarray]) -> Path:
    """Patient, studies and series in nested folders under the patient's name, with what else lies about there."""
    array, affine = planes
    root = tmp_path_factory.mktemp("export")
    folder = root / "Zwiebelfisch_Hannelore" / "ST01"
    write_series(folder / "SE01", array, affine, seed=1)
    write_series(folder / "SE01", array[:4], affine, seed=2, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    write_series(root / "Zwiebelfisch_Hannelore" / "ST02", array[:12], affine, seed=3, study="other", Modality="MR")
    (folder / "readme.txt").write_text("no DICOM")
    return root


@pytest.fixture(scope="module")
def predicted(trained: Path, archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dicom") / "out"
    done = predict(trained, archive, out, FORMATS)
    assert done.code == 0, done.text
    return out


def predict(trained: Path, folder: Path, out: Path, *options: str) -> Result:
    return kitseg(trained, "predict", str(folder), "-o", str(out), MODEL, *options)


def contents(path: Path) -> bytes:
    """The bytes of a file, unpacked, with the text of a PDF file in it."""
    if path.name.endswith(".pdf.dcm"):
        return path.read_bytes() + pdf_text(path).encode()
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def pdf_text(path: Path) -> str:
    pages = pypdf.PdfReader(io.BytesIO(pydicom.dcmread(path).EncapsulatedDocument)).pages
    return " ".join(page.extract_text() for page in pages)


def one(out: Path, pattern: str) -> Path:
    (found,) = out.glob(pattern)
    return found


def test_the_labels_are_those_of_the_same_scan_as_nifti(trained: Path, predicted: Path, tmp_path: Path) -> None:
    """The scan comes in a zip file, and its labels in two more formats."""
    scan = shutil.make_archive(str(tmp_path / "study"), "zip", trained / "test" / "case_00000")
    done = kitseg(trained, "predict", scan, "-o", str(tmp_path), MODEL, "--format=mha,seg.nrrd")
    assert done.code == 0, done.text
    name = one(tmp_path, "*.nii.gz").name.removesuffix(".nii.gz")
    (tmp_path / f"{name}.nii.gz").rename(tmp_path / "case_00000.nii.gz")
    for ending in (".mha", ".seg.nrrd"):
        same = read_labels(tmp_path / f"{name}{ending}", "a").array
        assert np.array_equal(same, read_labels(tmp_path / "case_00000.nii.gz", "a").array)
    expected, found = nib.load(tmp_path / "case_00000.nii.gz"), nib.load(one(predicted, "series_*.nii.gz"))
    straight, turned = (nib.as_closest_canonical(image) for image in (expected, found))
    assert np.allclose(straight.affine, turned.affine, atol=1e-3)
    assert np.asarray(straight.dataobj).any()
    assert np.array_equal(np.asarray(straight.dataobj), np.asarray(turned.dataobj))


def test_the_segmentation_lies_voxel_for_voxel_on_the_series(archive: Path, predicted: Path) -> None:
    labels, name = one(predicted, "series_*.nii.gz"), one(predicted, OUTPUT[0]).stem
    (series,) = [series for series in find_series(archive) if series.case_id == name]
    lies_on(one(predicted, OUTPUT[0]), read_labels(labels, "a").array, series)


def test_the_table_gives_a_reason_for_each_series(predicted: Path) -> None:
    rows = list(csv.DictReader((predicted / "series.csv").open()))
    taken = [row for row in rows if row["chosen"] == "yes"]
    assert [row["case"] for row in taken] == [one(predicted, "series_*.nii.gz").name.removesuffix(".nii.gz")]
    assert sorted(row["reason"] for row in rows if row["chosen"] == "no") == ["a scout", "not a CT (MR)"]


@pytest.mark.parametrize("options", ["", "--anonymous", "--keep-identifiers"])
def test_only_dicom_output_identifies_the_patient_unless_asked(
    trained: Path, archive: Path, predicted: Path, tmp_path: Path, options: str
) -> None:
    out, pages = tmp_path / "out" if options else predicted, tmp_path / "pages"
    assert not options or predict(trained, archive, out, FORMATS, options).code == 0
    shown = kitseg(trained, "report", str(out), str(archive), "-o", str(pages))
    assert shown.code == 0, shown.text
    measured = kitseg(trained, "measure", str(out), f"--json={pages / 'm.json'}", f"--csv={pages / 'm.csv'}")
    assert measured.code == 0, measured.text
    files = [path for folder in (out, pages) for path in folder.rglob("*")]
    assert {path.suffix for path in files} >= {".gz", ".json", ".png", ".csv", ".dcm", ".html"}
    telling = {path.name for path in files for word in WORDS if word in contents(path) + path.name.encode()}
    names = {"": OUTPUT, "--anonymous": [], "--keep-identifiers": [*OUTPUT, "series.csv"]}[options]
    assert telling == {one(out, name).name for name in names}


def test_the_pages_have_the_numbers_and_state_whose_they_are(predicted: Path) -> None:
    text = pdf_text(one(predicted, "*.pdf.dcm"))
    record = json.loads(one(predicted, "series_*[0-9a-f].json").read_text())
    assert record["findings"]["kidneys"]
    for found in record["findings"]["kidneys"] + record["findings"]["lesions"][:20]:
        assert f"{found['volume_ml']:.1f}" in text
    assert all(flag["reason"][:30] in text for flag in record["quality"]["flags"])
    for words in (
        "Zwiebelfisch Hannelore, PID-4711-XYZ, born 1931-04-17, study of 2019-08-23",
        "For research use only",
    ):
        assert words in text


def test_a_segmentation_is_measured_and_shown_as_its_nifti_file(
    trained: Path, archive: Path, predicted: Path, tmp_path: Path
) -> None:
    """Alone, under a name that names the patient, without the record."""
    (tmp_path / "seg").mkdir()
    shutil.copy(one(predicted, OUTPUT[0]), tmp_path / "seg" / "Zwiebelfisch")
    found = []
    for labels in (predicted, tmp_path / "seg"):
        to = tmp_path / f"{labels.name}.json"
        done = kitseg(trained, "measure", str(labels), f"--ct={archive}", f"--json={to}", "--labels=kits23")
        assert done.code == 0, done.text
        found.append(json.loads(to.read_text())["cases"])
    assert found[0] == found[1]
    assert next(iter(found[0].values()))["kidneys"]
    shown = kitseg(tmp_path, "report", "seg", str(archive))
    assert shown.code == 0, shown.text
    assert not [word for path in (tmp_path / "report").iterdir() for word in WORDS if word in path.read_bytes()]
    alone = kitseg(tmp_path, "measure", "seg/Zwiebelfisch")
    assert alone.code == 0, alone.text


def test_the_same_scan_shuffled_or_with_a_slice_missing(
    trained: Path, predicted: Path, planes: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    array, affine = planes
    files = write_series(tmp_path / "shuffled" / "deep", array, affine, seed=1)
    for number, path in enumerate(np.random.default_rng(5).permutation(files)):
        Path(path).rename(Path(path).with_name(f"IM{number:04d}"))
    assert predict(trained, tmp_path / "shuffled", tmp_path / "a", "--format=dicom-seg").code == 0
    first = one(predicted, "series_*.nii.gz")
    assert (tmp_path / "a" / first.name).read_bytes() == first.read_bytes()

    gone = write_series(tmp_path / "gap", array, affine, seed=1)[len(array) // 2]
    gone.unlink()
    done = predict(trained, tmp_path / "gap", tmp_path / "b", "--format=dicom-seg")
    assert done.code == 0, done.text
    assert "1 slice is missing and interpolated" in json.loads(one(tmp_path / "b", "series_*.json").read_text())["note"]
    assert nib.load(tmp_path / "b" / first.name).shape == nib.load(first).shape


def test_a_series_by_its_name_and_one_that_is_not_there(trained: Path, archive: Path, tmp_path: Path) -> None:
    wrong = predict(trained, archive, tmp_path, "--series=series_0000000000")
    assert wrong.code == 2
    assert "no such series" in wrong.text
    rows = csv.DictReader((tmp_path / "series.csv").open()) if (tmp_path / "series.csv").exists() else []
    assert not list(rows)


def test_a_folder_without_any_ct_is_an_error_with_the_reasons(
    trained: Path, planes: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    array, affine = planes
    write_series(tmp_path / "in", array[:12], affine, seed=3, Modality="MR")
    done = predict(trained, tmp_path / "in", tmp_path / "out")
    assert done.code == 1
    assert "not a CT (MR)" in done.text
    assert "not a CT (MR)" in (tmp_path / "out" / "series.csv").read_text()


def test_a_dicom_segmentation_needs_a_dicom_series(trained: Path, tmp_path: Path) -> None:
    done = predict(trained, trained / "test" / "case_00000", tmp_path, "--format=dicom-seg")
    assert done.code == 2
    assert "not a DICOM series" in done.text


def test_other_commands_refuse_dicom(trained: Path, archive: Path, tmp_path: Path) -> None:
    done = kitseg(trained, "infer", "--run=runs/two-phase-tiny", f"--data={archive}", "-o", str(tmp_path))
    assert done.code == 2
    assert "kitseg predict" in done.text


def test_real_slices_above_the_kidneys_are_flagged(trained: Path, shared: Path, tmp_path: Path) -> None:
    source = shared / "body" / "dicom"
    shutil.copytree(source, tmp_path / "in" / "a" / "b")
    assert predict(trained, tmp_path / "in", tmp_path / "out").code == 0
    quality = json.loads(one(tmp_path / "out", "series_*.json").read_text())["quality"]
    assert quality["level"] == "red"
    assert "no-kidney" in [flag["name"] for flag in quality["flags"]]


def test_labels_of_another_series_than_the_rule_would_choose(
    trained: Path, archive: Path, planes: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    """Two phases on one grid; which of them is measured: test_which_series.py."""
    array, affine = planes
    for seed, shift in ((1, 0), (2, 50)):
        write_series(tmp_path / "in" / "Zwiebelfisch", array + shift, affine, seed=seed)
    predict(trained, tmp_path / "in", tmp_path / "a")
    rows = list(csv.DictReader((tmp_path / "a" / "series.csv").open()))
    (other,) = (row["case"] for row in rows if row["chosen"] == "no")
    assert predict(trained, tmp_path / "in", tmp_path / "b", f"--series={other}").code == 0
    labels = tmp_path / "b" / f"{other}.nii.gz"
    measured = kitseg(tmp_path, "measure", str(labels), "--ct=in", "--json=m.json")
    assert measured.code == 0, measured.text
    doubts = json.loads((tmp_path / "m.json").read_text())["cases"][other].get("doubts", [])
    assert not [doubt for doubt in doubts if "another scan" in doubt]
    assert kitseg(tmp_path, "report", "b", "in").code == 0


def test_labels_without_their_json_still_name_nobody(
    trained: Path, predicted: Path, archive: Path, tmp_path: Path
) -> None:
    shutil.copy(one(predicted, "series_*.nii.gz"), tmp_path)
    assert kitseg(tmp_path, "report", ".", str(archive)).code == 0
    text = one(tmp_path / "report", "series_*.html").read_bytes()
    assert not [word for word in WORDS if word in text]


def test_an_error_in_a_file_names_nobody(
    trained: Path, planes: tuple[np.ndarray, np.ndarray], predicted: Path, tmp_path: Path
) -> None:
    array, affine = planes
    first = write_series(tmp_path / "in" / "Zwiebelfisch", array, affine, seed=1)[0]
    first.write_bytes(first.read_bytes()[:-500])
    shutil.copy(one(predicted, "series_*.nii.gz"), tmp_path / "labels.nii.gz")
    labels = tmp_path / one(predicted, "series_*.nii.gz").name
    (tmp_path / "labels.nii.gz").rename(labels)
    for verb in (["measure", str(labels), "--ct=in", "--json=m.json", "--csv=m.csv"], ["report", str(labels), "in"]):
        done = kitseg(tmp_path, *verb)
        assert done.code == 1
        assert "can't be read" in done.text
    written = [tmp_path / "m.json", tmp_path / "m.csv", tmp_path / "report" / "index.html"]
    assert not [(path.name, word) for path in written for word in WORDS if word in path.read_bytes()]


def test_nifti_and_dicom_in_one_folder_are_not_guessed_apart(trained: Path, archive: Path, tmp_path: Path) -> None:
    shutil.copytree(archive, tmp_path / "in")
    shutil.copy(trained / "test" / "case_00000" / "imaging.nii.gz", tmp_path / "in" / "scan.nii.gz")
    done = predict(trained, tmp_path / "in", tmp_path / "out")
    assert done.code == 1
    assert "NIfTI scans and DICOM files" in done.text


def test_two_patients_whose_series_were_given_one_uid_both_get_labels(
    trained: Path, planes: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    array, affine = planes
    few = array[:: len(array) // 12]
    write_series(tmp_path / "in" / "a", few, affine, series="one")
    write_series(tmp_path / "in" / "b", few[:, ::-1], affine, series="one", PatientID="another")
    done = predict(trained, tmp_path / "in", tmp_path / "out")
    assert done.code == 0, done.text
    assert len(list((tmp_path / "out").glob("series_*.nii.gz"))) == 2
