"""DICOM in: series found in a tree, sorted by position, read to the voxel, or refused with a reason."""

from __future__ import annotations

import gzip
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import AXIAL, PACKED, PLAIN, WORDS, edit, hu, uid, write_series
from pydicom.dataelem import DataElement
from pydicom.filebase import DicomFileLike
from pydicom.fileset import FileSet
from pydicom.filewriter import write_dataset
from test_nifti import rotation

from kitseg.errors import InputError, UsageError
from kitseg.runtime.signals import SIGNALS
from kitseg.types import Case, Geometry
from kitseg.volumes import nifti
from kitseg.volumes.dicom.headers import Header, differing_values
from kitseg.volumes.dicom.pixels import AIR, read_planes
from kitseg.volumes.dicom.series import Series, find_series, holds_dicom, open_series, read_series
from kitseg.volumes.scan import find_scans, read_scan
from kitseg.volumes.zipped import unopened

CORONAL = AXIAL[:, [1, 0, 2, 3]] @ np.diag([-1.0, -1, 1, 1])
SAGITTAL = AXIAL[:, [2, 0, 1, 3]] @ np.diag([1.0, -1, 1, 1])
FEET_FIRST = AXIAL @ np.diag([-1.0, 1, -1, 1])
ANY = {
    "axial": AXIAL,
    "downwards": AXIAL @ np.diag([-1.0, 1, 1, 1]),
    "prone": AXIAL @ np.diag([1.0, -1, -1, 1]),
    "feet first": FEET_FIRST,
    "coronal": CORONAL,
    "sagittal": SAGITTAL,
    "oblique": rotation(17) @ AXIAL,
}


def only(folder: Path) -> Series:
    found = find_series(folder)
    assert len(found) == 1, [series.problem for series in found]
    return found[0]


def refused(series: Series, fact: str) -> None:
    with pytest.raises(InputError, match=fact) as caught:
        read_series(series)
    assert "\n" not in str(caught.value)


# --- values and places


@pytest.mark.parametrize("name", ANY)
def test_each_voxel_stays_where_it_is_in_the_patient(tmp_path: Path, name: str) -> None:
    planes, affine = hu(), ANY[name]
    write_series(tmp_path, planes, affine)
    volume = read_series(only(tmp_path))
    assert volume.array.dtype == np.int16
    assert volume.array.flags.c_contiguous
    assert volume.array.shape == volume.geometry.shape
    assert nifti.axis_codes(volume.geometry) == "IPL"
    for index in [(0, 0, 0), (11, 7, 9), (3, 0, 5)]:
        there = np.linalg.solve(volume.geometry.affine, affine @ [*index, 1])[:3]
        np.testing.assert_allclose(there, there.round(), atol=1e-6)
        assert volume.array[tuple(there.round().astype(int))] == planes[index]


def test_the_native_lattice_is_columns_rows_slices(tmp_path: Path) -> None:
    write_series(tmp_path, hu())
    volume = read_series(only(tmp_path))
    assert volume.native.shape == (10, 8, 12)
    np.testing.assert_allclose(volume.native.affine, AXIAL[:, [2, 1, 0, 3]], atol=1e-9)


def test_labels_written_as_nifti_keep_their_place(tmp_path: Path) -> None:
    write_series(tmp_path / "in", hu(), ANY["oblique"])
    volume = read_series(only(tmp_path / "in"))
    nifti.write_image(tmp_path / "out.nii.gz", volume.array, volume.native)
    again = nifti.read_image(tmp_path / "out.nii.gz", "a")
    assert np.array_equal(again.array, volume.array)
    assert again.geometry.same_as(volume.geometry)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("syntax", [*PLAIN, *PACKED])
def test_transfer_syntaxes(tmp_path: Path, syntax: str, signed: bool) -> None:
    planes = hu((4, 16, 12))
    paths = write_series(tmp_path, planes, signed=signed, syntax=syntax)
    stored = pydicom.dcmread(paths[0]).file_meta.TransferSyntaxUID
    assert stored.is_encapsulated == (syntax in PACKED)
    assert np.array_equal(read_series(only(tmp_path)).array[::-1], planes)


