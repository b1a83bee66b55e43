"""One case as grand-challenge.org's containers get it: an input folder in, an output folder out, no network."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from kitseg.commands.measure import Measured, write_findings
from kitseg.commands.predict import doubts as scan_doubts
from kitseg.errors import InputError, UsageError
from kitseg.labels import Scheme
from kitseg.measurement import quality
from kitseg.models.builtin import open_builtin
from kitseg.models.members import Ensemble, Prediction
from kitseg.runtime.files import lies_in
from kitseg.runtime.overwrite import refuse_overwrite
from kitseg.runtime.provenance import FileFormat
from kitseg.types import Case
from kitseg.volumes.names import BUNDLE, is_volume_name
from kitseg.volumes.nifti import write_volume
from kitseg.volumes.scan import read_scan

INPUTS, LABELS, FINDINGS = "inputs.json", "output.mha", "kidney-findings.json"


@dataclass(frozen=True)
class _Socket:
    relative_path: str


@dataclass(frozen=True)
class _Input:
    """An entry of the platform's ``inputs.json``; older ones call a socket an interface."""

    socket: _Socket | None = None
    interface: _Socket | None = None

    @property
    def path(self) -> str:
        """Where the input lies, below the input folder."""
        found = self.socket or self.interface
        return found.relative_path if found else ""


_INPUTS: FileFormat[list[_Input]] = FileFormat(list[_Input], None, "It must be as the platform writes it.")


def find_input(folder: Path) -> Case:
    """The only scan in ``images/SOCKET/``; of the sockets in ``inputs.json``, where the platform has written it.

    Raises:
        InputError: there is no scan or there are several, or ``inputs.json`` is damaged or names a path outside.
    """
    inputs, images = folder / INPUTS, folder / "images"
    sockets = sorted(images.iterdir()) if images.is_dir() else []
    if inputs.exists():
        sockets = [folder / path for path in dict.fromkeys(one.path for one in _INPUTS.read(inputs)) if path]
        if odd := [path for path in sockets if not lies_in(path, folder)]:
            raise InputError(inputs, f"{odd[0]} lies outside the input folder", "Correct its relative_path.")
    files = [path for socket in sockets if os.path.isdir(socket) for path in sorted(socket.iterdir())]
    scans = [path for path in files if is_volume_name(path)]
    if len(scans) != 1:
        problem = f"has {len(scans)} scans in images/SOCKET/ (.mha, .nii.gz, .nrrd)"
        raise InputError(folder, problem, "A run takes exactly one.")
    return Case("output", scans[0])


def find_model(folder: Path) -> Path:
    """The bundle or run in the folder where the platform unpacks a model; the built-in one if it is empty.

    Raises UsageError: there are several, or something else.
    """
    runs = [*folder.glob("config.yaml"), *folder.glob("*/config.yaml")]
    found = [*folder.glob(f"*{BUNDLE}"), *(path.parent for path in runs)]
    if not found and folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UsageError(f"{folder} has no bundle (*{BUNDLE}) and no run: pack one of them, or give --model")
    if len(found) > 1:
        raise UsageError(f"{folder} has {len(found)} models: give one of them with --model")
    return found[0] if found else open_builtin().path


def predict_case(source: Path, to: Path, socket: str, model: Ensemble, scheme: Scheme | None = None) -> Prediction:
    """Write the labels of the only scan to ``SOCKET/output.mha``, on its own grid, and its findings beside ``images``.

    Args:
        source: the input folder, which is only read.
        to: the output folder.
        socket: where the platform expects the labels, such as ``images/kidney-tumor-segmentation``.
        model: what predicts.
        scheme: of the labels; the model's where it is None.

    Raises:
        InputError: not exactly one scan, or one that can't be used. UsageError: a file of another origin is in the way.
    """
    labels, findings = to / socket / LABELS, to / FINDINGS
    refuse_overwrite(labels, "mha")
    refuse_overwrite(findings, "findings")
    case = find_input(source)
    scan = read_scan(case)
    found = model.predict(scan, scheme=scheme)
    write_volume(labels, found.canonical, scan.native, found.scheme)
    doubts = (*scan_doubts(case, scan), *quality.doubts(found.canonical, scan.geometry, found.findings, scan.array))
    write_findings(findings, [Measured(scan.case_id, found.findings, labels=found.scheme.line, doubts=doubts)])
    return found
