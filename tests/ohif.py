"""What OHIF 3 needs of the objects that it shows, as far as its handlers of SEG, SR and PDF read them.

They were read in the sources of OHIF/Viewers (extensions cornerstone-dicom-seg, cornerstone-dicom-sr and dicom-pdf)
and tried in OHIF 3.13, which is not part of the tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from pydicom import Dataset

SEG, PDF = "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.104.1"
SR = "1.2.840.10008.5.1.4.1.1.88.33"  # measurements of a Comprehensive 3D SR are drawn, also those without coordinates
REPORT, LIBRARY, LIBRARY_GROUP = "126000", "111028", "126200"
MEASUREMENTS, GROUP, TRACKING_ID, TRACKING_UID = "126010", "125007", "112039", "112040"


def problems(images: Sequence[Dataset], seg: Dataset, sr: Dataset, pdf: Dataset) -> list[str]:
    """What OHIF would miss; images: the headers of the CT series."""
    return [f"SEG: {one}" for one in _seg(images, seg)] + [
        *(f"SR: {one}" for one in _sr(images, seg, sr)),
        *(f"PDF: {one}" for one in _pdf(pdf)),
    ]


def _seg(images: Sequence[Dataset], seg: Dataset) -> Iterator[str]:
    """It is found by the series that it refers to, drawn on its slices, in the colours of its segments."""
    first = images[0]
    if seg.SOPClassUID != SEG or seg.Modality != "SEG":
        yield "not a segmentation"
    if [one.SeriesInstanceUID for one in seg.get("ReferencedSeriesSequence", [])] != [first.SeriesInstanceUID]:
        yield "ReferencedSeriesSequence does not name the CT series"
    if seg.FrameOfReferenceUID != first.FrameOfReferenceUID:
        yield "another frame of reference"
    if (seg.Rows, seg.Columns) != (first.Rows, first.Columns):
        yield "another size than the slices"
    if [segment.SegmentNumber for segment in seg.SegmentSequence] != list(range(1, len(seg.SegmentSequence) + 1)):
        yield "segments are not numbered from 1"
    for segment in seg.SegmentSequence:
        if len(segment.get("RecommendedDisplayCIELabValue", [])) != 3:
            yield f"segment {segment.SegmentNumber} has no colour"
        if not segment.get("SegmentLabel"):
            yield f"segment {segment.SegmentNumber} has no label"
    shared = seg.SharedFunctionalGroupsSequence[0]
    plane = shared.get("PlaneOrientationSequence", [Dataset()])[0].get("ImageOrientationPatient", [0] * 6)
    if not np.allclose(np.array(plane, float), np.array(first.ImageOrientationPatient, float), atol=1e-3):
        yield "its planes are not those of the slices"
    known, numbers = {image.SOPInstanceUID: image for image in images}, range(1, len(seg.SegmentSequence) + 1)
    for frame in seg.PerFrameFunctionalGroupsSequence:
        source = frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        place = np.array(frame.PlanePositionSequence[0].ImagePositionPatient, float)
        if source not in known or not np.allclose(
            place, np.array(known[source].ImagePositionPatient, float), atol=1e-3
        ):
            yield "a frame does not lie on its slice"
        if frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber not in numbers:
            yield "a frame of an unknown segment"


def _sr(images: Sequence[Dataset], seg: Dataset, sr: Dataset) -> Iterator[str]:
    """It is a TID 1500 report.

    A missing library, tracking identifier or content of a number, or a finding (the groups with one tracking UID)
    without coordinates on a slice ends its loading.
    """
    if sr.SOPClassUID != SR or _code(sr) != REPORT:
        yield "not an imaging measurement report"
    if sr.ContentTemplateSequence[0].TemplateIdentifier != "1500":
        yield "another template than TID 1500"
    if sr.StudyInstanceUID != images[0].StudyInstanceUID:
        yield "another study"
    groups = [one for library in _items(sr, LIBRARY) for one in _items(library, LIBRARY_GROUP)]
    listed = {
        reference.ReferencedSOPInstanceUID
        for item in (groups[0].ContentSequence if groups else [])
        for reference in item.get("ReferencedSOPSequence", [])
    }
    if listed != {image.SOPInstanceUID for image in images}:
        yield "the image library does not list the slices"
    found = [one for container in _items(sr, MEASUREMENTS) for one in _items(container, GROUP)]
    if not found:
        yield "no measurement group"
    segments, places = {segment.TrackingUID for segment in seg.SegmentSequence}, dict[str, set[str]]()
    for group in found:
        first = next((item for item in group.ContentSequence if item.ValueType == "UIDREF"), Dataset())
        if "ConceptNameCodeSequence" not in first or _code(first) != TRACKING_UID or first.UID not in segments:
            yield "a group whose first UID is not the tracking UID of a segment"
        if len(_items(group, TRACKING_ID)) != 1:
            yield "a group without tracking identifier"
        images_of = [item.ContentSequence[0] for item in group.ContentSequence if item.ValueType == "SCOORD"]
        lies_on = {
            one.ReferencedSOPInstanceUID for image in images_of for one in image.get("ReferencedSOPSequence", [])
        }
        places.setdefault(str(first.get("UID")), set()).update(lies_on & listed)
        for item in group.ContentSequence:
            if item.ValueType == "NUM" and not item.get("ContentSequence"):
                yield f"a number without content: {item.ConceptNameCodeSequence[0].CodeMeaning}"
            if item.ValueType == "NUM" and not item.MeasuredValueSequence[0].MeasurementUnitsCodeSequence[0].CodeValue:
                yield "a number without unit"
    if not all(places.values()):
        yield "a finding without coordinates on a slice"


def _pdf(pdf: Dataset) -> Iterator[str]:
    if pdf.SOPClassUID != PDF or pdf.MIMETypeOfEncapsulatedDocument != "application/pdf":
        yield "not an encapsulated PDF"
    if not pdf.EncapsulatedDocument.startswith(b"%PDF-"):
        yield "its document is not a PDF file"


def _code(item: Dataset) -> str:
    return str(item.ConceptNameCodeSequence[0].CodeValue)


def _items(item: Dataset, code: str) -> list[Dataset]:
    return [one for one in item.ContentSequence if "ConceptNameCodeSequence" in one and _code(one) == code]
