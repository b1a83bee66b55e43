"""DICOM output: a segmentation matches the voxels of its series in two readers, and contains no patient data."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from conftest import kitseg
from dicom_files import AXIAL, PACKED, WHO, WORDS, edit, hu, uid, write_series
from highdicom.color import CIELabColor
from highdicom.seg import SegmentDescription
from pydicom.dataelem import DataElement
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from scipy import ndimage
from test_dicom import ANY, only

from kitseg.errors import InputError
from kitseg.measurement.findings import Findings
from kitseg.measurement.measure import measure
from kitseg.volumes.dicom.document import patient_line
from kitseg.volumes.dicom.labels import case_of_segmentation, is_of_another_series, read_segmentation
from kitseg.volumes.dicom.segmentation import NOTICE, Algorithm, SegmentedSeries, write_segmentation
from kitseg.volumes.dicom.series import Series, find_series, read_series, stack_of
from kitseg.volumes.dicom.source import WHO as FILED_BY
from kitseg.volumes.nifti import canonical_geometry
from kitseg.volumes.phantom import make_case
from kitseg.volumes.scan import place_on

BY = Algorithm("kitseg two-phase", "0.1.0")
SHAPE = (12, 8, 10)


def random_labels(shape: tuple[int, int, int], highest: int = 2) -> np.ndarray:
    labels = np.random.default_rng(5).integers(0, highest + 1, shape).astype(np.uint8)
    labels[2] = 0  # a slice without
    labels[5][labels[5] == 2] = 0  # and one with kidney only
    return labels


def on_slices(labels: np.ndarray, series: Series) -> dict[str, np.ndarray]:
    """The labels of each slice's file, by its instance: found by places in the patient alone, voxel by voxel."""
    geometry, planes = read_series(series).geometry, {}
    to_voxel = np.linalg.inv(geometry.affine) @ np.diag([-1.0, -1, 1, 1])
    for path in series.files:
        found = pydicom.dcmread(path)
        along_row, along_column = np.reshape(np.array(found.ImageOrientationPatient, float), (2, 3))
        between_rows, between_columns = map(float, found.PixelSpacing)
        rows, columns = np.mgrid[: found.Rows, : found.Columns]
        places = np.array(found.ImagePositionPatient, float) + (
            columns[..., None] * between_columns * along_row + rows[..., None] * between_rows * along_column
        )
        voxels = np.rint(places @ to_voxel[:3, :3].T + to_voxel[:3, 3]).astype(int)
        planes[str(found.SOPInstanceUID)] = labels[tuple(np.moveaxis(voxels, -1, 0))]
    return planes


def classes(found: pydicom.Dataset) -> np.ndarray:
    """kitseg's id of each segment, by its code."""
    ids = {"64033007": 1, "108369006": 2, "367643001": 3}
    codes = [segment.SegmentedPropertyTypeCodeSequence[0].CodeValue for segment in found.SegmentSequence]
    return np.array([0, *(ids[code] for code in codes)], np.uint8)


