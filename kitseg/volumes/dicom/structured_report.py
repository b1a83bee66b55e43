"""DICOM output: measurements as a structured report (TID 1500) that refers to the segments of a DICOM segmentation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pydicom
from highdicom import sr
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from kitseg.measurement.diameters import axial_line
from kitseg.measurement.findings import Kidney, Lesion
from kitseg.measurement.parts import LabelPart
from kitseg.runtime.files import atomic_write
from kitseg.volumes.dicom.headers import quiet
from kitseg.volumes.dicom.segmentation import KINDS, NOTICE, SegmentedSeries, equipment, laterality, tracking
from kitseg.volumes.dicom.series import stack_of
from kitseg.volumes.dicom.source import series_number, source_images

DECIMALS = 3  # of each number, as in the JSON file of `kitseg measure`
_codes: Any = codes
_ML, _MM = Code("ml", "UCUM", "milliliter"), Code("mm", "UCUM", "millimeter")
_HU = _codes.DCM.AttenuationCoefficient
_COUNTED = {"method": _codes.DCM.SumOfSegmentedVoxelMethodForVolume}
_CONTAINS = sr.RelationshipTypeValues.CONTAINS
_LARGEST = {"derivation": _codes.SCT.Maximum}
#: The concept and unit of each measurement by its name in findings, and how it was made: OHIF shows none without that.
MEASUREMENTS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "parenchyma_ml": (_codes.SCT.Volume, _ML, _COUNTED),
    "volume_ml": (_codes.SCT.Volume, _ML, _COUNTED),
    "axial_mm": (_codes.SCT.LongAxis, _MM, _LARGEST),
    "diameter_mm": (_codes.IBSI.Maximum3DDiameterOfAMesh, _MM, _LARGEST),
    "hu_mean": (_HU, _codes.UCUM.HounsfieldUnit, {"derivation": _codes.SCT.Mean}),
    "hu_sd": (_HU, _codes.UCUM.HounsfieldUnit, {"derivation": _codes.SCT.StandardDeviation}),
}
NOTHING_FOUND = (_codes.DCM.SummaryOfDetections, _codes.DCM.AllAlgorithmsSucceededWithoutFindings)


def write_report(path: Path, found: SegmentedSeries, segmentation: Path) -> None:
    """Write the findings of a segmented series as a DICOM SR document, atomically.

    Each segment has a group of measurements, and one with its longest line within a slice. The document ends with a
    comment for the notice and for each of the remarks.

    segmentation: the DICOM segmentation of the same labels, which the groups refer to.

    Raises:
        InputError: the series forms no volume, or a header can no longer be read.
    """
    with quiet(), atomic_write(path) as partial:
        segments, images = pydicom.dcmread(segmentation), source_images(found.series, found.anonymous)
        groups = [
            group
            for number, part in enumerate(found.parts[1], start=1)
            if part.found is not None
            for group in (_group(number, part, found, segments), *_place(number, part, found, images))
        ]
        observer = sr.ObserverContext(
            _codes.DCM.Device,
            sr.DeviceObserverIdentifyingAttributes(
                uid=segments.SOPInstanceUID,
                name="kitseg",
                manufacturer_name="kitseg",
                model_name=found.algorithm.name,
                serial_number="none",
                physical_location=NOTICE,
            ),
        )
        report = sr.MeasurementReport(
            observation_context=sr.ObservationContext(observer_device_context=observer),
            procedure_reported=_codes.LN.CTUnspecifiedBodyRegion,
            imaging_measurements=groups or [_nothing(found)],
            title=_codes.DCM.ImagingMeasurementReport,
            referenced_images=images,
        )
        for text in (NOTICE, *found.remarks):
            report[0].ContentSequence.append(sr.TextContentItem(_codes.DCM.Comment, text, _CONTAINS))
        sr.ComprehensiveSR(
            evidence=[segments, *images],
            content=report[0],
            series_number=series_number(found.series, 1),
            is_complete=True,
            series_description="kitseg measurements, research use",
            **equipment(found.algorithm),
        ).save_as(partial)


def _group(number: int, part: LabelPart, found: SegmentedSeries, segments: Any) -> Any:
    return sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        referenced_segment=sr.ReferencedSegment(
            segments.SOPClassUID,
            segments.SOPInstanceUID,
            number,
            source_series=sr.SourceSeriesForSegmentation(segments.ReferencedSeriesSequence[0].SeriesInstanceUID),
        ),
        algorithm_id=sr.AlgorithmIdentification(found.algorithm.name, found.algorithm.version),
        measurements=list(_measurements(part.found)),
        **_what(part, found),
    )


def _place(number: int, part: LabelPart, found: SegmentedSeries, images: Sequence[pydicom.Dataset]) -> Iterator[Any]:
    """The longest line of a segment within a slice, if it is a lesion's long axis; OHIF shows no report without lines.

    It is not the long axis where slices aren't axial, or the longest one was interpolated.
    """
    mask = found.frames == number
    if mask.any():  # not only in slices that were interpolated
        across, down, along = stack_of(found.series).native.spacing
        index, length, ends = axial_line(mask, (along, down, across))
        if isinstance(part.found, Lesion) and abs(length - part.found.axial_mm) > 10**-DECIMALS:
            return
        image = sr.SourceImageForRegion(images[index].SOPClassUID, images[index].SOPInstanceUID)
        line = sr.ImageRegion("POLYLINE", ends[:, ::-1] + 0.5, image)  # column, row; a pixel's centre is at 0.5
        yield sr.PlanarROIMeasurementsAndQualitativeEvaluations(referenced_region=line, **_what(part, found))


def _what(part: LabelPart, found: SegmentedSeries) -> dict[str, Any]:
    """What a group is about, as highdicom takes it."""
    assert part.found is not None
    name, uid = tracking(found.name(part), found)
    return {
        "tracking_identifier": sr.TrackingIdentifier(uid=uid, identifier=name),
        "finding_type": KINDS[part.kind],
        "finding_sites": [sr.FindingSite(_codes.SCT.Kidney, laterality(part.found.side))],
    }


def _measurements(found: Kidney | Lesion | None) -> Iterator[Any]:
    for name, (concept, unit, made) in MEASUREMENTS.items():
        if (value := getattr(found, name, None)) is not None:
            if isinstance(found, Kidney) and name == "volume_ml":  # with its lesions
                made = {**made, "derivation": _codes.SCT.Total}
            yield sr.Measurement(concept, round(float(value), DECIMALS), unit, **made)


def _nothing(found: SegmentedSeries) -> Any:
    name, uid = tracking("nothing found", found)
    return sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(uid=uid, identifier=name),
        finding_type=_codes.SCT.Kidney,
        qualitative_evaluations=[sr.QualitativeEvaluation(*NOTHING_FOUND)],
    )
