"""DICOM structured reports: the numbers of `kitseg measure`, and the segments that they are of."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import pydicom
import pytest
from conftest import kitseg
from dicom_files import WHO, WORDS, hu, write_series
from highdicom import sr
from ohif import MEASUREMENTS, problems
from scipy import ndimage
from test_dicom import only
from test_dicom_seg import BY, SHAPE

from kitseg.commands.measure import NO_SLICES
from kitseg.measurement.findings import Findings
from kitseg.measurement.measure import measure
from kitseg.volumes.dicom.document import write_document
from kitseg.volumes.dicom.segmentation import NOTICE, SegmentedSeries, write_segmentation
from kitseg.volumes.dicom.series import open_series, read_series
from kitseg.volumes.dicom.structured_report import write_report
from kitseg.volumes.nifti import write_labels
from kitseg.volumes.phantom import make_case

NAMES = {
    ("Volume", ""): "volume_ml",
    ("Long axis", "Maximum"): "axial_mm",
    ("Maximum 3D Diameter of a Mesh", "Maximum"): "diameter_mm",
    ("Attenuation Coefficient", "Mean"): "hu_mean",
    ("Attenuation Coefficient", "Standard Deviation"): "hu_sd",
}
FILES = ("seg.dcm", "sr.dcm", "pdf.dcm")
UNITS = {"volume_ml": "ml", "parenchyma_ml": "ml", "axial_mm": "mm", "diameter_mm": "mm"}


@pytest.fixture(scope="module", params=["identified", "anonymous"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a phantom's series, its labels, and the segmentation and the report of them."""
    folder = tmp_path_factory.mktemp("report")
    array, labels, affine = make_case(seed=3, index=0, matrix=64)
    labels[ndimage.binary_erosion(labels == 1, iterations=2)] = 3
    write_series(folder / "in", array, affine, SeriesNumber="7")
    series = only(folder / "in")
    scan = read_series(series)
    write_labels(folder / f"{series.case_id}.nii.gz", labels, scan.native)
    findings = measure(labels, scan.geometry, scan.array)
    anonymous = request.param == "anonymous"
    made = SegmentedSeries(series, labels, findings, BY, scan.array, anonymous=anonymous, remarks=("amber: größer.",))
    write_segmentation(folder / "seg.dcm", made)
    write_report(folder / "sr.dcm", made, folder / "seg.dcm")
    write_document(folder / "pdf.dcm", made, b"%PDF-1.4 odd")
    return folder


def groups(path: Path) -> list[sr.VolumetricROIMeasurementsAndQualitativeEvaluations]:
    return sr.srread(path).content.get_volumetric_roi_measurement_groups()


def test_each_number_is_that_of_the_json_file(written: Path) -> None:
    labels = next(written.glob("series_*.nii.gz"))
    done = kitseg(written, "measure", labels.name, "--ct=in", "--json=m.json", "--labels=kits23", "--jobs=1")
    assert done.code == 0, done.text
    (expected,) = json.loads((written / "m.json").read_text())["cases"].values()
    segments = pydicom.dcmread(written / "seg.dcm").SegmentSequence
    assert len(groups(written / "sr.dcm")) == len(segments) == len(expected["kidneys"] + expected["lesions"]) > 4
    for number, (group, finding) in enumerate(
        zip(groups(written / "sr.dcm"), expected["kidneys"] + expected["lesions"], strict=True), 1
    ):
        kidney, found = "parenchyma_ml" in finding, {}
        for one in group.get_measurements():
            derivation = one.derivation.meaning if one.derivation else ""
            name = {("Volume", ""): "parenchyma_ml", ("Volume", "Total"): "volume_ml"} if kidney else NAMES
            key = name[one.name.meaning, derivation]
            found[key] = one.value
            assert one.unit.value == UNITS.get(key, "[hnsf'U]")
        assert found == {key: finding[key] for key in found}
        assert set(found) == ({"parenchyma_ml", "volume_ml"} if kidney else set(NAMES.values()))
        segment = segments[number - 1]
        assert group.tracking_uid == segment.TrackingUID
        assert group.finding_sites[0].laterality.meaning.lower() == finding["side"]
        assert group.finding_type.value == segment.SegmentedPropertyTypeCodeSequence[0].CodeValue


