"""Correct label maps with clicks of a person; the record beside them states it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kitseg.commands.case_record import (
    CASE_RECORD,
    CaseRecord,
    file_ending,
    forget,
    is_of_another_scan,
    record_beside,
    record_of,
    refuse_case_overwrite,
    refuse_scan_overwrite,
    scheme_beside,
)
from kitseg.commands.measure import LabelTask
from kitseg.errors import InputError, UsageError
from kitseg.labels import BACKGROUND, CLASSES, KITS19, Scheme
from kitseg.postprocess.clicks import apply_clicks
from kitseg.runtime.files import atomic_write, file_digest
from kitseg.runtime.locks import folder_lock
from kitseg.types import Box, Geometry, Probabilities, Triple, Volume, triple
from kitseg.volumes.blocks import read_block, recorded_scan_digest, scan_of
from kitseg.volumes.nifti import CORRECTED_MARK, read_image, write_labels
from kitseg.volumes.scan import TOLERANCE, hu_digest, scan_digest

_POINT = r"\s*([^,=:]+),([^,=:]+),([^,=:]+)"
_CLICK, _BOX = re.compile(rf"{_POINT}=(\w+)\s*"), re.compile(rf"{_POINT}:{_POINT}=(\w+)\s*")
LARGEST_MM = 1e6  # of a coordinate
_LABELS = {"background": BACKGROUND, **CLASSES}


@dataclass(frozen=True)
class Click:
    """A point in the patient's space, mm in LPS as viewers show it, and the class there, ``background`` or another.

    to: the opposite corner of a box, whose first corner the point is then.
    """

    x: float
    y: float
    z: float
    label: str
    to: Sequence[float] | None = None

    def where(self, geometry: Geometry) -> Triple | Box:
        """The voxel (slice, row, column) that holds it, or the box. Raises UsageError: it lies outside the grid."""
        first = self._voxel((self.x, self.y, self.z), geometry)
        if self.to is None:
            return first
        last = self._voxel(self.to, geometry)
        return Box(triple(map(min, first, last)), triple(np.add(triple(map(max, first, last)), 1)))

    def _voxel(self, point: Sequence[float], geometry: Geometry) -> Triple:
        voxel = geometry.voxel(np.multiply(point, (-1, -1, 1)))
        if min(voxel) < 0 or any(a >= n for a, n in zip(voxel, geometry.shape, strict=True)):
            corners = np.array([[*np.multiply(c, np.subtract(geometry.shape, 1)), 1] for c in np.ndindex(2, 2, 2)])
            low, high = (f((corners @ geometry.affine.T)[:, :3] * (-1, -1, 1), axis=0) for f in (np.min, np.max))
            ranges = ", ".join(f"{name} {a:.0f} to {b:.0f}" for name, a, b in zip("xyz", low, high, strict=True))
            kind = "box" if self.to else "click"
            raise UsageError(f"the {kind} {self} lies outside the scan, which has {ranges} mm (LPS)")
        return voxel

    def __str__(self) -> str:
        ends = [(self.x, self.y, self.z), *([self.to] if self.to else [])]
        return f"{':'.join(','.join(f'{mm:g}' for mm in end) for end in ends)}={self.label}"

    def plain(self) -> dict[str, Any]:
        """As the record holds it."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def parse_clicks(texts: Sequence[str], boxes: Sequence[str] = ()) -> list[Click]:
    """Boxes such as ``-80,0,860:-40,40,900=tumor``, and then clicks such as ``-54.2,12,880=tumor``.

    Raises UsageError: none, or a text of another form.
    """
    if not (texts or boxes):
        raise UsageError("give at least one --click x,y,z=tumor or --box x,y,z:x,y,z=tumor (mm, LPS)")
    clicks = []
    forms = [
        ("box", _BOX, boxes, "x,y,z:x,y,z=CLASS", "-80,0,860:-40,40,900=tumor"),
        ("click", _CLICK, texts, "x,y,z=CLASS", "-54.2,12,880=tumor"),
    ]
    for option, form, given, shown, example in forms:
        for text in given:
            try:
                *numbers, label = form.fullmatch(text).groups()  # type: ignore[union-attr]
                x, y, z, *to = map(float, numbers)
            except (AttributeError, ValueError) as error:
                raise UsageError(f"--{option} {text}: give {shown} in mm (LPS), such as {example}") from error
            if label not in _LABELS or not np.all(np.abs([x, y, z, *to]) < LARGEST_MM):
                limits = f"finite numbers below {LARGEST_MM:.0f}"
                raise UsageError(f"--{option} {text}: give {limits}, and one of {', '.join(_LABELS)}")
            clicks.append(Click(x, y, z, label, tuple(to) or None))
    return clicks


