"""A real CT goes from Orthanc to kitseg's DICOM node, and what comes back is checked: ``nox -s pacs``."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pypdf
from dicom_files import WHO, WORDS, write_series
from ohif import problems

from kitseg.volumes.nifti import read_image

SAMPLE = Path(__file__).resolve().parents[1] / "kitseg" / "samples" / "hcc_007b" / "imaging.nii.gz"
MODALITIES = {"CT", "SEG", "SR", "DOC"}
SCRIPT = """
function OnStableSeries(series, tags, metadata)
  if tags["Modality"] == "CT" then
    RestApiPost("/modalities/kitseg/store", DumpJson({Resources = {series}, Synchronous = false}))
  end
end
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


class Orthanc:
    """Orthanc with an empty store, that sends each CT series to kitseg; its REST interface."""

    def __init__(self, folder: Path, kitseg: int) -> None:
        self.http, self.dicom = free_port(), free_port()
        (folder / "kitseg.lua").write_text(SCRIPT)
        settings = {
            "Name": "kitseg-test",
            "StorageDirectory": str(folder / "store"),
            "IndexDirectory": str(folder / "store"),
            "HttpPort": self.http,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False,
            "DicomAet": "ORTHANC",
            "DicomPort": self.dicom,
            "DicomCheckCalledAet": True,
            "DicomModalities": {"kitseg": ["KITSEG", "127.0.0.1", kitseg]},
            "StableAge": 2,
            "LuaScripts": [str(folder / "kitseg.lua")],
            "Plugins": [],
        }
        (folder / "orthanc.json").write_text(json.dumps(settings))
        program = shutil.which("Orthanc") or "/usr/sbin/Orthanc"
        log = (folder / "orthanc.txt").open("w")
        self.process = subprocess.Popen([program, str(folder / "orthanc.json")], stdout=log, stderr=log)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http}{path}", timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, body: bytes) -> Any:
        request = urllib.request.Request(f"http://127.0.0.1:{self.http}{path}", body)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def is_up(self) -> bool:
        assert self.process.poll() is None, "Orthanc ended"
        with suppress(OSError):
            return bool(self.get("/system"))
        return False

    def series(self, patient: str) -> dict[str, list[bytes]]:
        """The files of a patient with this ID, by modality."""
        found: dict[str, list[bytes]] = {}
        for one in self.get("/series?expand"):
            if self.get(f"/series/{one['ID']}/patient")["MainDicomTags"].get("PatientID", "") == patient:
                for instance in one["Instances"]:
                    with urllib.request.urlopen(f"http://127.0.0.1:{self.http}/instances/{instance}/file") as answer:
                        found.setdefault(one["MainDicomTags"]["Modality"], []).append(answer.read())
        return found

    def modalities(self, patient: str) -> set[str]:
        every = [(self.get(f"/series/{one['ID']}/patient"), one) for one in self.get("/series?expand")]
        return {
            one["MainDicomTags"]["Modality"]
            for who, one in every
            if who["MainDicomTags"].get("PatientID", "") == patient
        }


@contextmanager
def node(folder: Path, port: int, receiver: int, *options: str) -> Iterator[None]:
    """`kitseg serve --dicom` with the built-in network."""
    listen = [
        f"--port={free_port()}",
        f"--dicom=KITSEG:{port}",
        f"--send-to=ORTHANC@127.0.0.1:{receiver}",
        "--complete-after=2",
    ]
    command = [sys.executable, "-m", "kitseg", "serve", "--model=builtin", "--spool=spool", *listen, *options]
    log = (folder / "kitseg.txt").open("a")
    process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    try:
        wait_for(lambda: process.poll() is None and is_open(port), "the node does not start", 300)
        yield
        wait_for(lambda: not studies(folder), "the spool is not empty", 60)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 143
    finally:
        process.kill()
        lines = (folder / "kitseg.txt").read_text().splitlines()
        print(*(f"  {line}" for line in lines if not line.startswith("token")), sep="\n")


def is_open(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def studies(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder / "spool") if len(name) == 40]


def wait_for(done: Callable[[], object], problem: str, seconds: float) -> None:
    ends = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < ends, problem
        time.sleep(0.5)


def dicom_series(folder: Path) -> list[Path]:
    """The sample as a scanner sends it."""
    scan = read_image(SAMPLE, "sample")
    affine = scan.geometry.affine @ np.diag([-1.0, 1, 1, 1])
    affine[:3, 3] = (scan.geometry.affine @ [len(scan.array) - 1, 0, 0, 1])[:3]
    return write_series(folder, scan.array[::-1].astype(np.int16), affine, SeriesNumber="3")