def test_the_report_states_its_use_and_what_is_doubtful(written: Path) -> None:
    items = pydicom.dcmread(written / "sr.dcm").ContentSequence
    said = [item.TextValue for item in items if item.ConceptNameCodeSequence[0].CodeMeaning == "Comment"]
    assert said == [NOTICE, "amber: größer."]


def test_a_segmentation_without_its_scan_states_what_that_leaves_open(written: Path) -> None:
    doubts = []
    for name, options in (("alone", []), ("both", ["--ct=in"])):
        done = kitseg(written, "measure", "seg.dcm", f"--json={name}.json", *options)
        assert done.code == 0, done.text
        (case,) = json.loads((written / f"{name}.json").read_text())["cases"].values()
        doubts.append(case.get("doubts", []))
    assert NO_SLICES in doubts[0]
    assert NO_SLICES not in doubts[1]


def test_the_groups_refer_to_the_segments_of_the_series(written: Path) -> None:
    segmentation = pydicom.dcmread(written / "seg.dcm")
    for number, group in enumerate(groups(written / "sr.dcm"), 1):
        reference = group.referenced_segment[0]
        assert reference.referenced_sop_instance_uid == segmentation.SOPInstanceUID
        assert reference.referenced_segment_numbers == [number]


def test_the_long_axis_is_drawn_where_it_was_measured(written: Path) -> None:
    """Also of a kidney, whose group has no number."""
    places = sr.srread(written / "sr.dcm").content.get_planar_roi_measurement_groups()
    images = {one.SOPInstanceUID: one for one in map(pydicom.dcmread, only(written / "in").files)}
    lines = {}
    for place in places:
        line = place.roi
        assert line.graphic_type.value == "POLYLINE"
        image = images[line.ContentSequence[0].referenced_sop_instance_uid]
        ends = line.value * [float(mm) for mm in image.PixelSpacing[::-1]]
        lines[place.tracking_uid] = round(float(np.linalg.norm(ends[1] - ends[0])), 3)
    assert len(lines) == len(groups(written / "sr.dcm")) == len(places)
    for group in groups(written / "sr.dcm"):
        measured = [one.value for one in group.get_measurements() if one.name.meaning == "Long axis"]
        assert measured in ([], [lines[group.tracking_uid]])


def test_lesions_in_coronal_slices_have_no_line(tmp_path: Path) -> None:
    """The longest one in a slice is another one than the long axis, which is measured in axial planes."""
    array, labels, affine = make_case(seed=3, index=0, matrix=64)
    write_series(tmp_path / "in", array.transpose(1, 0, 2), affine[:, [1, 0, 2, 3]])
    series = only(tmp_path / "in")
    scan = read_series(series)
    made = SegmentedSeries(series, labels, measure(labels, scan.geometry, scan.array), BY, scan.array)
    write_segmentation(tmp_path / "seg.dcm", made)
    write_report(tmp_path / "sr.dcm", made, tmp_path / "seg.dcm")
    lines = sr.srread(tmp_path / "sr.dcm").content.get_planar_roi_measurement_groups()
    kidneys = [one for one in groups(tmp_path / "sr.dcm") if one.finding_type.meaning == "Kidney"]
    assert {one.tracking_uid for one in lines} == {one.tracking_uid for one in kidneys}


def test_all_is_filed_with_the_series(written: Path) -> None:
    made = [pydicom.dcmread(written / name) for name in FILES]
    source = pydicom.dcmread(only(written / "in").files[0])
    assert {one.StudyInstanceUID for one in made} == {source.StudyInstanceUID}
    assert len({one.SeriesInstanceUID for one in (*made, source)}) == 4
    assert [one.SeriesNumber for one in (source, *made)] == [7, 9007, 10007, 11007]
    content = b"".join((written / name).read_bytes() for name in FILES)
    if made[0].PatientID:
        for name in ("PatientName", "PatientID", "StudyDate", "StudyDescription", "AccessionNumber"):
            assert {str(one[name].value) for one in made} == {str(source[name].value)}
        assert WHO["PatientAddress"].encode() not in content
    else:
        assert not [word for word in WORDS if word in content]


