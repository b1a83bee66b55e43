"""DICOM output: a PDF file as an encapsulated document of the study that it belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pydicom
from highdicom.base import SOPClass
from pydicom.uid import EncapsulatedPDFStorage, ExplicitVRLittleEndian

from kitseg.runtime.files import atomic_write
from kitseg.volumes.dicom.headers import element_text, quiet
from kitseg.volumes.dicom.segmentation import SegmentedSeries, equipment
from kitseg.volumes.dicom.source import series_number, source_images

_UNKNOWN: dict[str, Any] = dict.fromkeys(("patient_id", "patient_name", "patient_birth_date", "patient_sex"))
_DATES = (("born", "PatientBirthDate"), ("study of", "StudyDate"))


def write_document(path: Path, found: SegmentedSeries, pdf: bytes) -> None:
    """Write a PDF file about a segmented series as DICOM Encapsulated PDF, atomically.

    Raises:
        InputError: the series forms no volume, or a header can no longer be read.
    """
    images = source_images(found.series, found.anonymous)
    with quiet(), atomic_write(path) as partial:
        document = SOPClass(
            study_instance_uid=images[0].StudyInstanceUID,
            series_number=series_number(found.series, 2),
            sop_class_uid=EncapsulatedPDFStorage,
            modality="DOC",
            series_description="kitseg report, research use",
            transfer_syntax_uid=ExplicitVRLittleEndian,
            **equipment(found.algorithm),
            **_UNKNOWN,
        )
        document.copy_patient_and_study_information(images[0])
        document.SpecificCharacterSet = images[0].SpecificCharacterSet
        document.ConversionType, document.BurnedInAnnotation = "WSD", "NO" if found.anonymous else "YES"
        document.AcquisitionDateTime, document.ConceptNameCodeSequence = "", []
        document.DocumentTitle = "kitseg report, research use"
        document.SourceInstanceSequence = [_reference(image) for image in images]
        document.MIMETypeOfEncapsulatedDocument = "application/pdf"
        document.EncapsulatedDocumentLength = len(pdf)
        document.EncapsulatedDocument = pdf + b"\0" * (len(pdf) % 2)
        document.save_as(partial)


def patient_line(found: SegmentedSeries) -> str:
    """Whose a series is, for a reader: name, ID, date of birth and date of the study; empty if anonymous."""
    source = source_images(found.series, found.anonymous)[0]
    name = element_text(source, "PatientName").split("=")[0].replace("^", " ").strip()
    days = {word: element_text(source, key).replace(".", "") for word, key in _DATES}  # old files have dots
    dates = [f"{word} {day[:4]}-{day[4:6]}-{day[6:]}" for word, day in days.items() if day]
    return ", ".join(filter(None, [name, element_text(source, "PatientID"), *dates]))


def _reference(image: pydicom.Dataset) -> pydicom.Dataset:
    item = pydicom.Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = image.SOPClassUID, image.SOPInstanceUID
    return item