def test_each_slice_is_rescaled_by_its_own_numbers(tmp_path: Path) -> None:
    planes = hu((3, 4, 4))
    write_series(tmp_path, planes, each_RescaleSlope=["1", "0.5", "2"], each_RescaleIntercept=["-1024", "-512", "0"])
    stored = planes.astype(np.int32) + 1024
    expected = np.stack([stored[0] - 1024, np.rint(stored[1] / 2 - 512), np.clip(stored[2] * 2, -1024, 32767)])
    assert np.array_equal(read_series(only(tmp_path)).array[::-1], expected)


@pytest.mark.parametrize(
    ("signed", "padding", "limit", "becomes"),
    [
        (True, -2000, None, AIR),
        (True, 3000, None, AIR),
        (True, 2900, 3100, AIR),
        (False, 4024, None, AIR),
        (True, 0, None, 0),  # water: can't be distinguished from the patient, and remains
    ],
)
def test_padding_becomes_air(tmp_path: Path, signed: bool, padding: int, limit: int | None, becomes: int) -> None:
    planes = hu((3, 4, 4)).clip(1, 2000)
    planes[:, 0] = padding if signed else padding - 1024
    planes[1, 0] += 50 if limit else 0
    tags = {} if limit is None else {"PixelPaddingRangeLimit": limit}
    write_series(tmp_path, planes, signed=signed, PixelPaddingValue=padding, **tags)
    expected = planes.copy()
    expected[:, 0] = becomes
    assert np.array_equal(read_series(only(tmp_path)).array[::-1], expected)


def test_a_negative_padding_that_is_stored_as_unsigned(tmp_path: Path) -> None:
    planes = hu((3, 4, 4)).clip(-900, 2000)
    planes[:, 0] = -2000
    for path in write_series(tmp_path, planes, signed=True):
        found = pydicom.dcmread(path)
        found.add_new("PixelPaddingValue", "US", 2**16 - 2000)
        found.save_as(path)
    assert (read_series(only(tmp_path)).array[:, 0] == AIR).all()


def test_nothing_is_below_air(tmp_path: Path) -> None:
    planes = hu((3, 4, 4))
    planes[:, 0] = -3024  # outside the circle, without a padding value
    write_series(tmp_path, planes, signed=True)
    assert read_series(only(tmp_path)).array.min() == AIR


# --- an archive


