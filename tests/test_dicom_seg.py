"""DICOM output: a segmentation matches the voxels of its series in two readers, and contains no patient data."""

from __future__ import annotations

import warnings
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from dicom_files import AXIAL, PACKED, WHO, WORDS, edit, hu, uid, write_series
from test_dicom import ANY, only

from kitseg.errors import InputError
from kitseg.volumes.dicom.segmentation import NOTICE, Algorithm, write_segmentation
from kitseg.volumes.dicom.series import Series, find_series, read_series
from kitseg.volumes.phantom import make_case

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


def by_pydicom(path: Path) -> dict[str, np.ndarray]:
    """Each slice's labels from the bits, by the instance that a frame refers to."""
    found = pydicom.dcmread(path)
    count, rows, columns = int(found.NumberOfFrames), found.Rows, found.Columns
    bits = np.unpackbits(np.frombuffer(found.PixelData, np.uint8), bitorder="little")[: count * rows * columns]
    planes: dict[str, np.ndarray] = {}
    for frame, mask in zip(found.PerFrameFunctionalGroupsSequence, bits.reshape(count, rows, columns), strict=True):
        instance = str(frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID)
        segment = int(frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        planes.setdefault(instance, np.zeros((rows, columns), np.uint8))[mask == 1] = segment
    return planes


def by_highdicom(path: Path, series: Series) -> dict[str, np.ndarray]:
    instances = [str(pydicom.dcmread(file, stop_before_pixels=True).SOPInstanceUID) for file in series.files]
    planes = highdicom.seg.segread(path).get_pixels_by_source_instance(
        instances, combine_segments=True, assert_missing_frames_are_empty=True
    )
    return dict(zip(instances, planes, strict=True))


def written(folder: Path, labels: np.ndarray, keep_identifiers: bool = False, **tags: object) -> pydicom.Dataset:
    """A segmentation of a series with these tags, which lies on it."""
    write_series(folder / "in", hu(), **tags)
    write_segmentation(folder / "out.dcm", labels, only(folder / "in"), BY, keep_identifiers)
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
    write_segmentation(tmp_path / "out.dcm", labels, series, BY)
    lies_on(tmp_path / "out.dcm", labels, series)


def test_with_a_second_series_mixed_in_and_a_slice_missing(tmp_path: Path) -> None:
    write_series(tmp_path / "in", hu(seed=2), AXIAL, seed=2)
    write_series(tmp_path / "in", hu(seed=1), seed=1)[7].unlink()
    for series in find_series(tmp_path / "in"):
        labels = random_labels(read_series(series).array.shape)
        write_segmentation(tmp_path / f"{series.case_id}.dcm", labels, series, BY)
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
    write_segmentation(tmp_path / "out.dcm", labels, series, BY)
    lies_on(tmp_path / "out.dcm", labels, series)


def test_what_it_says(tmp_path: Path) -> None:
    written(tmp_path, random_labels(SHAPE))
    found = highdicom.seg.segread(tmp_path / "out.dcm")
    assert [found.get_segment_description(n).segment_label for n in found.segment_numbers] == ["kidney", "tumor"]
    kidney, tumor = found.SegmentSequence
    assert kidney.SegmentAlgorithmType == tumor.SegmentAlgorithmType == "AUTOMATIC"
    assert kidney.SegmentedPropertyTypeCodeSequence[0].CodeValue == "64033007"
    assert tumor.SegmentedPropertyTypeCodeSequence[0].CodeValue == "108369006"
    assert tumor.AnatomicRegionSequence[0].CodeMeaning == "Kidney"
    assert kidney.SegmentAlgorithmName == BY.name
    assert found.StudyInstanceUID == uid("study")
    assert found.ReferencedSeriesSequence[0].SeriesInstanceUID == uid("series 1")
    assert found.FrameOfReferenceUID == uid("frame", "study")
    assert found.SeriesDescription == found.ContentDescription == NOTICE
    assert "not a medical device" in NOTICE


def test_cysts_are_a_segment_where_there_are_any(tmp_path: Path) -> None:
    segments = written(tmp_path, random_labels(SHAPE, highest=3)).SegmentSequence
    assert [segment.SegmentLabel for segment in segments] == ["kidney", "tumor", "cyst"]


def test_no_kidney_at_all(tmp_path: Path) -> None:
    written(tmp_path, np.zeros(SHAPE, np.uint8))
    planes = by_pydicom(tmp_path / "out.dcm")
    assert len(planes) == 12
    assert not any(plane.any() for plane in planes.values())
    assert not any(plane.any() for plane in by_highdicom(tmp_path / "out.dcm", only(tmp_path / "in")).values())


def test_nothing_identifies_the_patient(tmp_path: Path) -> None:
    write_series(tmp_path / "Zwiebelfisch", hu())
    write_segmentation(tmp_path / "out.dcm", random_labels(SHAPE), only(tmp_path / "Zwiebelfisch"), BY)
    written = (tmp_path / "out.dcm").read_bytes()
    for word in WORDS:
        assert word not in written, word
    found = pydicom.dcmread(tmp_path / "out.dcm")
    assert all(not found.get(name) for name in WHO)


def test_identifiers_are_kept_when_asked(tmp_path: Path) -> None:
    who = {"SpecificCharacterSet": "ISO_IR 192", "PatientName": "Zwiebelfisch^Hännelore"}
    found = written(tmp_path, random_labels(SHAPE), keep_identifiers=True, **who)
    assert found.PatientName == "Zwiebelfisch^Hännelore"
    assert (found.PatientID, found.StudyDate, found.PatientSex) == ("PID-4711-XYZ", "20190823", "F")


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
        found = written(tmp_path, random_labels(SHAPE), keep_identifiers=True, **who)
    assert found.PatientName == name
    assert found.SpecificCharacterSet == "ISO_IR 192"


def test_identifiers_that_dicom_does_not_allow(tmp_path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):
        who = {"StudyDate": "23.8.19", "PatientBirthDate": "1931", "StudyTime": "7:13", "PatientID": "P" * 80}
        found = written(tmp_path, random_labels(SHAPE), keep_identifiers=True, AccessionNumber="A" * 30, **who)
    assert (found.StudyDate, found.PatientBirthDate, found.StudyTime, found.PatientID) == ("", "", "", "P" * 80)


def test_what_is_no_uid_is_replaced_without_a_warning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    paths = write_series(tmp_path / "in", hu())
    with warnings.catch_warnings(action="ignore"):
        for k, path in enumerate(paths):
            names = {"SOPInstanceUID": f"Zwiebelfisch {k}", "FrameOfReferenceUID": "Zwiebelfisch"}
            edit(path, **names, StudyInstanceUID="PID-4711-XYZ", SeriesInstanceUID="ALIAS-99")
    recwarn.clear()
    write_segmentation(tmp_path / "out.dcm", random_labels(SHAPE), only(tmp_path / "in"), BY)
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
        write_segmentation(tmp_path / "out.dcm", np.zeros((2, 4, 4), np.uint8), only(tmp_path / "in"), BY)
    assert not list(tmp_path.glob("*.dcm"))


def test_a_real_series(shared: Path, tmp_path: Path) -> None:
    series = only(shared / "body" / "dicom")
    labels = np.zeros((20, 512, 512), np.uint8)
    labels[4:9, 100:200, 50:90], labels[6:8, 120:140, 60:70] = 1, 2
    write_segmentation(tmp_path / "out.dcm", labels, series, BY)
    planes = by_pydicom(tmp_path / "out.dcm")
    assert [str(header.instance) in planes for header in series.headers[::-1]] == [4 <= k < 9 for k in range(20)]
    stacked = np.stack([planes[header.instance] for header in series.headers[::-1] if header.instance in planes])
    assert np.array_equal(stacked, labels[4:9])
