"""Which files belong to which case."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from dicom_files import hu, write_series

from kitseg.errors import InputError, UsageError
from kitseg.labels import KITS19
from kitseg.types import Case, Geometry
from kitseg.volumes import kits
from kitseg.volumes.names import case_number, pair
from kitseg.volumes.nifti import write_labels, write_volume
from kitseg.volumes.tables import read_patients


def touch(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two whole cases, one without labels, one without image, and things that are no cases."""
    folder = tmp_path / "data"
    for name in ("case_00002", "case_00000"):
        touch(folder / name / "imaging.nii.gz", folder / name / "segmentation.nii.gz")
    touch(folder / "case_00210" / "imaging.nii.gz", folder / "case_00003" / "segmentation.nii.gz")
    touch(folder / "kits.json", folder / "notes" / "a.txt")
    return folder


def test_a_case_that_is_not_there_is_reported_with_the_table_that_names_it(data: Path, tmp_path: Path) -> None:
    more = tmp_path / "more"
    touch(more / "case_00007" / "imaging.nii.gz", more / "case_00007" / "segmentation.nii.gz")
    for folder, names in ((data, ("case_00000", "case_00007")), (more, ("case_00007", "case_00008"))):
        (folder / "patients.csv").write_text("case,patient\n" + "".join(f"{name},Ann\n" for name in names))
    with pytest.raises(InputError, match=r"more/patients\.csv: names case_00008, which no data folder holds"):
        kits.labelled_cases([data, more])


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("case_00210", 210),
        ("prediction_00007", 7),
        ("imaging_00210", 210),
        ("case_00210_0000", 210),
        *((name, None) for name in ("00210", "P12345_venous", "pat_20101", "series_06181", "case_210", "case_00210_b")),
    ],
)
def test_only_the_challenges_names_have_a_number(name: str, number: int | None) -> None:
    assert case_number(name) == number


@pytest.mark.parametrize(
    ("names", "others", "pairs"),
    [
        ("P12345_arterial P12345_venous", "P12345_venous P12345_arterial", "P12345_arterial P12345_venous"),
        ("bern_00012", "zurich_00012", ""),
        ("prediction_00007 case_00210", "case_00210 case_00007", "case_00210 case_00007"),
        ("case_00007 prediction_00007", "prediction_00007 case_00007", "case_00007 prediction_00007"),
        ("case_00007 prediction_00007", "case_00007", None),
        ("case_00007", "prediction_00007 imaging_00007", None),
    ],
)
def test_pairs_have_equal_names_or_the_challenges_numbers(names: str, others: str, pairs: str | None) -> None:
    for here, there in ((names, others), (others, names)):
        if pairs is None:
            with pytest.raises(UsageError, match="stand for one KiTS case"):
                pair(here.split(), there.split())
        else:
            found = pair(here.split(), there.split())
            assert sorted(found) == sorted(name for name in here.split() if pairs)
            assert set(found.values()) == set(there.split() if pairs else ())


def test_scan_id() -> None:
    assert kits.scan_id(Path("data/case_00001/imaging.nii.gz")) == "case_00001"
    assert kits.scan_id(Path("scans/patient.7.nii.gz")) == "patient.7"
    assert kits.scan_id(Path("scans/PATIENT.NII")) == "PATIENT"


def test_scan_id_of_a_file_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "case_00005").mkdir()
    monkeypatch.chdir(tmp_path / "case_00005")
    assert kits.scan_id(Path("imaging.nii.gz")) == "case_00005"


def test_kits_layout(data: Path) -> None:
    assert kits.find_cases(data) == [
        Case(name, data / name / "imaging.nii.gz", data / name / "segmentation.nii.gz" if labelled else None)
        for name, labelled in (("case_00000", True), ("case_00002", True), ("case_00210", False))
    ]


def test_a_case_without_image_is_listed_but_not_found(data: Path) -> None:
    assert [case.id for case in kits.list_cases(data)] == ["case_00000", "case_00002", "case_00003", "case_00210"]
    assert "case_00003" not in [case.id for case in kits.find_cases(data)]


