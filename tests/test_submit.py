"""KiTS19's submission through the command line: what is refused, in whose words, and what the zip holds."""

from __future__ import annotations

import gzip
import json
import os
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
from conftest import Result, kitseg
from nifti_files import IPL, SHAPE, save

from kitseg.commands.submit import check_submission, write_submission
from kitseg.errors import InputError
from kitseg.labels import find_scheme
from kitseg.volumes.names import case_name

NUMBERS = range(210, 214)
FOUR = "--cases=210-213"


def labels(number: int) -> np.ndarray:
    """A label map with all three labels, different for each case."""
    array = np.zeros(SHAPE, np.uint8)
    array[1], array[2, number - 210, 1:4] = 1, 2
    return array


def file_of(folder: Path, number: int) -> Path:
    return folder / "predictions" / f"{case_name(number)}.nii.gz"


def complaints(result: Result) -> list[str]:
    return [line for line in result.text.splitlines() if line.startswith("✗")]


def submit(folder: Path, *options: str) -> Result:
    return kitseg(folder, "submit", "predictions", "-o", "kits19.zip", FOUR, *options)


def unpacked(folder: Path, name: str) -> nibabel.Nifti1Image:
    with zipfile.ZipFile(folder / "kits19.zip") as archive:
        return nibabel.Nifti1Image.from_bytes(gzip.decompress(archive.read(name)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four scans under ``data`` and their predictions, each right as it is."""
    (tmp_path / "predictions").mkdir()
    for number in NUMBERS:
        scan = tmp_path / "data" / case_name(number)
        scan.mkdir(parents=True)
        save(scan / "imaging.nii.gz", np.full(SHAPE, -1000, np.int16))
        save(file_of(tmp_path, number), labels(number))
    return tmp_path


def test_a_good_submission(folder: Path) -> None:
    save(folder / "predictions" / "case_00007.nii.gz", labels(210))
    result = submit(folder)
    assert result.code == 0, result.text
    assert "left out, not among cases 210-213: case_00007" in result.text
    with zipfile.ZipFile(folder / "kits19.zip") as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [f"prediction_{number:05d}.nii.gz" for number in NUMBERS]
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        for number in NUMBERS:
            assert archive.read(f"prediction_{number:05d}.nii.gz") == file_of(folder, number).read_bytes()
    for number in NUMBERS:
        image = unpacked(folder, f"prediction_{number:05d}.nii.gz")
        np.testing.assert_array_equal(np.asarray(image.dataobj), labels(number))
        np.testing.assert_allclose(image.affine, IPL, atol=1e-4)


def test_kits23_takes_cysts_and_the_ids_of_any_scheme(folder: Path) -> None:
    with_cyst = labels(210)
    with_cyst[0, 0, 0] = 3
    save(file_of(folder, 210), with_cyst)
    own = find_scheme("kidney=5,tumor=9,cyst=7")
    save(file_of(folder, 211), own.to_file[with_cyst])
    file_of(folder, 211).with_name("case_00211.json").write_text(json.dumps({"labels": own.plain()}))
    without = json.dumps({"labels": find_scheme("kits19").plain()})
    file_of(folder, 212).with_name("case_00212.json").write_text(without)
    done = kitseg(folder, "submit", "predictions", "--protocol=kits23")
    assert done.code == 0, done.text
    assert "1 of 4 predictions have no cysts" in done.text
    with zipfile.ZipFile(folder / "kits23.zip") as archive:
        assert archive.namelist() == [f"case_{number:05d}.nii.gz" for number in NUMBERS]
        for name in ("case_00210.nii.gz", "case_00211.nii.gz"):
            image = nibabel.Nifti1Image.from_bytes(gzip.decompress(archive.read(name)))
            np.testing.assert_array_equal(np.asarray(image.dataobj), with_cyst)


def test_predictions_of_nnunet_have_the_ids_of_its_file(folder: Path) -> None:
    """Its file in the folder states 2 for kidney; one with the challenge's ids changes no byte."""
    for stated, same in (({"kidney": 1, "tumor": 2}, True), ({"kidney": 2, "tumor": 1}, False)):
        content = {"labels": {"background": 0, **stated}}
        (folder / "predictions" / "dataset.json").write_text(json.dumps(content))
        result = submit(folder)
        assert result.code == 0, result.text
        with zipfile.ZipFile(folder / "kits19.zip") as archive:
            assert (archive.read("prediction_00210.nii.gz") == file_of(folder, 210).read_bytes()) == same
        written = np.asarray(unpacked(folder, "prediction_00210.nii.gz").dataobj)
        np.testing.assert_array_equal(written, np.array([0, stated["kidney"], stated["tumor"]])[labels(210)])


def test_every_problem_is_named_in_one_call(folder: Path) -> None:
    save(file_of(folder, 210), np.zeros((3, 4, 6), np.uint8))
    file_of(folder, 211).unlink()
    with_cyst = labels(212)
    with_cyst[0, 0, 0] = 3
    save(file_of(folder, 212), with_cyst)
    save(file_of(folder, 213), np.full(SHAPE, 7, np.uint8), IPL + np.array([[0, 0, 0, 5.0]] + [[0.0] * 4] * 3))
    result = submit(folder)
    assert result.code == 1
    grid, missing, cyst, elsewhere, value = complaints(result)
    assert "case_00210: predictions/case_00210.nii.gz: its shape is (3, 4, 6), the scan's (3, 4, 5)" in grid
    assert "Save it with the shape and affine of" in grid
    assert "case_00211: predictions has no prediction of it" in missing
    assert "case_00212: predictions/case_00212.nii.gz: it holds the label 3." in cyst
    assert "a cyst (3 in KiTS23) is kidney there: make it 1" in cyst
    assert "case_00213: " in elsewhere
    assert "its affine differs from the scan's by up to 5 mm" in elsewhere
    assert "it holds the label 7" in value
    assert "0 of 4 cases are valid; kits19.zip was not written" in result.text
    assert {path.name for path in folder.iterdir()} == {"data", "predictions"}


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.full(SHAPE, 0.5, np.float32), "label values 0.5"),
        (np.full(SHAPE, -1, np.int16), "label values -1"),
        (np.full(SHAPE, np.nan, np.float32), "label values nan"),
        (np.zeros((2, *SHAPE), np.uint8), "4 dimensions"),
    ],
)
def test_what_no_label_map_holds(folder: Path, array: np.ndarray, words: str) -> None:
    save(file_of(folder, 211), array)
    (line,) = complaints(submit(folder))
    assert line.startswith("✗ case_00211: predictions/case_00211.nii.gz: ")
    assert words in line