def validate(content: bytes, folder: Path) -> list[str]:
    """The errors and warnings of dciodvfy."""
    (folder / "one.dcm").write_bytes(content)
    done = subprocess.run(["dciodvfy", folder / "one.dcm"], capture_output=True, text=True, check=False)
    return [line for line in done.stderr.splitlines() if line.startswith(("Error", "Warning"))]


def words(content: bytes) -> list[bytes]:
    """The words about the patient in a file, also in the text of a PDF file in it."""
    found = pydicom.dcmread(io.BytesIO(content))
    if "EncapsulatedDocument" in found:
        document = pypdf.PdfReader(io.BytesIO(found.EncapsulatedDocument))
        content += " ".join([str(document.metadata), *(page.extract_text() for page in document.pages)]).encode()
    return [word for word in WORDS if word in content]


def check(orthanc: Orthanc, files: dict[str, list[bytes]], folder: Path) -> None:
    """What came back is of the same patient and study, valid, and as OHIF needs it."""
    assert len(orthanc.get("/patients")) == len(orthanc.get("/studies")) == 1
    headers = [pydicom.dcmread(io.BytesIO(one)) for found in files.values() for one in found]
    for name in ("PatientID", "PatientName", "PatientBirthDate", "StudyInstanceUID", "StudyDate", "AccessionNumber"):
        assert len({str(header[name].value) for header in headers}) == 1, name
    print(f"one patient, one study: {', '.join(f'{len(found)} {name}' for name, found in files.items())}")
    results = {name: found[0] for name, found in files.items() if name != "CT"}
    for name, content in results.items():
        assert not (about := validate(content, folder)), (name, about)
        print(f"dciodvfy on {name}: no error, no warning")
    made = {name: pydicom.dcmread(io.BytesIO(content)) for name, content in results.items()}
    images = [pydicom.dcmread(io.BytesIO(one), stop_before_pixels=True) for one in files["CT"]]
    assert not (found := problems(images, made["SEG"], made["SR"], made["DOC"])), found
    print(f"OHIF: {len(made['SEG'].SegmentSequence)} segments, nothing missing")
    assert WHO["PatientID"].encode() in words(results["DOC"])


def check_anonymous(files: dict[str, list[bytes]], folder: Path) -> None:
    for name, found in files.items():
        for content in found:
            assert not (told := words(content)), (name, told)
            about = [line for line in validate(content, folder) if "DICOMDIR" not in line]  # it lacks what that needs
            assert not about, (name, about)
    sizes = ", ".join(f"{name} {len(found[0])}" for name, found in files.items())
    print(f"anonymous, searched byte for byte: {sizes} bytes, none of {len(WORDS)} words about the patient")


def main(folder: Path) -> None:
    port = free_port()
    orthanc = Orthanc(folder, port)
    try:
        wait_for(orthanc.is_up, "Orthanc does not start", 60)
        print(f"Orthanc {orthanc.get('/system')['Version']}")
        with node(folder, port, orthanc.dicom):
            for path in dicom_series(folder / "ct"):
                orthanc.post("/instances", path.read_bytes())
            wait_for(lambda: orthanc.modalities(WHO["PatientID"]) == MODALITIES, "no results", 900)
            check(orthanc, orthanc.series(WHO["PatientID"]), folder)
            (study,) = orthanc.get("/studies")
            orthanc.post("/modalities/kitseg/store", study.encode())
            wait_for(lambda: "results already" in (folder / "kitseg.txt").read_text(), "not recognized", 60)
            assert len(orthanc.get("/instances")) == len(list((folder / "ct").iterdir())) + 3
        (ct,) = [one["ID"] for one in orthanc.get("/series?expand") if one["MainDicomTags"]["Modality"] == "CT"]
        with node(folder, port, orthanc.dicom, "--anonymous"):
            orthanc.post("/modalities/kitseg/store", ct.encode())
            wait_for(lambda: orthanc.modalities("") == MODALITIES - {"CT"}, "no results", 900)
            check_anonymous(orthanc.series(""), folder)
        text = (folder / "kitseg.txt").read_text()
        assert not [word for word in WORDS if word.decode() in text], "the log names the patient"
    finally:
        orthanc.process.terminate()
        orthanc.process.wait(30)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
