"""Correct label maps with clicks of a person; the record beside them states it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kitseg.commands.case_record import (
    CaseRecord,
    forget,
    record_beside,
    refuse_case_overwrite,
    scheme_beside,
    write_record,
)
from kitseg.commands.measure import LabelTask
from kitseg.errors import InputError, UsageError
from kitseg.labels import BACKGROUND, CLASSES, KITS19, Scheme
from kitseg.postprocess.clicks import apply_clicks
from kitseg.runtime.locks import folder_lock
from kitseg.types import Geometry, Triple
from kitseg.volumes.blocks import read_block
from kitseg.volumes.nifti import write_labels
from kitseg.volumes.scan import scan_digest

_CLICK = re.compile(r"\s*([^,=]+),([^,=]+),([^,=]+)=(\w+)\s*")
_LABELS = {"background": BACKGROUND, **CLASSES}


@dataclass(frozen=True)
class Click:
    """A point in the patient's space, mm in LPS as viewers show it, and the class there, ``background`` or another."""

    x: float
    y: float
    z: float
    label: str

    def voxel(self, geometry: Geometry) -> Triple:
        """The voxel (slice, row, column) that holds it. Raises UsageError: it lies outside the grid."""
        voxel = geometry.voxel([-self.x, -self.y, self.z])
        if min(voxel) < 0 or any(a >= n for a, n in zip(voxel, geometry.shape, strict=True)):
            corners = np.array([[*np.multiply(c, np.subtract(geometry.shape, 1)), 1] for c in np.ndindex(2, 2, 2)])
            low, high = (f((corners @ geometry.affine.T)[:, :3] * (-1, -1, 1), axis=0) for f in (np.min, np.max))
            ranges = ", ".join(f"{name} {a:.0f} to {b:.0f}" for name, a, b in zip("xyz", low, high, strict=True))
            raise UsageError(f"the click {self} lies outside the scan, which has {ranges} mm (LPS)")
        return voxel

    def __str__(self) -> str:
        return f"{self.x:g},{self.y:g},{self.z:g}={self.label}"


def parse_clicks(texts: Sequence[str]) -> list[Click]:
    """Clicks such as ``-54.2,12,880=tumor``. Raises UsageError: none, or a text of another form."""
    if not texts:
        raise UsageError("give at least one --click x,y,z=tumor (mm, LPS)")
    clicks = []
    for text in texts:
        try:
            x, y, z, label = _CLICK.fullmatch(text).groups()  # type: ignore[union-attr]
            click = Click(float(x), float(y), float(z), label)
        except (AttributeError, ValueError) as error:
            raise UsageError(f"--click {text}: give x,y,z=CLASS in mm (LPS), such as -54.2,12,880=tumor") from error
        if label not in _LABELS or not np.isfinite([click.x, click.y, click.z]).all():
            raise UsageError(f"--click {text}: give finite numbers, and one of {', '.join(_LABELS)}")
        clicks.append(click)
    return clicks


def refine(
    task: LabelTask, clicks: Sequence[Click], to: Path, scheme: Scheme | None = None, probabilities: Path | None = None
) -> tuple[Path, float]:
    """Correct a label map with clicks and write it with its record; clicks of earlier corrections stay.

    probabilities: the folder of `kitseg infer`, whose probabilities limit how far a click reaches.

    Returns:
        The corrected label map, and how many ml the clicks changed.

    Raises:
        UsageError: no scan, a click outside it or of a class that the labels don't have, or an output that is not this
            command's; InputError: a file can't be used.
    """
    if task.scan is None:
        raise UsageError(f"{task.labels}: a click needs the scan. Give it with --ct")
    own = scheme or scheme_beside(task.labels) or KITS19
    if odd := [click.label for click in clicks if click.label not in {"background", *own.classes}]:
        raise UsageError(f"the labels are {own}: there is no {odd[0]} among them")
    before = record_beside(task.labels) or CaseRecord()
    target, record = to / f"{task.case}.nii.gz", to / f"{task.case}.json"
    if os.path.realpath(target) != os.path.realpath(task.labels) or not before.corrected:
        refuse_case_overwrite(record, [".nii.gz"])
    labels, scan = task.read(own)
    assert scan is not None
    points = [(click.voxel(scan.geometry), _LABELS[click.label]) for click in clicks]
    earlier = [(one.voxel(scan.geometry), _LABELS[one.label]) for one in (Click(**click) for click in before.corrected)]
    known = _probabilities(probabilities, task.case, scan.array.shape)
    found = apply_clicks(labels.array, scan.array, scan.geometry, points, earlier, known)
    changed = int((found != labels.array).sum()) * scan.geometry.voxel_ml
    every = [*before.corrected, *map(asdict, clicks)]
    names = [name for name in CLASSES if name in own.classes]
    volumes = {name: round(int((found == CLASSES[name]).sum()) * scan.geometry.voxel_ml, 3) for name in names}
    facts = {
        "case": task.case,
        "volumes_ml": volumes,
        "note": f"corrected by a person ({len(every)} {'click' if len(every) == 1 else 'clicks'})",
        "scan": task.scan.id if task.scan.slices else task.scan.image.name,
        "models": before.models,
        "versions": before.versions,
        "learned_from": before.learned_from,
        "labels": own.plain(),
        "corrected": every,
    }
    with folder_lock(to, "labels"):
        digest = scan_digest(task.scan)
        forget(record, [target])
        write_labels(target, found, scan.native, scheme=own)
        write_record(record, facts, {"scan_sha256": digest}, [target])
    return target, changed


def _probabilities(folder: Path | None, case: str, shape: tuple[int, ...]) -> dict[int, NDArray[np.float16]]:
    """The probability of each label on the scan's grid, as far as it is stored."""
    if folder is None:
        return {}
    block, found = read_block(folder, case), {}
    if block.geometry.shape != shape:
        raise InputError(folder, f"its probabilities of {case} are of another scan", "Run `kitseg infer` on this scan")
    for name in block.channels:
        if name in CLASSES:
            whole = found[CLASSES[name]] = np.zeros(shape, np.float16)
            whole[block.box.slices] = block.array[block.channels.index(name)]
    return found