def test_damaged_files_are_named(folder: Path) -> None:
    cut = file_of(folder, 210)
    cut.write_bytes(cut.read_bytes()[:-10])
    file_of(folder, 211).write_bytes(gzip.compress(b"a letter, not labels\n" * 40))
    (folder / "data" / "case_00212" / "imaging.nii.gz").write_bytes(b"")
    (folder / "data" / "case_00213" / "imaging.nii.gz").unlink()
    result = submit(folder)
    assert result.code == 1
    lines = complaints(result)
    assert [line.split()[1] for line in lines] == [f"case_00{number}:" for number in NUMBERS]
    assert "case_00212/imaging.nii.gz: the file is empty" in lines[2]
    assert "kitseg download kits19 --to data --cases 213" in lines[3]
    assert not (folder / "kits19.zip").exists()


@pytest.mark.parametrize("kind", ["not zipped", "floats", "scaled", "turned", "one volume in 4D"])
def test_labels_in_another_form_are_rewritten(folder: Path, kind: str) -> None:
    """What the challenge reads is integers in the scan's own order of axes, with the labels where they were."""
    path, array = file_of(folder, 211), labels(211)
    if kind == "not zipped":
        path.unlink()
        save(path.with_suffix(""), array)
    elif kind == "floats":
        save(path, array.astype(np.float64))
    elif kind == "scaled":
        image = nibabel.Nifti1Image(array * 2, IPL)
        image.header.set_slope_inter(0.5, 0)
        nibabel.save(image, path)
        assert nibabel.load(path).dataobj.slope == 0.5
    elif kind == "turned":
        nibabel.save(nibabel.as_closest_canonical(nibabel.Nifti1Image(array, IPL)), path)
        assert nibabel.load(path).shape != SHAPE
    else:
        save(path, array[..., None])
    assert submit(folder).code == 0
    image = unpacked(folder, "prediction_00211.nii.gz")
    assert image.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(image.dataobj), array)
    np.testing.assert_allclose(image.affine, IPL, atol=1e-4)


