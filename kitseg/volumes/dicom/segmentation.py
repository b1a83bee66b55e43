"""DICOM output: labels as a DICOM segmentation object on the voxels of the source series."""

from __future__ import annotations

import logging
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
from highdicom.color import CIELabColor
from highdicom.seg import Segmentation, SegmentDescription
from numpy.typing import NDArray
from pydicom.sr.codedict import codes
from pydicom.uid import UID, CTImageStorage
from pydicom.valuerep import DA, TM, DSfloat

from kitseg.errors import InputError
from kitseg.labels import CYST, KIDNEY, KITS23, TUMOR, Scheme, to_kits19
from kitseg.runtime.files import atomic_write
from kitseg.types import Geometry
from kitseg.volumes.dicom.headers import Header, made_up_uid, read_dataset
from kitseg.volumes.dicom.series import Series, stack_of
from kitseg.volumes.nifti import turn_to_native

#: Written into every segmentation object; at most 64 characters.
NOTICE = "For research use only. kitseg is not a medical device."

SERIES_NUMBER = 900  # beyond the numbers that scanners use
_codes: Any = codes
_WHO = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber",
    "StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName",
)  # fmt: skip
_COLORS = {KIDNEY: (200, 110, 90), TUMOR: (250, 220, 60), CYST: (90, 160, 240)}  # RGB


@dataclass(frozen=True)
class Algorithm:
    """Name and version of the model that predicted the labels."""

    name: str
    version: str


def write_segmentation(
    path: Path,
    labels: NDArray[np.uint8],
    series: Series,
    algorithm: Algorithm,
    keep_identifiers: bool = False,
    scheme: Scheme = KITS23,
) -> None:
    """Write (D, H, W) labels in orientation (I, P, L) as a binary DICOM SEG of a series, atomically.

    The segments are kidney (1), tumor (2) and, if the scheme has them and there are any, cysts (3), with the scheme's
    names. Frames without labels are omitted, except in
    an empty segmentation. Without ``keep_identifiers``, the attributes of patient and study are empty; the UIDs of
    study, series, frame of reference and slices remain, because the segmentation refers to them.

    Raises:
        InputError: the series forms no volume, or a header can no longer be read.
    """
    stack = stack_of(series)
    planes = turn_to_native(labels if scheme.cyst else to_kits19(labels), stack.native).transpose(2, 1, 0)
    frames = np.ascontiguousarray(planes[list(stack.slots)])
    segments = {KIDNEY: scheme.kidney.name, TUMOR: scheme.tumor.name}
    if scheme.cyst and (frames == CYST).any():
        segments[CYST] = scheme.cyst.name
    with warnings.catch_warnings(), atomic_write(path) as partial:
        warnings.simplefilter("ignore")
        logging.getLogger("highdicom").setLevel(logging.ERROR)
        segmentation = Segmentation(
            source_images=[_source(header, series, stack.native, keep_identifiers) for header in stack.headers],
            pixel_array=frames,
            segmentation_type="BINARY",
            segment_descriptions=[_segment(label, name, algorithm, series) for label, name in segments.items()],
            series_instance_uid=highdicom.UID(),
            series_number=SERIES_NUMBER,
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="kitseg",
            manufacturer_model_name=algorithm.name[:64],
            software_versions=algorithm.version[:64],
            device_serial_number="none",
            content_description=NOTICE,
            content_label="KIDNEY_TUMOR",
            series_description=NOTICE,
            omit_empty_frames=bool(frames.any()),
        )
        segmentation.save_as(partial)


def _source(header: Header, series: Series, native: Geometry, keep_identifiers: bool) -> pydicom.Dataset:
    """The attributes of a slice that highdicom needs, and no others."""
    first = series.headers[0]
    source = _who(header) if keep_identifiers else pydicom.Dataset()
    for name in _WHO:
        if name not in source:
            setattr(source, name, "")
    source.StudyInstanceUID, source.SeriesInstanceUID = _valid("study", series.study), _valid("series", series.uid)
    source.SOPInstanceUID = _valid("instance", header.instance or str(header.path))
    source.SOPClassUID = header.sop_class if UID(header.sop_class).is_valid else CTImageStorage
    source.FrameOfReferenceUID = _valid("frame of reference", first.frame_of_reference or series.uid)
    source.Modality, source.Rows, source.Columns = "CT", *first.size
    source.PixelSpacing = _decimals(*first.spacing)
    source.SpacingBetweenSlices = _decimals(native.spacing[2])[0]
    source.SliceThickness = _decimals(first.thickness or native.spacing[2])[0]
    source.ImageOrientationPatient = _decimals(*first.row_axis, *first.column_axis)
    source.ImagePositionPatient = _decimals(*header.position)
    return source


def _valid(kind: str, uid: str) -> str:
    """A valid UID unchanged; a derived UID for an invalid value, which could contain anything."""
    return uid if UID(uid).is_valid else made_up_uid(kind, uid)


def _who(header: Header) -> pydicom.Dataset:
    """The attributes of patient and study, in UTF-8 whatever the character set of the file."""
    source = pydicom.Dataset()
    source.SpecificCharacterSet = "ISO_IR 192"
    try:
        found = read_dataset(header.path)
        found.decode()
        for name in _WHO:
            setattr(source, name, _written(name, str(found.get(name) or "")))
    except Exception as error:
        problem = f"its header can't be read ({type(error).__name__})"
        raise InputError(header.path, problem, "Export the series again") from error
    if source.PatientSex not in ("M", "F", "O"):
        source.PatientSex = ""
    return source


def _written(name: str, text: str) -> str:
    """A text unchanged; an empty one for a date or a time that DICOM doesn't allow, which can't be written."""
    with suppress(ValueError):
        kind = {"Date": DA, "Time": TM}.get(name[-4:], str)
        return text if kind(text) is not None else ""
    return ""


def _decimals(*numbers: float) -> list[DSfloat]:
    """Numbers as DICOM decimal strings of at most 16 characters."""
    return [DSfloat(number, auto_format=True) for number in numbers]


def _segment(label: int, name: str, algorithm: Algorithm, series: Series) -> SegmentDescription:
    sct = _codes.SCT
    kidney = label == KIDNEY
    return SegmentDescription(
        segment_number=label,
        segment_label=name,
        segmented_property_category=sct.AnatomicalStructure if kidney else sct.MorphologicallyAbnormalStructure,
        segmented_property_type={KIDNEY: sct.Kidney, TUMOR: sct.Neoplasm, CYST: sct.Cyst}[label],
        algorithm_type="AUTOMATIC",
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name=algorithm.name, family=_codes.DCM.ArtificialIntelligence, version=algorithm.version
        ),
        tracking_id=f"{series.case_id} {name}",
        tracking_uid=made_up_uid("tracking", series.case_id, name),
        anatomic_regions=None if kidney else [sct.Kidney],
        display_color=CIELabColor.from_rgb(*_COLORS[label]),
    )