def test_two_patients_have_no_tracking_uid_in_common(tmp_path: Path) -> None:
    """Whatever name a case is given."""
    found = []
    for study in ("one", "other"):
        files = write_series(tmp_path / study, hu(), study=study)
        made = SegmentedSeries(open_series(files, "scan"), np.zeros(SHAPE, np.uint8), Findings((), ()), BY)
        write_segmentation(tmp_path / f"{study}.dcm", made)
        found += [one.TrackingUID for one in pydicom.dcmread(tmp_path / f"{study}.dcm").SegmentSequence]
    assert len(set(found)) == len(found) == 4


def test_the_document_is_the_pdf_file(written: Path) -> None:
    document = pydicom.dcmread(written / "pdf.dcm")
    assert document.EncapsulatedDocument[: document.EncapsulatedDocumentLength] == b"%PDF-1.4 odd"
    assert document.BurnedInAnnotation == ("YES" if document.PatientID else "NO")
    sources = [one.ReferencedSOPInstanceUID for one in document.SourceInstanceSequence]
    assert sources == [pydicom.dcmread(path).SOPInstanceUID for path in only(written / "in").files]


def test_a_validator_finds_no_error(written: Path) -> None:
    if not shutil.which("dciodvfy"):
        pytest.skip("no dciodvfy (Debian's dicom3tools)")
    for name in FILES:
        done = subprocess.run(["dciodvfy", written / name], capture_output=True, text=True, check=False)
        about = [line for line in done.stderr.splitlines() if line.startswith(("Error", "Warning"))]
        if pydicom.dcmread(written / name).PatientID == "":  # an anonymous file can't have what a DICOMDIR needs
            about = [line for line in about if "DICOMDIR" not in line]
        assert not about


def test_ohif_finds_what_it_needs(written: Path) -> None:
    images = [pydicom.dcmread(path, stop_before_pixels=True) for path in only(written / "in").files]
    seg, sr_file, pdf = (pydicom.dcmread(written / name) for name in FILES)
    assert problems(images, seg, sr_file, pdf) == []
    assert "SEG: segment 1 has no colour" in problems(
        images, _without(seg, "RecommendedDisplayCIELabValue"), sr_file, pdf
    )
    without = _without(sr_file, "ContentSequence", lambda item: item.get("ValueType") == "NUM")
    assert "SR: a number without content: Volume" in problems(images, seg, without, pdf)
    library = _without(sr_file, "ReferencedSOPSequence", lambda item: item.get("ValueType") == "IMAGE")
    assert "SR: the image library does not list the slices" in problems(images, seg, library, pdf)
    assert problems(images[1:], seg, sr_file, pdf)
    nowhere = deepcopy(sr_file)
    (found,) = (one for one in nowhere.ContentSequence if one.ConceptNameCodeSequence[0].CodeValue == MEASUREMENTS)
    for item in found.ContentSequence:
        item.ContentSequence = [one for one in item.ContentSequence if one.ValueType != "SCOORD"]
    assert problems(images, seg, nowhere, pdf) == ["SR: a finding without coordinates on a slice"]


def _without(
    found: pydicom.Dataset, name: str, where: Callable[[pydicom.Dataset], bool] = lambda _: True
) -> pydicom.Dataset:
    """A copy without an attribute of some of its items."""
    changed = deepcopy(found)
    for item in [changed, *(item for element in changed.iterall() if element.VR == "SQ" for item in element.value)]:
        if name in item and where(item):
            del item[name]
    return changed


def test_nothing_found(tmp_path: Path) -> None:
    write_series(tmp_path / "in", hu())
    made = SegmentedSeries(only(tmp_path / "in"), np.zeros(SHAPE, np.uint8), Findings((), ()), BY)
    write_segmentation(tmp_path / "seg.dcm", made)
    write_report(tmp_path / "sr.dcm", made, tmp_path / "seg.dcm")
    content = sr.srread(tmp_path / "sr.dcm").content
    assert not content.get_volumetric_roi_measurement_groups()
    (group,) = content.get_image_measurement_groups()
    (result,) = group.get_qualitative_evaluations()
    assert result.value.meaning == "All algorithms succeeded; without findings"