def test_an_archive_of_patients_studies_and_series(tmp_path: Path) -> None:
    first = write_series(tmp_path / "A" / "1", hu(seed=1), seed=1)
    write_series(tmp_path / "A" / "1", hu(seed=2), seed=2)  # another series in the same folder
    write_series(tmp_path / "B" / "x" / "y", hu(seed=3), seed=3, study="other", PatientID="other")
    for k, path in enumerate(first[::2]):  # a series spread over folders
        (tmp_path / "C" / str(k)).mkdir(parents=True)
        path.rename(tmp_path / "C" / str(k) / "IM0")
    shutil.copytree(tmp_path / "B", tmp_path / "copy of B")  # the same instances twice
    (tmp_path / "README").write_text("burned by nobody")
    (tmp_path / "empty").touch()
    (tmp_path / "A" / "viewer.exe").write_bytes(bytes(4096))
    found = find_series(tmp_path, tmp_path / "A")
    assert holds_dicom(tmp_path)
    assert [len(series.files) for series in found] == [12, 12, 12]
    assert {series.uid for series in found} == {uid(f"series {n}") for n in (1, 2, 3)}
    for series in found:
        seed = next(n for n in (1, 2, 3) if uid(f"series {n}") == series.uid)
        assert np.array_equal(read_series(series).array[::-1], hu(seed=seed))


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    write_series(tmp_path / "elsewhere", hu())
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "patient").symlink_to("../elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to("..")
    assert holds_dicom(tmp_path / "archive")
    assert len(only(tmp_path / "archive").files) == 12


@pytest.mark.parametrize("implicit", [True, False])
@pytest.mark.parametrize("count", [1, 12])
def test_files_without_preamble(tmp_path: Path, implicit: bool, count: int) -> None:
    for path in write_series(tmp_path, hu())[:count]:
        found = pydicom.dcmread(path)
        plain = pydicom.Dataset({element.tag: element for element in found})
        with path.open("wb") as file:
            out = DicomFileLike(file)
            out.is_implicit_VR, out.is_little_endian = implicit, True
            write_dataset(out, plain)
    (tmp_path / "text").write_bytes(b"\x08\x00\x05\x00CS, but something else")
    assert holds_dicom(tmp_path)
    assert np.array_equal(read_series(only(tmp_path)).array[::-1], hu())
    assert not only(tmp_path).note


def test_numbers_as_other_programs_write_them(tmp_path: Path) -> None:
    frames = DataElement("NumberOfFrames", "IS", "1.0", already_converted=True)
    for path in write_series(tmp_path, hu(), RescaleSlope="1.00"):
        found = pydicom.dcmread(path)
        found[frames.tag] = frames
        found.save_as(path)
        content = path.read_bytes()
        for text in (b"0.7\\0.8", b"-60.5\\", b"1.00"):
            assert text in content
            content = content.replace(text, text.replace(b".", b","))
        path.write_bytes(content)
    volume = read_series(only(tmp_path))
    assert np.array_equal(volume.array[::-1], hu())
    assert volume.geometry.spacing == pytest.approx((2.5, 0.7, 0.8))


def test_a_dicomdir_is_no_series(tmp_path: Path) -> None:
    paths = write_series(tmp_path, hu(), SeriesNumber=1)
    index = FileSet()
    for path in paths:
        index.add(path)
    index.write(tmp_path / "disc")
    assert (tmp_path / "disc" / "DICOMDIR").is_file()
    assert len(only(tmp_path / "disc").files) == 12


def test_files_whose_uids_were_emptied(tmp_path: Path) -> None:
    """As anonymizers do: what is left is the file's own header, and the folder."""
    write_series(tmp_path / "a", hu(seed=1), seed=1, SeriesInstanceUID="", StudyInstanceUID="", SOPInstanceUID="")
    write_series(tmp_path / "b", hu(seed=2), seed=2, SeriesInstanceUID="", StudyInstanceUID="", SOPInstanceUID="")
    first, second = find_series(tmp_path)
    assert first.case_id != second.case_id
    assert first.study == second.study  # they share the frame of reference
    before = {series.case_id for series in (first, second)}
    (tmp_path / "a").rename(tmp_path / "elsewhere")
    assert {series.case_id for series in find_series(tmp_path)} == before


def test_the_name_of_a_case_is_no_identifier(tmp_path: Path) -> None:
    write_series(tmp_path / "Zwiebelfisch", hu())
    series = only(tmp_path)
    assert series.case_id.startswith("series_")
    assert len(series.case_id) == len("series_") + 10
    assert not any(word.decode() in series.case_id for word in WORDS)


def test_the_files_of_a_series_are_the_series(tmp_path: Path) -> None:
    write_series(tmp_path, hu())
    series = only(tmp_path)
    again = open_series(series.files[::-1], series.case_id)
    assert again.headers == series.headers
    assert again.stack.slots == series.stack.slots
    assert np.array_equal(read_series(again).array, read_series(series).array)


# --- missing, mixed, broken


def test_one_missing_slice_is_interpolated_and_reported(tmp_path: Path) -> None:
    planes = hu()
    write_series(tmp_path, planes)[4].unlink()
    series = only(tmp_path)
    array = read_series(series).array[::-1]
    assert np.array_equal(np.delete(array, 4, 0), np.delete(planes, 4, 0))
    np.testing.assert_allclose(array[4], (planes[3].astype(float) + planes[5]) / 2, atol=0.5)
    assert series.note == "1 slice is missing and interpolated (place 5 of the stack)"


@pytest.mark.parametrize(
    ("slices", "mm", "gone", "fact"),
    [
        (12, 2.5, (4, 5), "2 slices are missing: .* slice 4 of 10 is 7.5 mm, .* 2.5 mm"),
        (20, 2.5, (3, 8, 14), "3 slices are missing"),
        (12, 6, (4,), "1 slice is missing: .* slice 4 of 11 is 12 mm, .* 6 mm"),  # never bridged over a centimetre
    ],
)
def test_larger_gaps_are_refused(tmp_path: Path, slices: int, mm: float, gone: tuple[int, ...], fact: str) -> None:
    paths = write_series(tmp_path, hu((slices, 4, 4)), AXIAL @ np.diag([mm / 2.5, 1, 1, 1]))
    for k in gone:
        paths[k].unlink()
    refused(only(tmp_path), fact)


def test_every_second_slice_missing_is_noted(tmp_path: Path) -> None:
    for path in write_series(tmp_path, hu())[::2]:
        path.unlink()
    assert only(tmp_path).note == "its slices are 3 mm thick and 5 mm apart: some may be missing"


def test_uneven_slices_are_refused(tmp_path: Path) -> None:
    heights = [0, 2, 4, 6, 8, 10, 15, 20, 25, 30, 35, 38]
    write_series(tmp_path, hu(), each_ImagePositionPatient=[[0, 0, z] for z in heights])
    refused(only(tmp_path), "not evenly spaced: 2 to 5 mm apart")


def test_positions_may_be_rounded(tmp_path: Path) -> None:
    heights = [round(0.625 * k, 1) for k in range(12)]
    write_series(tmp_path, hu(), each_ImagePositionPatient=[[0, 0, z] for z in heights])
    assert read_series(only(tmp_path)).geometry.spacing[0] == pytest.approx(0.625, abs=0.01)


@pytest.mark.parametrize(
    "tags",
    [
        {"AcquisitionNumber": (1, 2)},
        {"ConvolutionKernel": ("Br38f", "Br64f")},
        {"SeriesDescription": ("3.0 B30f", "3.0 B60f")},
        {"KVP": ("80", "140")},
        {"ContrastBolusStartTime": ("120000", "120030")},
        {"ProtocolName": ("late", "early")},
        {"each_AcquisitionTime": ([f"1200{k:02}.5" for k in range(12)], [f"1201{k:02}" for k in range(12)])},
        {"each_AcquisitionDateTime": ([f"2020010112000{k % 10}" for k in range(12)], ["20200102120000"] * 12)},
    ],
)
def test_two_passes_in_one_series_are_separated(tmp_path: Path, tags: dict[str, tuple[object, object]]) -> None:
    for n in (1, 2):
        mine = {name: values[n - 1] for name, values in tags.items()}
        write_series(tmp_path, hu(seed=n), seed=n, series="both", each_SOPInstanceUID=_uids(n), **mine)
    first, second = find_series(tmp_path)
    assert second.case_id == f"{first.case_id}_2"
    assert {hu(seed=n).tobytes() for n in (1, 2)} == {read_series(s).array[::-1].tobytes() for s in (first, second)}
    assert first.note == second.note == "slices of its series that form other stacks, left out: 12"


@pytest.mark.parametrize("tag", ["AcquisitionNumber", "ProtocolName"])
def test_the_names_of_passes_do_not_depend_on_those_of_files(tmp_path: Path, tag: str) -> None:
    found = []
    for order in ((1, 2), (2, 1)):
        for place, n in enumerate(order):
            folder = tmp_path / str(order) / str(place)
            write_series(folder, hu(seed=n), seed=n, series="both", each_SOPInstanceUID=_uids(n), **{tag: str(n)})
        found.append({series.case_id: read_series(series).array.tobytes() for series in find_series(folder.parent)})
    assert found[0] == found[1]
    assert len(set(found[0].values())) == 2


@pytest.mark.parametrize("shift", [1.25, 0.5])
def test_two_passes_with_slices_between_each_others_are_separated(tmp_path: Path, shift: float) -> None:
    for n in (1, 2):
        there = AXIAL.copy()
        there[2, 3] += shift * n
        uids = {"each_SOPInstanceUID": _uids(n)}
        write_series(tmp_path, hu(seed=n), there, n, series="both", AcquisitionNumber=n, **uids)
    found = find_series(tmp_path)
    assert {hu(seed=n).tobytes() for n in (1, 2)} == {read_series(s).array[::-1].tobytes() for s in found}
    assert {series.note for series in found} == {"slices of its series that form other stacks, left out: 12"}


@pytest.mark.parametrize("numbers", [[1] * 6 + [2] * 6, [k // 3 for k in range(12)], [1] * 5 + [2, 1] + [2] * 5])
def test_one_pass_in_several_acquisitions_is_one_stack(tmp_path: Path, numbers: list[int]) -> None:
    write_series(tmp_path, hu(), each_AcquisitionNumber=numbers)
    assert np.array_equal(read_series(only(tmp_path)).array[::-1], hu())


def test_passes_whose_instances_share_one_uid_are_both_kept(tmp_path: Path) -> None:
    for n in (1, 2):
        write_series(tmp_path, hu(seed=n), seed=n, series="both", SOPInstanceUID="1.2.3", AcquisitionNumber=n)
    assert [len(series.files) for series in find_series(tmp_path)] == [12, 12]


def test_copies_of_slices_count_once_and_are_reported(tmp_path: Path) -> None:
    for path in write_series(tmp_path, hu())[4:6]:
        shutil.copy(path, tmp_path / f"{path.name}-copy")
        edit(tmp_path / f"{path.name}-copy", SOPInstanceUID=uid(path.name))
    assert np.array_equal(read_series(only(tmp_path)).array[::-1], hu())
    assert only(tmp_path).note == "copies of slices, left out: 2"


def test_overlapping_exports_of_one_series_are_one_stack(tmp_path: Path) -> None:
    slices = write_series(tmp_path, hu())
    for n, path in enumerate(slices):
        edit(path, InstanceCreationDate="20250101" if n < 8 else "20250102")
    for path in slices[4:8]:
        shutil.copy(path, tmp_path / f"{path.name}-copy")
        edit(tmp_path / f"{path.name}-copy", SOPInstanceUID=uid(path.name), InstanceCreationDate="20250102")
    assert np.array_equal(read_series(only(tmp_path)).array[::-1], hu())
    assert only(tmp_path).note == "copies of slices, left out: 4"


def test_what_cannot_be_read_beside_a_stack_is_reported(tmp_path: Path) -> None:
    for path in write_series(tmp_path, hu(), SpacingBetweenSlices="5")[5:6]:
        path.rename(tmp_path / "IM5.dcm")
    (tmp_path / "IM5.dcm").write_bytes(b"")
    (series,) = (series for series in find_series(tmp_path) if not series.problem)
    stated = "its headers state 5 mm between slices, its positions 2.5 mm (used)"
    assert (
        series.note
        == f"unreadable files beside it: 1; {stated}; 1 slice is missing and interpolated (place 6 of the stack)"
    )


def test_slices_turned_by_less_than_half_a_pixel_are_one_stack(tmp_path: Path) -> None:
    angles = [0.0015 * (1, 0, -1)[k % 3] for k in range(12)]
    paths = write_series(tmp_path, hu(), each_ImageOrientationPatient=[[1, a, 0, -a, 1, 0] for a in angles])
    paths[1].rename(tmp_path / "0")  # the first that is read, to which the others are compared
    series = only(tmp_path)
    assert len(series.stack.headers) == len(open_series(series.files, "a").stack.headers) == 12


def test_two_passes_that_look_the_same_are_refused(tmp_path: Path) -> None:
    for n in (1, 2):
        write_series(tmp_path, hu(seed=n), seed=n, series="both", each_SOPInstanceUID=_uids(n))
    refused(only(tmp_path), "[0-9]+ of its slices have the same position")


def test_other_orientations_and_sizes_in_a_series_are_stacks_of_their_own(tmp_path: Path) -> None:
    write_series(tmp_path, hu(), series="mixed")
    write_series(tmp_path, hu((2, 8, 10)), CORONAL, 2, series="mixed", each_SOPInstanceUID=_uids(2))
    write_series(tmp_path, hu((3, 4, 4)), AXIAL, 3, series="mixed", each_SOPInstanceUID=_uids(3))
    whole, small, scout = find_series(tmp_path)
    assert np.array_equal(read_series(whole).array[::-1], hu())
    assert [len(small.files), len(scout.files)] == [3, 2]
    refused(scout, "2 slices, fewer than the 3")


def test_a_series_of_very_many_frames_takes_no_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("kitseg.volumes.dicom.stack.MOST_GROUPS", 4)
    paths = write_series(tmp_path, hu(), each_PixelSpacing=[[0.7, f"0.{k + 10}"] for k in range(12)])
    assert [len(series.files) for series in find_series(tmp_path)].count(1) == 4
    (others,) = (series for series in find_series(tmp_path) if len(series.files) == 8)
    refused(others, "its slices differ in orientation, size or pixels")
    refused(open_series(paths, "a"), "its slices differ in orientation, size or pixels")


def test_elements_of_few_files_distinguish_no_passes(tmp_path: Path) -> None:
    paths = write_series(tmp_path, hu((20, 4, 4)))
    for path in paths[:2]:
        edit(path, AdmissionID="x")
    edit(paths[0], RouteOfAdmissions="y")
    found = list(differing_values([Header(path) for path in paths]))
    assert ["x"] * 2 + [""] * 18 in found
    assert ["y"] + [""] * 19 not in found


def test_a_tilted_gantry_is_refused(tmp_path: Path) -> None:
    sheared = AXIAL.copy()
    sheared[1, 0] = 0.6  # each slice 0.6 mm further to the front
    write_series(tmp_path, hu(), sheared)
    refused(only(tmp_path), r"shifted against each other by 6\.6 mm \(a gantry tilt of 13°\?\)")


@pytest.mark.parametrize(
    ("tags", "fact"),
    [
        ({"ImagePositionPatient": None}, "no position"),
        ({"ImageOrientationPatient": ["1", "0", "0", "0.5", "0.9", "0"]}, "not at right angles"),
        ({"NumberOfFrames": "4"}, "enhanced multi-frame"),
        ({"Modality": "MR"}, "its modality is not CT"),
        ({"RescaleSlope": "0"}, "the pixels can't be read"),
        ({"RescaleIntercept": "1e999"}, "the pixels can't be read"),
        *(({"PixelSpacing": [mm, mm]}, "its pixels are not") for mm in ("0", "90000", "-1")),
    ],
)
def test_what_is_refused(tmp_path: Path, tags: dict[str, object], fact: str) -> None:
    write_series(tmp_path, hu(), **tags)
    refused(only(tmp_path), fact)


def test_a_broken_slice_is_named_and_other_series_are_read(tmp_path: Path) -> None:
    broken = write_series(tmp_path, hu(seed=1), seed=1)[3]
    write_series(tmp_path, hu(seed=2), seed=2)
    broken.write_bytes(broken.read_bytes()[:-50])
    for series in find_series(tmp_path):
        if broken in series.files:
            refused(series, f"^{broken}: the pixels can't be read")
        else:
            assert np.array_equal(read_series(series).array[::-1], hu(seed=2))


@pytest.mark.parametrize("syntax", PACKED)
def test_a_compressed_slice_that_is_cut_short(tmp_path: Path, syntax: str) -> None:
    broken = write_series(tmp_path, hu((3, 64, 64)), syntax=syntax)[1]
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    refused(only(tmp_path), f"^{broken}: the pixels can't be read")


def test_a_file_that_crashes_its_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GDCM ends its process, which is not this one; the message names the file."""
    for path in write_series(tmp_path / "crashes", hu((3, 32, 32)), syntax="jpeg-ls"):
        edit(path, Rows=65535)
    write_series(tmp_path / "reads", hu((3, 32, 32)), syntax="jpeg-ls")
    (tmp_path / "json.py").write_text("raise SystemExit('a module of the current folder was imported')")
    monkeypatch.chdir(tmp_path)
    refused(only(tmp_path / "crashes"), r"the pixels can't be read \(the decoder crashed\)")
    assert np.array_equal(read_series(only(tmp_path / "reads")).array[::-1], hu((3, 32, 32)))


def test_a_decoder_outlives_signals_but_not_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal or a cluster signals all processes: what is being read is finished, or ended by kitseg itself."""
    write_series(tmp_path, hu((3, 32, 32)), syntax="jpeg-ls")
    series, started, popen = only(tmp_path), list[subprocess.Popen[bytes]](), subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **more: started.append(popen(*args, **more)) or started[-1])
    for ends in (False, True):
        planes = read_planes(series.headers)
        found = [next(planes)]
        for number in (signal.SIGKILL,) if ends else SIGNALS:
            started[-1].send_signal(number)
        if ends:
            started[-1].wait()
            with pytest.raises(InputError, match="the decoder crashed"):
                next(planes)
        else:
            assert np.array_equal([*found, *planes], hu((3, 32, 32)))
    assert all(process.poll() == -signal.SIGKILL for process in started), "none is left"


def test_a_header_that_cannot_be_read_is_listed(tmp_path: Path) -> None:
    write_series(tmp_path, hu())
    for name in ("torn", "worn"):
        (tmp_path / name).write_bytes(bytes(128) + b"DICM" + bytes(range(256)))
    whole = [series for series in find_series(tmp_path) if not series.problem]
    assert len(whole) == 1
    assert len({series.case_id for series in find_series(tmp_path)}) == 3


@pytest.mark.parametrize("syntax", ["deflated", "implicit"])
def test_files_that_take_more_memory_than_a_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, syntax: str) -> None:
    """A deflated file unpacks in memory to any size; another one may have a header of any size."""
    monkeypatch.setattr("kitseg.volumes.dicom.headers.LARGEST", 1 << 20)
    paths = write_series(tmp_path, hu(), syntax=syntax)
    large = pydicom.dcmread(paths[3])
    large.add_new(0x00091010, "OB", bytes(1 << 20))
    large.save_as(paths[3])
    assert (paths[3].stat().st_size < 1 << 16) == (syntax == "deflated")
    series = next(series for series in find_series(tmp_path) if series.stack)
    assert series.stack.missing == (3,)
    assert "unreadable files beside it: 1" in series.note


def test_importing_the_scans_imports_no_dicom() -> None:
    code = "import sys, kitseg.volumes.kits, kitseg.cli; sys.exit(bool({'pydicom', 'highdicom'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_real_series(shared: Path) -> None:
    """JPEG 2000, emptied UIDs, 20 slices 2 mm apart of the upper abdomen with contrast."""
    volume = read_series(only(shared / "body" / "dicom"))
    assert volume.array.shape == (20, 512, 512)
    assert volume.geometry.spacing == pytest.approx((2, 0.9765625, 0.9765625))
    assert nifti.axis_codes(volume.native) == "LPS"
    assert volume.array.min() == AIR
    assert 20 < np.median(volume.array[volume.array > -50]) < 120  # soft tissue


def _uids(n: int) -> list[str]:
    return [uid(str(n), str(k)) for k in range(12)]


# --- what a review found


def test_two_patients_with_one_series_uid_stay_two(tmp_path: Path) -> None:
    write_series(tmp_path / "a", hu(), seed=1, series="same")
    far = AXIAL.copy()
    far[2, 3] += 30
    write_series(tmp_path / "b", hu(), far, seed=2, series="same", PatientID="another")
    assert [len(series.files) for series in find_series(tmp_path)] == [12, 12]


def test_slices_whose_study_was_emptied_stay_in_their_series(tmp_path: Path) -> None:
    for path in write_series(tmp_path, hu(), seed=1)[::2]:
        edit(path, StudyInstanceUID="")
    series = only(tmp_path)
    assert len(series.files) == 12
    assert series.study == uid("study")
    assert not series.note


def one_uid(folder: Path, seed: int, **tags: object) -> Case:
    """A scan as an anonymizer leaves it that writes the same UIDs into every file; alone in its folder, as a case."""
    for path in write_series(folder, hu((10, 8, 10), seed), series="one", **tags):
        edit(path, SOPInstanceUID="1.2.3")
    (case,) = find_scans([folder]).cases
    return case


@pytest.mark.parametrize("tags", [{"PatientID": "another"}, {"study": "another"}])
def test_scans_that_share_all_their_uids_are_cases_of_their_own(tmp_path: Path, tags: dict[str, str]) -> None:
    first, second = one_uid(tmp_path / "a", 1), one_uid(tmp_path / "b", 2, **tags)
    assert first.id == second.id  # each alone is the series of that UID
    found = find_scans([tmp_path]).cases
    assert len({case.id for case in found}) == 2
    assert all("another study or patient has the same series UID" in case.note for case in found)
    assert not {first.id, second.id} & {case.id for case in found}
    for case in found:
        assert np.array_equal(read_scan(case).array[::-1], hu((10, 8, 10), 1 if case.image.name == "a" else 2))
    (tmp_path / "a").rename(tmp_path / "z")
    assert {case.id for case in find_scans([tmp_path]).cases} == {case.id for case in found}
    wanted = find_scans([tmp_path], [uid("one")]).cases
    assert wanted == find_scans([tmp_path]).cases
    (one,) = find_scans([tmp_path], [found[0].id]).cases
    assert one.id == found[0].id


def test_a_patients_id_cannot_be_tried_out_on_the_name_of_a_case(tmp_path: Path) -> None:
    names = []
    for seed in (1, 2):  # the same UIDs and IDs, other voxels
        folder = tmp_path / str(seed)
        one_uid(folder / "a", seed)
        one_uid(folder / "b", seed, PatientID="another")
        names += [case.id for case in find_scans([folder]).cases]
    assert len(set(names)) == 4


def test_emptied_uids_and_one_instance_uid_are_distinguished(tmp_path: Path) -> None:
    for seed, modality in ((1, "CT"), (2, "MR")):
        for path in write_series(tmp_path / modality, hu((10, 8, 10), seed), Modality=modality):
            edit(path, SOPInstanceUID="1.2.3", SeriesInstanceUID="", StudyInstanceUID="")
    found = find_scans([tmp_path])
    assert [case.image.name for case in found.cases] == ["CT"]
    assert len({choice.series.case_id for choice in found.choices}) == 2


def test_a_nifti_scan_with_the_name_of_a_series_is_refused(tmp_path: Path) -> None:
    write_series(tmp_path / "in", hu())
    name = find_scans([tmp_path / "in"]).cases[0].id
    nifti.write_image(tmp_path / f"{name}.nii.gz", hu(), Geometry((12, 8, 10), AXIAL))
    with pytest.raises(UsageError, match=f"are both called {name}"):
        find_scans([tmp_path / f"{name}.nii.gz", tmp_path / "in"])


def test_a_folder_name_that_is_not_utf8(tmp_path: Path) -> None:
    for path in write_series(tmp_path / "M\udcfcller", hu()):
        edit(path, SeriesInstanceUID="", StudyInstanceUID="")
    assert read_series(only(tmp_path)).array.shape == (12, 8, 10)


def test_slices_of_any_name_are_read(tmp_path: Path) -> None:
    paths = write_series(tmp_path, hu())
    for path, name in zip(paths[3:], ("IM0003.nii", ".IM0004", "scan.nii.gz"), strict=False):
        path.rename(tmp_path / name)
    (tmp_path / "._IM0004.dcm").write_bytes(b"a note of macOS")
    (case,) = find_scans([tmp_path]).cases
    assert (len(case.slices), case.note) == (12, "")
    assert np.array_equal(read_scan(case).array[::-1], hu())


def test_packed_files_are_named(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "study", hu())
    (tmp_path / "study" / "more.zip").write_bytes(b"PK")
    (tmp_path / "study" / "IM1.gz").write_bytes(gzip.compress(paths[0].read_bytes()))
    assert unopened([tmp_path]) == [f"ignored: 2 packed files in {tmp_path / 'study'} (IM1.gz, more.zip)"]
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "IM1.gz").write_bytes(gzip.compress(paths[0].read_bytes()))
    with pytest.raises(InputError, match=r"no scans, but the archive IM1\.gz"):
        find_scans([tmp_path / "packed"])