def by_pydicom(path: Path) -> dict[str, np.ndarray]:
    """Each slice's labels from the bits, by the instance that a frame refers to."""
    found = pydicom.dcmread(path)
    count, rows, columns = int(found.NumberOfFrames), found.Rows, found.Columns
    bits = np.unpackbits(np.frombuffer(found.PixelData, np.uint8), bitorder="little")[: count * rows * columns]
    planes: dict[str, np.ndarray] = {}
    for frame, mask in zip(found.PerFrameFunctionalGroupsSequence, bits.reshape(count, rows, columns), strict=True):
        instance = str(frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID)
        segment = int(frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        planes.setdefault(instance, np.zeros((rows, columns), np.uint8))[mask == 1] = classes(found)[segment]
    return planes


def by_highdicom(path: Path, series: Series) -> dict[str, np.ndarray]:
    instances = [str(pydicom.dcmread(file, stop_before_pixels=True).SOPInstanceUID) for file in series.files]
    found = highdicom.seg.segread(path)
    planes = found.get_pixels_by_source_instance(instances, combine_segments=True, assert_missing_frames_are_empty=True)
    return dict(zip(instances, classes(found)[planes], strict=True))


def write(path: Path, labels: np.ndarray, series: Series, anonymous: bool = False) -> SegmentedSeries:
    """Write a segmentation of a series."""
    findings = measure(labels, canonical_geometry(stack_of(series).native)) if labels.any() else Findings((), ())
    found = SegmentedSeries(series, labels, findings, BY, anonymous=anonymous)
    write_segmentation(path, found)
    return found


def written(folder: Path, labels: np.ndarray, **tags: object) -> pydicom.Dataset:
    """A segmentation of a series with these tags, which lies on it."""
    write_series(folder / "in", hu(), **tags)
    write(folder / "out.dcm", labels, only(folder / "in"))
    if labels.any():
        lies_on(folder / "out.dcm", labels, only(folder / "in"))
    return pydicom.dcmread(folder / "out.dcm")


def lies_on(path: Path, labels: np.ndarray, series: Series) -> None:
    expected, bits, read = on_slices(labels, series), by_pydicom(path), by_highdicom(path, series)
    assert set(bits) <= set(expected) == set(read)
    assert any(plane.any() for plane in expected.values())
    for instance, plane in expected.items():
        assert np.array_equal(read[instance], plane)
        assert np.array_equal(bits.get(instance, np.zeros_like(plane)), plane)


@pytest.mark.parametrize("name", ANY)
def test_it_lies_on_the_series(tmp_path: Path, name: str) -> None:
    write_series(tmp_path / "in", hu(), ANY[name])
    series = only(tmp_path / "in")
    labels = random_labels(read_series(series).array.shape)
    write(tmp_path / "out.dcm", labels, series)
    lies_on(tmp_path / "out.dcm", labels, series)


def test_with_a_second_series_mixed_in_and_a_slice_missing(tmp_path: Path) -> None:
    write_series(tmp_path / "in", hu(seed=2), AXIAL, seed=2)
    write_series(tmp_path / "in", hu(seed=1), seed=1)[7].unlink()
    for series in find_series(tmp_path / "in"):
        labels = random_labels(read_series(series).array.shape)
        write(tmp_path / f"{series.case_id}.dcm", labels, series)
        lies_on(tmp_path / f"{series.case_id}.dcm", labels, series)
        assert len(labels) == 12
        assert len(series.files) == (11 if series.uid == uid("series 1") else 12)


@pytest.mark.parametrize("syntax", PACKED)
def test_on_compressed_series(tmp_path: Path, syntax: str) -> None:
    written(tmp_path, random_labels(SHAPE), syntax=syntax)


def test_a_phantom(tmp_path: Path) -> None:
    array, labels, affine = make_case(seed=3, index=0, matrix=64)
    write_series(tmp_path / "in", array, affine)
    series = only(tmp_path / "in")
    volume = read_series(series)
    assert np.array_equal(volume.array, array)
    np.testing.assert_allclose(volume.geometry.affine, affine, atol=1e-6)
    write(tmp_path / "out.dcm", labels, series)
    lies_on(tmp_path / "out.dcm", labels, series)


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SegmentedSeries]:
    """The segmentation of a phantom with tumors and a cyst, beside its series."""
    folder = tmp_path_factory.mktemp("phantom")
    array, labels, affine = make_case(seed=3, index=0, matrix=64)
    labels[ndimage.binary_erosion(labels == 1, iterations=2)] = 3
    write_series(folder / "in", array, affine, SeriesNumber="7", PatientSex="F")
    return folder, write(folder / "out.dcm", labels, only(folder / "in"))


