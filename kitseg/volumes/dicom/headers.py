"""The header of a DICOM file, without its pixels."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydicom
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
)

from kitseg.errors import InputError
from kitseg.runtime.files import PARTIAL

#: Attributes that distinguish several passes in one series, in the order in which they are tried; times last.
PASSES = (
    "AcquisitionNumber", "TemporalPositionIdentifier", "ConvolutionKernel", "ImageType", "SeriesNumber",
    "SeriesDescription", "KVP", "FilterType", "ReconstructionDiameter", "SliceThickness", "ContrastBolusAgent",
    "ScanOptions", "NominalPercentageOfCardiacPhase", "TriggerTime",
    "AcquisitionDateTime", "AcquisitionTime", "ContentTime", "SeriesTime",
)  # fmt: skip
TIMES = frozenset(PASSES[-4:])
LARGEST = 1 << 29  # bytes of a file that are read, its header alone or the slice too: a thousand times a slice's
LEAST_SHARE = 0.1  # of the files, that have an element which distinguishes passes
_CHUNK = 1 << 20
_PLAIN = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)
_SUFFIXES = (".dcm", ".ima")
#: The first element of a file without preamble: group 2 or 8, and a type in two letters or a length below 65536 bytes.
_NO_PREAMBLE = re.compile(rb"[\x02\x08]\x00.\x00([A-Z]{2}|..\x00\x00)", re.DOTALL)


@dataclass(frozen=True)
class Header:
    """The header of a file; missing values are empty or None.

    position: mm in DICOM's LPS; row_axis, column_axis: unit vectors along a row and along a column; spacing: mm between
    rows and between columns; between: mm that it states between slices; passes: the values of ``PASSES``, which
    distinguish several passes in one series; number: InstanceNumber, by which viewers count; is_packed: its pixels are
    compressed; unit: of the values, empty if not given; broken: the header can't be read.
    """

    path: Path
    instance: str = ""
    series: str = ""
    study: str = ""
    frame_of_reference: str = ""
    sop_class: str = ""
    patient: str = ""
    manufacturer: str = ""
    description: str = ""
    modality: str = ""
    image_type: tuple[str, ...] = ()
    body_part: str = ""
    contrast: bool = False
    kernel: str = ""
    thickness: float | None = None
    between: float | None = None
    passes: tuple[str, ...] = ()
    number: str = ""
    is_packed: bool = False
    frames: int = 1
    unit: str = ""
    samples: int = 1
    size: tuple[int, int] = (0, 0)
    spacing: tuple[float, ...] = ()
    position: tuple[float, ...] = ()
    row_axis: tuple[float, ...] = ()
    column_axis: tuple[float, ...] = ()
    broken: bool = False


def walk(folder: Path) -> Iterator[Path]:
    """All files below a folder, linked ones too, hidden ones only if they are DICOM; no hidden folders.

    Raises InputError: a folder that can't be read.
    """

    def refuse(error: OSError) -> None:
        raise InputError(error.filename, f"can't be read ({error.strerror})", "Choose a folder that you may read")

    seen = set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # a link to a folder above
            folders[:], names = [], []
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(place) / name for name in sorted(names)):
            if not path.name.startswith(".") or (not path.name.startswith(PARTIAL) and is_dicom(path)):
                yield path


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM, with or without the preamble (128 bytes, then ``DICM``); False if it can't be read."""
    with suppress(Exception), warnings.catch_warnings(action="ignore"):  # pydicom raises many types
        if path.is_file():
            with path.open("rb") as stream:
                start = stream.read(132)
            plain = start[128:] != b"DICM" and _NO_PREAMBLE.match(start)
            return bool(element_text(read_dataset(path), "SOPClassUID")) if plain else start[128:] == b"DICM"
    return False


def read_dataset(path: Path, stop_before_pixels: bool = True) -> pydicom.Dataset:
    """Read a DICOM file with or without preamble.

    Raises whatever pydicom raises, and ValueError where it takes more than ``LARGEST`` bytes of memory.
    """
    with _Bounded(path.open("rb", buffering=0)) as file:
        found = pydicom.dcmread(file, stop_before_pixels=stop_before_pixels, force=True)
    if "TransferSyntaxUID" not in found.file_meta:
        implicit, _ = found.original_encoding
        found.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    return found


