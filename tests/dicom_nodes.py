"""DICOM nodes on loopback: one that receives results, one that sends studies, and a stand-in for the prediction."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import (
    ComprehensiveSRStorage,
    EncapsulatedPDFStorage,
    ExplicitVRLittleEndian,
    SegmentationStorage,
    generate_uid,
)
from pynetdicom import AE, evt
from pynetdicom.association import Association

SOP_CLASSES = {".dcm": SegmentationStorage, ".sr.dcm": ComprehensiveSRStorage, ".pdf.dcm": EncapsulatedPDFStorage}


@dataclass
class Work:
    """Takes the place of a prediction: writes a file for each ending; ``fails`` are the errors of the next ones."""

    images: list[dict[str, bytes]] = field(default_factory=list)
    fails: list[Exception] = field(default_factory=list)
    wait: Callable[[], object] = lambda: None

    def __call__(self, source: Path, to: Path, endings: Sequence[str], anonymous: bool) -> list[Path]:
        found = {path.name: path.read_bytes() for path in source.iterdir()}
        self.images.append(found)
        self.wait()
        if self.fails:
            raise self.fails.pop(0)
        to.mkdir()
        first = pydicom.dcmread(next(source.iterdir()), stop_before_pixels=True)
        return [self._write(to / f"scan{ending}", first, SOP_CLASSES[ending]) for ending in endings]

    def _write(self, path: Path, image: pydicom.Dataset, sop_class: str) -> Path:
        found = result(sop_class, image.StudyInstanceUID)
        found.PatientID = image.PatientID
        found.save_as(path, enforce_file_format=True)
        return path


def result(sop_class: str, study: str) -> FileDataset:
    """An object as kitseg's node makes it, without content."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = sop_class, ExplicitVRLittleEndian
    found = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    found.SOPClassUID, found.StudyInstanceUID, found.Manufacturer = sop_class, study, "kitseg"
    found.SOPInstanceUID = meta.MediaStorageSOPInstanceUID = generate_uid()
    found.SeriesInstanceUID, found.PatientID = generate_uid(), "PID-4711-XYZ"
    return found


@contextmanager
def receiver(
    port: int, *statuses: int, title: str = "PACS", classes: Iterable[str] = SOP_CLASSES.values()
) -> Iterator[list[pydicom.Dataset]]:
    """A node that keeps what it gets; statuses: of its first answers, then 0000; classes: of the objects it takes."""
    got, answers = list[pydicom.Dataset](), list(statuses)

    def store(event: evt.Event) -> int:
        if answers and (status := answers.pop(0)):
            return status
        got.append(event.dataset)
        return 0x0000

    node = AE(title)
    node.require_called_aet = True
    for sop_class in classes:
        node.add_supported_context(sop_class)
    server = node.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, store)])
    try:
        yield got
    finally:
        server.shutdown()


@contextmanager
def association(port: int, calling: str = "PACS", called: str = "KITSEG") -> Iterator[Association]:
    """An association with kitseg's node; released at the end unless it is closed by then."""
    client = AE(calling)
    client.connection_timeout = client.acse_timeout = client.dimse_timeout = 20
    for uid in (
        "1.2.840.10008.1.1",
        "1.2.840.10008.5.1.4.1.1.2",
        "1.2.840.10008.5.1.4.1.1.4",
        "1.2.840.10008.5.1.4.1.1.2.1",
        *SOP_CLASSES.values(),
    ):
        client.add_requested_context(uid, ExplicitVRLittleEndian)
    made = client.associate("127.0.0.1", port, ae_title=called)
    try:
        yield made
    finally:
        if made.is_established:
            made.release()


def send(port: int, files: Sequence[Path | pydicom.Dataset], **titles: str) -> list[int]:
    """The status of each object that is sent in one association."""
    with association(port, **titles) as made:
        return [int(made.send_c_store(file).Status) for file in files]


def wait_until(done: Callable[[], object], seconds: float = 20.0) -> None:
    ends = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < ends, "it takes too long"
        time.sleep(0.02)