@dataclass(frozen=True)
class Refinement:
    """A label map that is open for clicks, with its scan.

    scan_sha256: of the scan's files; target: the file for the corrected labels; there: hashes of it and of its record
    when this was opened or saved last; background: the model's probability of it, where known.
    """

    task: LabelTask
    scheme: Scheme
    before: CaseRecord
    labels: NDArray[np.uint8]
    scan: Volume
    scan_sha256: str
    target: Path
    there: tuple[str, ...]
    background: NDArray[np.float16] | None = None

    @classmethod
    def open(cls, task: LabelTask, to: Path, scheme: Scheme | None = None) -> Refinement:
        """Read a label map and its scan; ``to``: the folder for the corrected labels, or their file.

        Raises:
            UsageError: no scan, not the one that the labels were made from, or a target that is not this command's to
                replace; InputError: a file can't be used.
        """
        if task.scan is None:
            raise UsageError(f"{task.labels}: a click needs the scan. Give it with --ct")
        before, digest = record_beside(task.labels) or CaseRecord(), scan_digest(task.scan)
        target = to if file_ending(to, 1) else to / f"{task.case}.nii.gz"
        refuse_scan_overwrite(task.scan.image, target)
        there = _digests(target)
        if os.path.realpath(target) != os.path.realpath(task.labels) or not before.corrected:
            refuse_case_overwrite(record_of(target), [".nii.gz"])
        own = scheme or scheme_beside(task.labels) or KITS19
        labels, scan = task.read(own)
        assert scan is not None
        if is_of_another_scan(task.labels, task.scan, scan):
            made = f"the labels were made from another scan than {task.scan.image}"
            by_record = f"the record beside them. Give that one ({before.scan})"
            source = by_record if before.scan_sha256 else "their header"
            raise UsageError(f"{task.labels}: {made}, by {source}")
        return cls(task, own, before, labels.array, scan, digest, target, there)

    def apply(self, clicks: Sequence[Click], after: Sequence[Click] = ()) -> NDArray[np.uint8]:
        """The labels after clicks, from those that follow the clicks ``after`` already if ``labels`` are replaced.

        Raises UsageError: a click outside the scan, or of a class that the labels don't have.
        """
        if odd := [click.label for click in clicks if click.label not in {"background", *self.scheme.classes}]:
            raise UsageError(f"the labels are {self.scheme}: there is no {odd[0]} among them")
        known = [*(Click(**click) for click in self.before.corrected), *after]
        points, earlier = (
            [(click.where(self.scan.geometry), _LABELS[click.label]) for click in some] for some in (clicks, known)
        )
        return apply_clicks(self.labels, self.scan.array, self.scan.geometry, points, earlier, self.background)

    def volumes_ml(self, labels: NDArray[np.uint8]) -> dict[str, float]:
        """The volume of each class."""
        ml = self.scan.geometry.voxel_ml
        names = [name for name in CLASSES if name in self.scheme.classes]
        return {name: round(int((labels == CLASSES[name]).sum()) * ml, 3) for name in names}

    def save(self, labels: NDArray[np.uint8], clicks: Sequence[Click]) -> Refinement:
        """Write the labels after clicks with their record, which holds every click, earlier ones too: both or neither.

        Returns:
            What can be saved again, after more clicks.

        Raises:
            UsageError: the target was changed since it was opened or saved last, as by another person.
        """
        assert self.task.scan is not None
        record = record_of(self.target)
        every = [*self.before.corrected, *(click.plain() for click in clicks)]
        facts = {
            "case": record.stem,
            "volumes_ml": self.volumes_ml(labels),
            "note": f"corrected by a person ({_counted(every)})",
            "scan": self.task.scan.id if self.task.scan.slices else self.task.scan.image.name,
            "models": self.before.models,
            "versions": self.before.versions,
            "learned_from": self.before.learned_from,
            "labels": self.scheme.plain(),
            "corrected": every,
            "scan_sha256": self.scan_sha256,
            "hu_sha256": hu_digest(self.scan),
        }
        with folder_lock(self.target.parent, "labels"):
            if _digests(self.target) != self.there:
                raise UsageError(f"{self.target} was changed since these labels were opened. Open it instead")
            with atomic_write(record) as new_record, atomic_write(self.target) as new_labels:
                write_labels(new_labels, labels, self.scan.native, CORRECTED_MARK, self.scheme)
                digest = file_digest(new_labels)
                CASE_RECORD.write(new_record, facts | {"labels_sha256": digest, "files": {self.target.name: digest}})
                forget(record, [self.target])
            return replace(self, there=_digests(self.target))