def test_flat_folder(tmp_path: Path) -> None:
    touch(tmp_path / "b.nii", tmp_path / "a.nii.gz", tmp_path / "readme.txt", tmp_path / ".12.a.nii.gz")
    assert kits.find_cases(tmp_path) == [Case("a", tmp_path / "a.nii.gz"), Case("b", tmp_path / "b.nii")]


def test_a_case_folder_is_a_case(data: Path) -> None:
    assert kits.find_cases(data / "case_00002") == [kits.case_of(data / "case_00002")]


@pytest.mark.parametrize("find", [kits.find_cases, kits.list_cases, kits.find_labels])
def test_nothing_to_find(tmp_path: Path, find) -> None:
    with pytest.raises(InputError, match=r"the folder holds no .*\. Give .*case_00000/"):
        find(tmp_path)
    with pytest.raises(InputError, match="there is no such folder"):
        find(tmp_path / "missing")


@pytest.mark.parametrize("find", [kits.find_cases, kits.list_cases])
def test_a_file_is_no_folder(tmp_path: Path, find) -> None:
    touch(tmp_path / "a.nii.gz")
    with pytest.raises(InputError, match="it is a file"):
        find(tmp_path / "a.nii.gz")


def test_a_single_label_map(tmp_path: Path) -> None:
    for path, name in (("prediction_00210.nii.gz", "prediction_00210"), ("P1/segmentation.nii.gz", "P1")):
        touch(tmp_path / path)
        assert kits.find_labels(tmp_path / path) == {name: tmp_path / path}


def test_case_folders_without_any_image(tmp_path: Path) -> None:
    touch(tmp_path / "case_00003" / "segmentation.nii.gz")
    with pytest.raises(InputError, match=r"none of its case folders holds imaging\.nii\.gz"):
        kits.find_cases(tmp_path)


def test_collect_files_folders_and_cases(data: Path, tmp_path: Path) -> None:
    touch(tmp_path / "one" / "x.nii.gz", tmp_path / "flat" / "y.nii", tmp_path / "flat" / "z.nii.gz")
    scans = kits.collect_scans([tmp_path / "one" / "x.nii.gz", data / "case_00002", tmp_path / "flat"])
    assert [scan.id for scan in scans] == ["case_00002", "x", "y", "z"]
    assert scans[0].image == data / "case_00002" / "imaging.nii.gz"


def test_the_same_scan_twice_counts_once(data: Path) -> None:
    image = data / "case_00000" / "imaging.nii.gz"
    scans = kits.collect_scans([data, data / "case_00000", image])
    assert [scan.id for scan in scans] == ["case_00000", "case_00002", "case_00210"]


def test_two_scans_of_one_name(data: Path, tmp_path: Path) -> None:
    touch(tmp_path / "flat" / "case_00000.nii.gz")
    with pytest.raises(UsageError) as caught:
        kits.collect_scans([data, tmp_path / "flat"])
    assert str(data / "case_00000" / "imaging.nii.gz") in str(caught.value)
    assert str(tmp_path / "flat" / "case_00000.nii.gz") in str(caught.value)


def test_a_scan_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        kits.collect_scans([tmp_path / "a.nii.gz"])


def test_labels_in_the_kits_layout(data: Path) -> None:
    names = ("case_00000", "case_00002", "case_00003")
    assert kits.find_labels(data) == {name: data / name / "segmentation.nii.gz" for name in names}


def test_the_majority_of_the_annotators_of_kits21(data: Path) -> None:
    folder = next(path for path in sorted(data.iterdir()) if (path / "segmentation.nii.gz").exists())
    for name in ("AND", "MAJ", "OR"):
        (folder / f"aggregated_{name}_seg.nii.gz").write_bytes(b"")
    (folder / "segmentation.nii.gz").unlink()
    label = folder / "aggregated_MAJ_seg.nii.gz"
    assert next(case.label for case in kits.find_cases(data) if case.id == folder.name) == label
    assert kits.find_labels(data)[folder.name] == label


def test_a_file_and_a_folder_of_one_name_are_not_one_case(data: Path) -> None:
    touch(data / "case_00000.nii.gz")
    for find in (kits.find_labels, kits.list_cases):
        with pytest.raises(UsageError, match=r"case_00000.* are both called case_00000"):
            find(data)