@pytest.mark.parametrize(("name", "expected"), [("axial", "3 2 0"), ("downwards", "0 2 3"), ("coronal", "")])
def test_the_numbers_of_the_images_from_the_head_downwards(tmp_path: Path, name: str, expected: str) -> None:
    for number, path in enumerate(write_series(tmp_path, hu((4, 8, 10)), ANY[name])):
        if number == 1:
            found = pydicom.dcmread(path)
            found["InstanceNumber"] = DataElement("InstanceNumber", "IS", "Zwiebelfisch", already_converted=True)
            found.save_as(path)
        else:
            edit(path, InstanceNumber=number)
    labels = np.zeros((4, 8, 10), np.uint8)
    found = SegmentedSeries(only(tmp_path), labels, Findings((), ()), BY).image_numbers
    assert " ".join(filter(None, found)) == expected
    assert len(found) == (4 if expected else 0)


def test_a_segment_is_a_kidney_or_a_lesion(phantom: tuple[Path, SegmentedSeries]) -> None:
    folder, made = phantom
    found = highdicom.seg.segread(folder / "out.dcm")
    names = [segment.SegmentLabel for segment in found.SegmentSequence]
    kidneys, lesions = made.findings.kidneys, made.findings.lesions
    assert [kidney.side for kidney in kidneys] == ["right", "left"]
    assert {lesion.kind for lesion in lesions} == {"tumor", "cyst"}
    listed = [f"{lesion.kind.capitalize()} {lesion.number}, {lesion.side} kidney" for lesion in lesions]
    assert sorted(names) == sorted(["Right kidney", "Left kidney", *listed])
    ml = dict(zip([f"{k.side.capitalize()} kidney" for k in kidneys], [k.parenchyma_ml for k in kidneys], strict=True))
    ml |= dict(zip(listed, [lesion.volume_ml for lesion in lesions], strict=True))
    voxel = read_series(made.series).geometry.voxel_ml
    for number, segment in enumerate(found.SegmentSequence, 1):
        count = int(found.get_volume(segment_numbers=[number]).array.sum())
        assert count * voxel == pytest.approx(ml[segment.SegmentLabel])


def test_what_it_says(phantom: tuple[Path, SegmentedSeries]) -> None:
    found = pydicom.dcmread(phantom[0] / "out.dcm")
    for segment in found.SegmentSequence:
        kind, name = segment.SegmentedPropertyTypeCodeSequence[0], segment.SegmentLabel
        kidney = kind.CodeValue == "64033007"
        sides = kind.get("SegmentedPropertyTypeModifierCodeSequence")
        if not kidney:
            assert segment.AnatomicRegionSequence[0].CodeMeaning == "Kidney"
            sides = segment.AnatomicRegionSequence[0].get("AnatomicRegionModifierSequence")
        assert sides[0].CodeMeaning.lower() in name.lower()
        shown = CIELabColor.from_dicom_value(segment.RecommendedDisplayCIELabValue).to_rgb()
        wanted = bytes.fromhex({"64033007": "2ecc40", "108369006": "ff2d2d", "367643001": "39a9ff"}[kind.CodeValue])
        assert np.abs(np.subtract(shown, list(wanted))).max() <= 3
        assert segment.SegmentAlgorithmType == "AUTOMATIC"
        assert segment.SegmentAlgorithmName == BY.name
    assert found.StudyInstanceUID == uid("study")
    assert found.ReferencedSeriesSequence[0].SeriesInstanceUID == uid("series 1")
    assert found.FrameOfReferenceUID == uid("frame", "study")
    assert found.SeriesDescription == "kitseg kidney, tumor, cyst, research use"
    assert found.ContentDescription == NOTICE
    assert "not a medical device" in NOTICE
    assert (found.ContentCreatorName, found.SeriesNumber) == ("kitseg^software", 9007)
    assert found.StudyDescription == WHO["StudyDescription"]


def test_lesions_that_are_too_small_to_be_listed_are_one_segment(tmp_path: Path) -> None:
    labels = np.zeros(SHAPE, np.uint8)
    labels[2:8, 1:7, 1:9] = 1
    labels[3, 2, 2] = labels[6, 5, 7] = 2
    segments = written(tmp_path, labels).SegmentSequence
    assert [segment.SegmentLabel for segment in segments] == ["Left kidney", "Tumor, smallest"]