def test_the_same_predictions_make_the_same_zip(folder: Path) -> None:
    path = file_of(folder, 210)
    save(path, labels(210).astype(np.float32))  # rewritten, the others copied
    assert submit(folder).code == 0
    first = (folder / "kits19.zip").read_bytes()
    for number in NUMBERS:
        os.utime(file_of(folder, number), (0, 0))
    assert submit(folder).code == 0
    assert (folder / "kits19.zip").read_bytes() == first
    path.unlink()
    assert submit(folder).code == 1
    assert (folder / "kits19.zip").read_bytes() == first, "the old zip stays where there is a problem"


def test_all_background_is_allowed_and_counted(folder: Path) -> None:
    for number in (211, 213):
        save(file_of(folder, number), np.zeros(SHAPE, np.uint8))
    result = submit(folder)
    assert result.code == 0
    assert "2 of 4 predictions contain only background: case_00211, case_00213" in result.text
    assert not unpacked(folder, "prediction_00213.nii.gz").get_fdata().any()


def test_by_default_all_ninety_cases_must_be_there(folder: Path) -> None:
    result = kitseg(folder, "submit")
    assert result.code == 1
    assert "4 of 90 cases are valid" in result.text
    assert [line.split()[1] for line in complaints(result)] == [f"{case_name(n)}:" for n in range(214, 300)]


def test_a_submission_of_no_case_is_refused(tmp_path: Path) -> None:
    for name in ("data", "predictions"):
        (tmp_path / name).mkdir()
        save(tmp_path / name / "patient.nii.gz", labels(210))
    result = kitseg(tmp_path, "submit", "--protocol=kits23")
    assert result.code == 2
    assert "data (patient) have no names of the challenge" in " ".join(result.text.split())
    assert not (tmp_path / "kits23.zip").exists()


def test_a_prediction_that_changes_meanwhile_is_refused(folder: Path) -> None:
    submission = check_submission(folder / "predictions", folder / "data", NUMBERS)
    save(file_of(folder, 212), labels(211))
    with pytest.raises(InputError, match="has changed since it was checked"):
        write_submission(folder / "kits19.zip", submission)
    assert {path.name for path in folder.iterdir()} == {"data", "predictions"}


@pytest.mark.parametrize("name", ["predictions", "kits19.tar", "predictions/case_00210.nii.gz"])
def test_only_a_zip_is_written(folder: Path, name: str) -> None:
    before = file_of(folder, 210).read_bytes()
    result = kitseg(folder, "submit", "predictions", "-o", name, FOUR)
    assert result.code == 2
    assert "must be a .zip file" in result.text
    assert file_of(folder, 210).read_bytes() == before


def test_two_files_of_one_case_are_refused(folder: Path) -> None:
    save(folder / "predictions" / "prediction_00210.nii.gz", labels(210))
    result = submit(folder)
    assert result.code == 2
    assert "case_00210 and prediction_00210 stand for one KiTS case" in result.text
