"""CT volumes as DICOM series for the tests, with a patient whose name and identifiers must not get anywhere."""

from __future__ import annotations

from pathlib import Path

import gdcm
import numpy as np
import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    generate_uid,
)

WHO = {
    "PatientName": "Zwiebelfisch^Hannelore",
    "PatientID": "PID-4711-XYZ",
    "PatientBirthDate": "19310417",
    "AccessionNumber": "ACC-0815",
    "StudyID": "STUDY-42",
    "StudyDate": "20190823",
    "StudyTime": "071312",
    "InstitutionName": "Klinikum Beispielstadt",
    "ReferringPhysicianName": "Quacksalber^Konrad",
    "OperatorsName": "Knipser^Karl",
    "StudyDescription": "Abdomen Fr. Zwiebelfisch",
    "OtherPatientIDs": "ALIAS-99",
    "PatientAddress": "Holzweg 13",
}
WORDS = [
    word.encode() for value in WHO.values() for word in (*value.split("^"), value) if word not in ("Fr.", "Abdomen")
]

PLAIN = {
    "implicit": ImplicitVRLittleEndian,
    "explicit": ExplicitVRLittleEndian,
    "deflated": DeflatedExplicitVRLittleEndian,
}
PACKED = {
    "rle": gdcm.TransferSyntax.RLELossless,
    "jpeg": gdcm.TransferSyntax.JPEGLosslessProcess14_1,
    "jpeg-ls": gdcm.TransferSyntax.JPEGLSLossless,
    "jpeg2000": gdcm.TransferSyntax.JPEG2000Lossless,
}

#: Axial slices from below upwards as a scanner makes them: (slice, row, column) to RAS+ mm.
AXIAL = np.array([[0, 0, -0.8, 90], [0, -0.7, 0, 60.5], [2.5, 0, 0, 1000.25], [0, 0, 0, 1]])


def hu(shape: tuple[int, int, int] = (12, 8, 10), seed: int = 0) -> np.ndarray:
    """Planes (slices, rows, columns) whose voxels all differ from their neighbours."""
    return np.random.default_rng(seed).integers(-1000, 2000, shape).astype(np.int16)


def write_series(
    folder: Path, planes: np.ndarray, affine: np.ndarray = AXIAL, seed: int = 1, **tags: object
) -> list[Path]:
    """Write HU planes (slices, rows, columns) as a CT series under names that tell nothing; paths in order of slices.

    affine: (slice, row, column) to RAS+ mm. tags: what all its files say, or if they begin with ``each_`` one value a
    slice, such as ``each_ImagePositionPatient``; ``series`` and ``study`` name UIDs; ``signed`` and ``syntax`` say how
    its pixels are stored.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    series, study = str(tags.pop("series", f"series {seed}")), str(tags.pop("study", "study"))
    signed, syntax = bool(tags.pop("signed", False)), str(tags.pop("syntax", "explicit"))
    each = {name[5:]: tags.pop(name) for name in list(tags) if name.startswith("each_")}
    paths = []
    for k, plane in enumerate(planes):
        found = _slice(plane, k, np.diag([-1.0, -1, 1, 1]) @ affine, signed)
        found.SeriesInstanceUID, found.StudyInstanceUID = uid(series), uid(study)
        found.FrameOfReferenceUID = uid("frame", study)
        found.SOPInstanceUID = found.file_meta.MediaStorageSOPInstanceUID = uid(series, str(k))
        for name, value in {**tags, **{name: values[k] for name, values in each.items()}}.items():
            if value is None:
                delattr(found, name)
            else:
                setattr(found, name, value)
        found.InstanceNumber = int(rng.integers(1000))
        paths.append(folder / rng.bytes(6).hex().upper())
        save(paths[-1], found, syntax)
    return paths


def uid(*words: str) -> str:
    return str(generate_uid(entropy_srcs=list(words)))


def save(path: Path, found: FileDataset, syntax: str = "explicit") -> None:
    found.file_meta.TransferSyntaxUID = PLAIN.get(syntax, ExplicitVRLittleEndian)
    found.save_as(path, enforce_file_format=True)
    if syntax in PACKED:
        pack(path, syntax)


def pack(path: Path, syntax: str) -> None:
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(path))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(PACKED[syntax]))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()


def edit(path: Path, **tags: object) -> None:
    """Change what a file says."""
    found = pydicom.dcmread(path)
    for name, value in tags.items():
        setattr(found, name, value)
    found.save_as(path)


def _slice(plane: np.ndarray, k: int, lps: np.ndarray, signed: bool) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    found = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    for name, value in WHO.items():
        setattr(found, name, value)
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    found.SOPClassUID, found.Modality = CTImageStorage, "CT"
    found.ImageType, found.SeriesDescription = ["ORIGINAL", "PRIMARY", "AXIAL"], "Fr. Zwiebelfisch 3.0"
    found.PatientSex, found.SliceThickness = "F", "3"
    found.ImageOrientationPatient = _decimals([*(lps[:3, 2] / spacing[2]), *(lps[:3, 1] / spacing[1])])
    found.ImagePositionPatient = _decimals(lps @ [k, 0, 0, 1])[:3]
    found.PixelSpacing = _decimals([spacing[1], spacing[2]])
    found.Rows, found.Columns = plane.shape
    found.SamplesPerPixel, found.PhotometricInterpretation = 1, "MONOCHROME2"
    found.BitsAllocated, found.BitsStored, found.HighBit, found.PixelRepresentation = 16, 16, 15, int(signed)
    found.RescaleSlope, found.RescaleIntercept = "1", "0" if signed else "-1024"
    stored = plane.astype(np.int32) + (0 if signed else 1024)
    found.PixelData = stored.astype("<i2" if signed else "<u2").tobytes()
    return found


def _decimals(numbers: object) -> list[str]:
    return [f"{number:.10g}" for number in numbers]