def _counted(clicks: Sequence[Mapping[str, Any]]) -> str:
    """How many clicks and boxes: ``1 click, 2 boxes``."""
    boxes = sum("to" in click for click in clicks)
    counts = ((len(clicks) - boxes, "click", "clicks"), (boxes, "box", "boxes"))
    return ", ".join(f"{n} {one if n == 1 else more}" for n, one, more in counts if n)


def _digests(target: Path) -> tuple[str, ...]:
    """The hashes of a label map and of its record; empty for one that is not there."""
    record = target.with_name(f"{target.name.removesuffix('.nii.gz')}.json")
    return tuple(file_digest(file) if file.is_file() else "" for file in (target, record))


def refine(
    task: LabelTask, clicks: Sequence[Click], to: Path, scheme: Scheme | None = None, probabilities: Path | None = None
) -> tuple[Path, float, tuple[str, ...]]:
    """Correct a label map with clicks and write it with its record; clicks of earlier corrections stay.

    probabilities: the folder of `kitseg infer`, whose probability of background limits how far a click reaches.

    Returns:
        The corrected label map, how many ml the clicks changed, and doubts about the scan's place in the patient.

    Raises:
        UsageError: no scan or another one than the labels', a click outside it or of a class that the labels don't
            have, or an output that is not this command's; InputError: a file can't be used.
    """
    opened = Refinement.open(task, to, scheme)
    if probabilities:
        block = read_block(probabilities, task.case)
        is_same = block.geometry.same_as(opened.scan.geometry, TOLERANCE)
        if is_same and recorded_scan_digest(probabilities, task.case) != opened.scan_sha256:
            other, _ = scan_of(probabilities, task.case)  # the same in another format, perhaps
            is_same = hu_digest(read_image(other, task.case)) == hu_digest(opened.scan)
        if not is_same:
            problem = f"its probabilities of {task.case} are of another scan"
            raise InputError(probabilities, problem, "Run `kitseg infer` on this scan")
        opened = replace(opened, background=background_of(block))
    found = opened.apply(clicks)
    changed = int((found != opened.labels).sum()) * opened.scan.geometry.voxel_ml
    return opened.save(found, clicks).target, changed, opened.scan.native.doubts


def background_of(block: Probabilities) -> NDArray[np.float16]:
    """The probability of background on the scan's grid."""
    found = np.ones(block.geometry.shape, np.float16)
    if "background" in block.channels:
        found[block.box.slices] = block.array[block.channels.index("background")]
    else:
        found[block.box.slices] = 1 - block.of_classes.array.max(axis=0)
    return found