def test_it_is_read_back(phantom: tuple[Path, SegmentedSeries]) -> None:
    folder, made = phantom
    found, scan = read_segmentation(folder / "out.dcm", "a"), read_series(made.series)
    assert case_of_segmentation(folder / "out.dcm") == made.series.case_id
    assert found.array.shape[0] < scan.array.shape[0]
    placed = place_on(found, scan)
    assert placed.geometry.same_as(scan.geometry)
    assert np.array_equal(placed.array, made.labels)


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL"])
def test_a_segmentation_of_others(tmp_path: Path, kind: str) -> None:
    """Overlapping segments; one of another organ, and one that isn't anything of kidneys."""
    write_series(tmp_path / "in", hu())
    sources = [pydicom.dcmread(path) for path in only(tmp_path / "in").files]
    sct = codes.SCT
    kinds = [(sct.Neoplasm, [sct.Kidney]), (codes.SCT.Kidney, None), (sct.Neoplasm, [sct.Liver]), (sct.Spleen, None)]
    masks = np.zeros((12, 8, 10, 4), np.float32 if kind == "FRACTIONAL" else np.uint8)
    masks[2:6, 2:6, 2:6, 1], masks[3:5, 3:5, 3:9, 0], masks[7, 1:3, 1:3, 2], masks[8, 1:3, 1:3, 3] = 1, 1, 1, 1
    segments = [
        SegmentDescription(n, f"Zwiebelfisch {n}", sct.MorphologicallyAbnormalStructure, code, "MANUAL", None,
                           anatomic_regions=region)
        for n, (code, region) in enumerate(kinds, 1)
    ]  # fmt: skip
    highdicom.seg.Segmentation(
        sources, masks, kind, segments, highdicom.UID(), 5, highdicom.UID(), 1, "maker", "model", "1", "0",
        **({"fractional_type": "PROBABILITY"} if kind == "FRACTIONAL" else {}),
    ).save_as(tmp_path / "IM01")  # fmt: skip
    expected = np.zeros(SHAPE, np.uint8)
    expected[2:6, 2:6, 2:6], expected[3:5, 3:5, 3:9] = 1, 2
    series = only(tmp_path / "in")
    found = place_on(read_segmentation(tmp_path / "IM01", "a"), read_series(series))
    planes = on_slices(found.array, series)
    assert all(np.array_equal(planes[str(one.SOPInstanceUID)], expected[k]) for k, one in enumerate(sources))
    assert case_of_segmentation(tmp_path / "IM01") == series.case_id


@pytest.mark.parametrize("mass", [codes.SCT.Mass, Code("M-03000", "SRT", "Mass")])
def test_masses_and_what_else_is_in_a_kidney(tmp_path: Path, mass: Code) -> None:
    """A mass is a tumor; a segment in a kidney that is something else is left out, but not in silence."""
    write_series(tmp_path / "in", hu())
    sources, sct = [pydicom.dcmread(path) for path in only(tmp_path / "in").files], codes.SCT
    kinds = [(sct.Kidney, None), (mass, [sct.Kidney]), (sct.Necrosis, [sct.Kidney]), (sct.Necrosis, [sct.Liver])]
    masks = np.zeros((12, 8, 10, 4), np.uint8)
    for n in range(4):
        masks[2 * n : 2 * n + 2, ..., n] = 1
    segments = [
        SegmentDescription(n, "a", sct.MorphologicallyAbnormalStructure, code, "MANUAL", None, anatomic_regions=region)
        for n, (code, region) in enumerate(kinds, 1)
    ]
    highdicom.seg.Segmentation(
        sources, masks, "BINARY", segments, highdicom.UID(), 5, highdicom.UID(), 1, "maker", "model", "1", "0"
    ).save_as(tmp_path / "seg.dcm")
    done = kitseg(tmp_path, "measure", "seg.dcm", "--ct=in", "--json=m.json")
    assert done.code == 0, done.text
    (case,) = json.loads((tmp_path / "m.json").read_text())["cases"].values()
    assert [lesion["kind"] for lesion in case["lesions"]] == ["tumor"]
    assert case["lesions"][0]["volume_ml"] == pytest.approx(2 * 8 * 10 * 0.8 * 0.7 * 2.5 / 1000, abs=1e-3)
    assert [doubt for doubt in case["doubts"] if doubt.startswith("1 of its segments in a kidney")]