class _Bounded(io.BufferedReader):
    """A file of which a limited number of bytes are read, also when unpacked; pydicom reads all that is deflated."""

    def __init__(self, raw: io.RawIOBase) -> None:
        super().__init__(raw)
        self.left = LARGEST

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size >= 0:
            self._take(size)
            return super().read(size)
        self._take(os.fstat(self.fileno()).st_size)
        unpacker, content = zlib.decompressobj(-zlib.MAX_WBITS), super().read()
        packed = content
        while packed:
            self._take(len(unpacker.decompress(packed, _CHUNK)))
            packed = unpacker.unconsumed_tail
        return content

    def _take(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise ValueError(f"more than {LARGEST} bytes")


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of pydicom and highdicom, which may quote patient data."""
    logging.getLogger("highdicom").setLevel(logging.ERROR)
    with warnings.catch_warnings(action="ignore"):
        yield


def read_dicom_header(path: Path) -> Header | None:
    """Read the header of a file; None if it isn't DICOM, or a DICOMDIR, which only lists other files."""
    if not is_dicom(path):
        readable = os.access(path, os.R_OK) and path.suffix.lower() not in _SUFFIXES
        return Header(path, broken=True) if path.is_file() and not readable else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom warns about values that kitseg checks itself or doesn't use
        try:
            found = read_dataset(path)
            sop_class = element_text(found, "SOPClassUID") or str(found.file_meta.get("MediaStorageSOPClassUID", ""))
            if sop_class == MediaStorageDirectoryStorage:
                return None
            header = _header(path, found, sop_class)
            return header if sop_class or header.modality else Header(path, broken=True)
        except Exception:  # any error of pydicom in a broken file; its message may quote patient data
            return Header(path, broken=True)


def differing_values(headers: Sequence[Header]) -> Iterator[list[str]]:
    """Of each simple element that differs among these files, in the order of tags, the value in each, as text.

    Elements of few files are left out, so that hostile ones with others in each file take no time.
    """
    files = [_simple_values(header.path) for header in headers]
    having = Counter(tag for values in files for tag in values)
    for tag in sorted(tag for tag, count in having.items() if count >= LEAST_SHARE * len(files)):
        found = [values.get(tag, "") for values in files]
        if len(set(found)) > 1:
            yield found


def _simple_values(path: Path) -> dict[int, str]:
    values = {}
    with suppress(Exception), warnings.catch_warnings(action="ignore"):  # a damaged element ends the list
        for element in read_dataset(path):
            if element.VR not in ("SQ", "UN") and not element.VR.startswith("O"):
                values[int(element.tag)] = str(element.value)
    return values


def made_up_uid(*words: str) -> str:
    """A reproducible UID derived from texts, for files without one."""
    number = int.from_bytes(hashlib.sha256("\n".join(words).encode("utf-8", "surrogateescape")).digest()[:15], "big")
    return str(UID(f"2.25.{number}"))


def valid_uid(kind: str, uid: str) -> str:
    """A valid UID unchanged; a derived UID for an invalid value, which could contain anything."""
    return uid if UID(uid).is_valid else made_up_uid(kind, uid)


def _header(path: Path, found: pydicom.Dataset, sop_class: str) -> Header:
    axes = _numbers(found, "ImageOrientationPatient", 6)
    return Header(
        path=path,
        instance=element_text(found, "SOPInstanceUID") or str(found.file_meta.get("MediaStorageSOPInstanceUID", "")),
        series=element_text(found, "SeriesInstanceUID"),
        study=element_text(found, "StudyInstanceUID"),
        frame_of_reference=element_text(found, "FrameOfReferenceUID"),
        sop_class=sop_class,
        patient=element_text(found, "PatientID"),
        manufacturer=element_text(found, "Manufacturer"),
        description=element_text(found, "SeriesDescription"),
        modality=element_text(found, "Modality"),
        image_type=tuple(element_text(found, "ImageType").upper().split("\\")),
        body_part=element_text(found, "BodyPartExamined").upper(),
        contrast=element_text(found, "ContrastBolusAgent").upper() not in ("", "NONE", "NO"),
        kernel=element_text(found, "ConvolutionKernel").split("\\")[0],
        thickness=next(iter(_numbers(found, "SliceThickness", 1)), None),
        between=next(iter(_numbers(found, "SpacingBetweenSlices", 1)), None),
        passes=tuple(element_text(found, name) for name in PASSES),
        number=_image_number(found),
        is_packed=found.file_meta.TransferSyntaxUID not in _PLAIN,
        unit=element_text(found, "RescaleType").upper(),
        frames=int(next(iter(_numbers(found, "NumberOfFrames", 1)), 1)),
        samples=int(element_text(found, "SamplesPerPixel") or 1),
        size=(int(element_text(found, "Rows") or 0), int(element_text(found, "Columns") or 0)),
        spacing=_numbers(found, "PixelSpacing", 2),
        position=_numbers(found, "ImagePositionPatient", 3),
        row_axis=axes[:3],
        column_axis=axes[3:],
    )


def _image_number(found: pydicom.Dataset) -> str:
    """The InstanceNumber; empty where it isn't a number, and the rest is read anyway."""
    with suppress(Exception):
        return str(int(found.InstanceNumber))
    return ""


def decimal_text(found: pydicom.Dataset, name: str) -> str:
    """A number or several as text, with decimal points where the file has decimal commas."""
    return element_text(found, name).replace(",", ".")


def element_text(found: pydicom.Dataset, name: str) -> str:
    """An element's value as text, several with backslashes between as in the file; empty where it is missing."""
    value: Any = found.get(name)
    if value is None:
        return ""
    return "\\".join(map(str, value)) if isinstance(value, pydicom.multival.MultiValue) else str(value).strip()


def _numbers(found: pydicom.Dataset, name: str, count: int) -> tuple[float, ...]:
    """The given number of finite values, or an empty tuple."""
    try:
        numbers = tuple(float(part) for part in decimal_text(found, name).split("\\"))
    except ValueError:
        return ()
    return numbers if len(numbers) == count and all(abs(n) < 1e6 for n in numbers) else ()
