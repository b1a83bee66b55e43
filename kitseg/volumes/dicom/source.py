"""What DICOM files written by kitseg take over from their series: geometry, references, patient and study."""

from __future__ import annotations

from contextlib import suppress

import pydicom
from pydicom.uid import UID, CTImageStorage
from pydicom.valuerep import DA, TM, DSfloat

from kitseg.errors import InputError
from kitseg.volumes.dicom.headers import PASSES, Header, element_text, read_dataset, valid_uid
from kitseg.volumes.dicom.series import Series, stack_of

#: What a PACS files by, and nothing else; always present, empty where it isn't known.
WHO = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber",
    "StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName",
)  # fmt: skip
#: Present only where the source has them.
IF_KNOWN = ("IssuerOfPatientID", "StudyDescription")


def source_images(series: Series, anonymous: bool) -> list[pydicom.Dataset]:
    """The slices of a series with the attributes that highdicom needs, and no others; ``anonymous``: of nobody.

    Raises:
        InputError: the series forms no volume, or its header can no longer be read.
    """
    stack = stack_of(series)
    who = _nobody() if anonymous else _who(stack.headers[0])
    return [_source(header, series, stack.native.spacing[2], who) for header in stack.headers]


def series_number(series: Series, kind: int) -> int:
    """The number of a series made from another: beyond scanners' numbers, and different for each source and kind."""
    stated = series.headers[0].passes[PASSES.index("SeriesNumber")]
    return 9000 + 1000 * kind + (int(stated) % 1000 if stated.isdecimal() else 0)


def _source(header: Header, series: Series, between: float, who: pydicom.Dataset) -> pydicom.Dataset:
    first, source = series.headers[0], pydicom.Dataset()
    source.update(who)
    source.StudyInstanceUID = valid_uid("study", series.study)
    source.SeriesInstanceUID = valid_uid("series", series.uid)
    source.SOPInstanceUID = valid_uid("instance", header.instance or str(header.path))
    source.SOPClassUID = header.sop_class if UID(header.sop_class).is_valid else CTImageStorage
    source.FrameOfReferenceUID = valid_uid("frame of reference", first.frame_of_reference or series.uid)
    source.Modality, source.Rows, source.Columns = "CT", *first.size
    source.PixelSpacing = _decimals(*first.spacing)
    source.SpacingBetweenSlices = _decimals(between)[0]
    source.SliceThickness = _decimals(first.thickness or between)[0]
    source.ImageOrientationPatient = _decimals(*first.row_axis, *first.column_axis)
    source.ImagePositionPatient = _decimals(*header.position)
    return source


def _nobody() -> pydicom.Dataset:
    found = pydicom.Dataset()
    for name in WHO:
        setattr(found, name, "")
    found.SpecificCharacterSet = "ISO_IR 192"  # of what kitseg writes, too, such as the names of classes
    return found


def _who(header: Header) -> pydicom.Dataset:
    """The attributes of patient and study, in UTF-8 whatever the character set of the file."""
    source = _nobody()
    try:
        found = read_dataset(header.path)
        found.decode()
        for name in WHO:
            setattr(source, name, _written(name, element_text(found, name)))
        for name in IF_KNOWN:
            if text := element_text(found, name):
                setattr(source, name, text[:64])
    except Exception as error:
        problem = f"its header can't be read ({type(error).__name__})"
        raise InputError(header.path, problem, "Export the series again") from error
    if source.PatientSex not in ("M", "F", "O"):
        source.PatientSex = ""
    return source


def _written(name: str, text: str) -> str:
    """A text unchanged, but for what can't be written: backslashes in names, and dates and times of no valid form."""
    if name.endswith("Name"):
        return text.replace("\\", " ")
    with suppress(ValueError):
        kind = {"Date": DA, "Time": TM}.get(name[-4:], str)
        return text if kind(text) is not None else ""
    return ""


def _decimals(*numbers: float) -> list[DSfloat]:
    """Numbers as DICOM decimal strings of at most 16 characters."""
    return [DSfloat(number, auto_format=True) for number in numbers]