@pytest.mark.parametrize("damage", ["cut", "codes", "positions", "far"])
def test_a_broken_segmentation(tmp_path: Path, damage: str) -> None:
    found = written(tmp_path, random_labels(SHAPE))
    if damage == "cut":
        found.PixelData = found.PixelData[:4]
    for segment in found.SegmentSequence if damage == "codes" else []:
        segment.SegmentedPropertyTypeCodeSequence[0].CodeValue = "1234"
    for n, frame in enumerate(found.PerFrameFunctionalGroupsSequence):
        if damage in ("positions", "far"):
            place = [0, 0, n**2 * 0.37 if damage == "positions" else 1e9 * (n > 3)]
            frame.PlanePositionSequence[0].ImagePositionPatient = place
    found.save_as(tmp_path / "broken.dcm")
    with pytest.raises(InputError) as caught:
        read_segmentation(tmp_path / "broken.dcm", "a")
    assert not [word for word in WORDS if word.decode() in str(caught.value)]


def test_no_kidney_at_all(tmp_path: Path) -> None:
    written(tmp_path, np.zeros(SHAPE, np.uint8))
    planes = by_pydicom(tmp_path / "out.dcm")
    assert len(planes) == 12
    assert not any(plane.any() for plane in planes.values())
    assert not any(plane.any() for plane in by_highdicom(tmp_path / "out.dcm", only(tmp_path / "in")).values())


def test_nothing_identifies_the_patient(tmp_path: Path) -> None:
    write_series(tmp_path / "Zwiebelfisch", hu())
    write(tmp_path / "out.dcm", random_labels(SHAPE), only(tmp_path / "Zwiebelfisch"), anonymous=True)
    written = (tmp_path / "out.dcm").read_bytes()
    for word in WORDS:
        assert word not in written, word
    found = pydicom.dcmread(tmp_path / "out.dcm")
    assert all(not found.get(name) for name in WHO)


def test_it_joins_the_patient_and_the_study(tmp_path: Path) -> None:
    who = {"SpecificCharacterSet": "ISO_IR 192", "PatientName": "Zwiebelfisch^Hännelore", "IssuerOfPatientID": "KB"}
    found = written(tmp_path, random_labels(SHAPE), **who)
    assert found.PatientName == "Zwiebelfisch^Hännelore"
    source = pydicom.dcmread(only(tmp_path / "in").files[0])
    kept = {*FILED_BY, "StudyDescription", "IssuerOfPatientID", "StudyInstanceUID", "FrameOfReferenceUID"}
    assert all(found[name].value == source[name].value for name in kept)
    content = (tmp_path / "out.dcm").read_bytes()
    others = {word for name, value in WHO.items() if name not in kept for word in value.split("^")}
    assert others
    assert not [word for word in others if word.encode() in content]