def test_label_maps_of_another_folder(tmp_path: Path) -> None:
    touch(*(tmp_path / "scans" / f"{name}.nii.gz" for name in ("P12345_arterial", "P12345_venous", "P2")))
    touch(*(tmp_path / "masks" / f"{name}.nii.gz" for name in ("P12345_arterial", "P12345_venous", "P3")))
    cases = kits.with_labels(kits.list_cases(tmp_path / "scans"), tmp_path / "masks")
    assert {case.id: case.label and case.label.name for case in cases} == {
        "P12345_arterial": "P12345_arterial.nii.gz",
        "P12345_venous": "P12345_venous.nii.gz",
        "P2": None,
    }
    assert kits.left_out([tmp_path / "scans"], cases, tmp_path / "masks") == [
        f"ignored: 1 label maps in {tmp_path / 'masks'} without a scan: P3",
        "1 of 3 scans have no label map: P2",
    ]
    assert len(kits.labelled_cases([tmp_path / "scans"], tmp_path / "masks")) == 2


def test_a_raw_data_set_of_nnunet(tmp_path: Path) -> None:
    touch(
        *(tmp_path / path for path in ("imagesTr/k_1_0000.nii.gz", "labelsTr/k_1.nii.gz", "imagesTs/k_2_0000.nii.gz"))
    )
    touch(tmp_path / "dataset.json")
    (case,) = kits.list_cases(tmp_path)
    assert (case.id, case.label) == ("k_1", tmp_path / "labelsTr" / "k_1.nii.gz")
    assert kits.find_labels(tmp_path) == {"k_1": tmp_path / "labelsTr" / "k_1.nii.gz"}
    assert [one.id for one in kits.collect_scans([tmp_path / "imagesTs"])] == ["k_2"]
    assert kits.left_out([tmp_path], [case]) == [f"ignored: 1 NIfTI files in {tmp_path / 'imagesTs'}"]


def test_of_the_channels_of_nnunet_the_first_is_the_scan(tmp_path: Path) -> None:
    touch(*(tmp_path / "imagesTr" / f"{name}.nii.gz" for name in ("a_0000", "a_0001", "b_0000", "b_0001", "c_0001")))
    (tmp_path / "dataset.json").write_text('{"channel_names": {"0": "CT", "1": "PET"}}')
    cases = kits.list_cases(tmp_path)
    assert [case.id for case in cases] == ["a", "b", "c_0001"]
    ignored = f"ignored: 2 files of other channels than 0 in {tmp_path / 'imagesTr'}: 1 (PET)"
    assert kits.left_out([tmp_path], cases, labels=False) == [ignored]
    (tmp_path / "dataset.json").unlink()
    assert kits.left_out([tmp_path / "imagesTr"], cases, labels=False) == [ignored.replace(" (PET)", "")]


def test_two_formats_of_one_name(tmp_path: Path) -> None:
    """Scans of one name are an error, kitseg's own label maps are one, and a segmentation of 3D Slicer is no scan."""
    labels, grid = np.zeros((3, 4, 5), np.uint8), Geometry((5, 4, 3), np.eye(4))
    write_labels(tmp_path / "own" / "p.nii.gz", labels, grid)
    for ending in (".mha", ".seg.nrrd"):
        write_volume(tmp_path / "own" / f"p{ending}", labels, grid, KITS19)
    assert kits.find_labels(tmp_path / "own") == {"p": tmp_path / "own" / "p.nii.gz"}
    touch(tmp_path / "scans" / "p.nrrd", tmp_path / "scans" / "p.seg.nrrd")
    (tmp_path / "scans" / "p.seg.nrrd").write_bytes(b"NRRD0004\n")
    (case,) = kits.list_cases(tmp_path / "scans")
    assert case.image.name == "p.nrrd"
    ignored = f"ignored: 1 segmentations in {tmp_path / 'scans'}: p.seg.nrrd"
    assert kits.left_out([tmp_path / "scans"], [case], labels=False) == [ignored]
    (tmp_path / "scans" / "p.nrrd").write_bytes(b"NRRD0004\n")
    (tmp_path / "own" / "p.nii.gz").rename(tmp_path / "scans" / "p.nii.gz")
    for find in (kits.list_cases, kits.find_labels):
        with pytest.raises(UsageError, match="both called p"):
            find(tmp_path / "scans")