@pytest.mark.parametrize(
    ("charset", "name"),
    [
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        (["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞=홍^길동"),
        ("ISO_IR 6", "Buc^Jerome"),
        ("ISO IR 100", "Buc^Jérôme"),
        ("GB18030", "Wang^XiaoDong=王^小东"),
    ],
)
def test_identifiers_of_any_character_set(tmp_path: Path, charset: object, name: str) -> None:
    with warnings.catch_warnings(action="ignore"):  # of a misspelt character set
        who = {"SpecificCharacterSet": charset, "PatientName": name}
        found = written(tmp_path, random_labels(SHAPE), **who)
    assert found.PatientName == name
    assert found.SpecificCharacterSet == "ISO_IR 192"


def test_identifiers_that_dicom_does_not_allow(tmp_path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):
        who = {"StudyDate": "23.8.19", "PatientBirthDate": "1931", "StudyTime": "7:13", "PatientID": "P" * 80}
        found = written(tmp_path, random_labels(SHAPE), AccessionNumber="A" * 30, **who)
    assert (found.StudyDate, found.PatientBirthDate, found.StudyTime, found.PatientID) == ("", "", "", "P" * 80)


def test_backslashes_in_identifiers_stay_as_they_are(tmp_path: Path) -> None:
    """DICOM allows them in none of these; a PACS files by what is there."""
    who = {"StudyDescription": "CT ABD\\PELVIS", "PatientID": "P\\1", "AccessionNumber": "A\\2"}
    found = written(tmp_path, random_labels(SHAPE), **who)
    assert {name: "\\".join(found[name].value) for name in who} == who
    assert written(tmp_path, random_labels(SHAPE), PatientName="A^B\\C").PatientName == "A^B C"


def test_the_line_that_states_whose_a_document_is(tmp_path: Path) -> None:
    write_series(tmp_path, hu(), StudyDate="2019.08.23", PatientID="P\\1")
    found = SegmentedSeries(only(tmp_path), random_labels(SHAPE), Findings((), ()), BY)
    assert patient_line(found) == "Zwiebelfisch Hannelore, P\\1, born 1931-04-17, study of 2019-08-23"
    assert patient_line(replace(found, anonymous=True)) == ""


def test_what_is_no_uid_is_replaced_without_a_warning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    paths = write_series(tmp_path / "in", hu())
    with warnings.catch_warnings(action="ignore"):
        for k, path in enumerate(paths):
            names = {"SOPInstanceUID": f"Zwiebelfisch {k}", "FrameOfReferenceUID": "Zwiebelfisch"}
            edit(path, **names, StudyInstanceUID="PID-4711-XYZ", SeriesInstanceUID="ALIAS-99")
    recwarn.clear()
    write(tmp_path / "out.dcm", random_labels(SHAPE), only(tmp_path / "in"), anonymous=True)
    assert not is_of_another_series(tmp_path / "out.dcm", paths[0])
    assert not recwarn.list
    assert capfd.readouterr() == ("", "")
    content = (tmp_path / "out.dcm").read_bytes()
    assert not [word for word in WORDS if word in content]
    assert pydicom.dcmread(tmp_path / "out.dcm").StudyInstanceUID.startswith("2.25.")


def test_files_without_uids(tmp_path: Path) -> None:
    nameless = {"SeriesInstanceUID": "", "StudyInstanceUID": "", "FrameOfReferenceUID": ""}
    assert written(tmp_path, random_labels(SHAPE), **nameless).StudyInstanceUID.startswith("2.25.")


def test_a_series_that_makes_no_volume(tmp_path: Path) -> None:
    write_series(tmp_path / "in", hu((2, 4, 4)))
    with pytest.raises(InputError, match="2 slices, fewer than the 3"):
        write(tmp_path / "out.dcm", np.zeros((2, 4, 4), np.uint8), only(tmp_path / "in"))
    assert not list(tmp_path.glob("*.dcm"))


def test_a_real_series(shared: Path, tmp_path: Path) -> None:
    series = only(shared / "body" / "dicom")
    labels = np.zeros((20, 512, 512), np.uint8)
    labels[4:9, 100:200, 50:90], labels[6:8, 120:140, 60:70] = 1, 2
    write(tmp_path / "out.dcm", labels, series)
    planes = by_pydicom(tmp_path / "out.dcm")
    assert [str(header.instance) in planes for header in series.headers[::-1]] == [4 <= k < 9 for k in range(20)]
    stacked = np.stack([planes[header.instance] for header in series.headers[::-1] if header.instance in planes])
    assert np.array_equal(stacked, labels[4:9])