def test_a_name_that_cannot_be_shown_is_spelt_out(tmp_path: Path) -> None:
    for name in ("M\udcfcller.nii.gz", "red\x1b[31m\n.nii.gz", "[bold]ü.nii.gz"):
        touch(tmp_path / name)
    expected = ["M\\udcfcller", "[bold]ü", "red\\x1b[31m\\n"]
    assert list(kits.find_labels(tmp_path)) == expected
    assert [case.id for case in kits.list_cases(tmp_path)] == expected


def test_names_from_macos_and_linux_are_equal(tmp_path: Path) -> None:
    for form in ("NFC", "NFD"):
        touch(tmp_path / form / f"{unicodedata.normalize(form, 'Müller')}.nii.gz")
        assert list(kits.find_labels(tmp_path / form)) == ["Müller"]
        assert [case.id for case in kits.list_cases(tmp_path / form)] == ["Müller"]
    assert not (tmp_path / "NFD" / "Müller.nii.gz").exists()


def test_case_folders_whose_files_are_not_zipped(tmp_path: Path) -> None:
    folder = tmp_path / "case_00001"
    touch(folder / "imaging.nii", folder / "segmentation.nii")
    assert kits.find_cases(tmp_path) == [Case("case_00001", folder / "imaging.nii", folder / "segmentation.nii")]
    assert kits.find_labels(tmp_path) == {"case_00001": folder / "segmentation.nii"}
    assert kits.scan_id(folder / "imaging.nii") == "case_00001"


@pytest.mark.parametrize(
    "text",
    ["case,patient\na,1\nb,2\n", "case;patient\r\na;1\r\nb;2\r\n;;\r\n", "\ufeffPatient\tCASE\n1\ta\n2\tb\n"],
)
def test_patients_as_spreadsheets_write_them(tmp_path: Path, text: str) -> None:
    (tmp_path / "patients.csv").write_text(text, encoding="utf-8", newline="")
    assert read_patients(tmp_path / "patients.csv") == {"a": "1", "b": "2"}


@pytest.mark.parametrize(("text", "fact"), [("case;name\na;1\n", "columns case and patient"), ("case;Mü", "not UTF-8")])
def test_a_table_of_patients_that_is_none(tmp_path: Path, text: str, fact: str) -> None:
    (tmp_path / "patients.csv").write_text(text, encoding="cp1252")
    with pytest.raises(InputError, match=fact):
        read_patients(tmp_path / "patients.csv")


def test_a_folder_of_something_else_is_named(tmp_path: Path) -> None:
    touch(tmp_path / "zip" / "study.zip")
    write_series(tmp_path / "dicom", hu((3, 4, 4)))
    for folder, fact in (
        ("zip", "but the archive study.zip. Unpack it"),
        ("dicom", "DICOM files. Only `kitseg predict`"),
    ):
        with pytest.raises(InputError, match=fact):
            kits.list_cases(tmp_path / folder)


def test_the_subfolders_that_hold_scans_are_named(tmp_path: Path) -> None:
    for file in ("scans/case_00000/imaging.nii.gz", "flat/a.nii.gz", "runs/a/config.yaml"):
        touch(tmp_path / file)
    with pytest.raises(InputError, match=r"Give a subfolder \(flat, scans\); "):
        kits.find_cases(tmp_path)
    for number in range(6):
        touch(tmp_path / f"patient{number}" / "ct.nii.gz")
    with pytest.raises(InputError, match=r"\(flat, patient0, patient1, patient2, patient3 and 3 more\)"):
        kits.find_cases(tmp_path)


def test_broken_links_pipes_and_folders_are_scans_that_reading_refuses(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").symlink_to("nowhere")
    (tmp_path / "b.nii.gz").symlink_to("b.nii.gz")
    (tmp_path / "c.nii.gz").mkdir()
    os.mkfifo(tmp_path / "d.nii.gz")
    assert [case.id for case in kits.find_cases(tmp_path)] == ["a", "b", "c", "d"]
    assert list(kits.find_labels(tmp_path)) == ["a", "b", "c", "d"]
    assert [case.id for case in kits.collect_scans([tmp_path])] == ["a", "b", "c", "d"]
