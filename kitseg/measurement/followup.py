"""Follow-up: the same lesions in two label maps of a patient, and how much they changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from kitseg.components import bounding_box
from kitseg.labels import BACKGROUND, CLASSES
from kitseg.measurement.alignment import Alignment, Surface, align, kidney_surfaces
from kitseg.measurement.findings import Findings, Lesion
from kitseg.measurement.sides import find_midline
from kitseg.types import Box, Geometry, Triple, ball_diameter

DAYS_A_YEAR = 365.25
NOT_SCANNED, NO_KIDNEY = "not scanned", "no kidney"
MERGED, SPLIT = "merged", "split off"
_REACH_MM = 5.0  # beyond the radius of the larger lesion, within which the other's centre must lie
_OTHER_KIND = 0.5  # of the closeness of a lesion of the same kind
#: The least change of volume: a layer on the ball's surface, relative to the voxels' mean size, that more than 95 % of
#: the pairs without growth don't exceed (docs/explanation/followup.md).
_LEAST_LAYER = 0.1


@dataclass(frozen=True)
class Visit:
    """A label map (D, H, W) of a date, with its findings, and the CT on its grid where there is one."""

    labels: NDArray[np.uint8]
    geometry: Geometry
    findings: Findings
    hu: NDArray[Any] | None = None

    def place(self, lesion: Lesion) -> NDArray[np.float64]:
        """A lesion's centre in mm (RAS+)."""
        return np.asarray(self.geometry.affine[:3, :3] @ lesion.centre + self.geometry.affine[:3, 3], np.float64)

    def holds(self, voxel: Triple, kind: str) -> bool:
        """Whether a voxel of the grid lies in a lesion of this kind."""
        there = any(lesion.kind == kind and lesion.box.holds(voxel) for lesion in self.findings.lesions)
        return there and bool(self.labels[voxel] == CLASSES[kind])

    def surfaces(self) -> dict[str, Surface]:
        """The kidneys by side."""
        box = bounding_box(self.labels != BACKGROUND)
        if box is None:
            return {}
        return kidney_surfaces(self.labels, self.geometry, find_midline(self.geometry, box, self.hu))


@dataclass(frozen=True)
class Change:
    """A lesion at both dates, or at one of them if it is new or vanished; growth is positive.

    volume_ml: change of the volume; mean_mm, diameter_mm, axial_mm: of the diameter of a ball of that volume, of the
    largest diameter in 3D, and of that within a slice, which depends on how the patient lies; least_ml, least_mm: the
    least changes of volume and ball that exceed the effect of the grids; offset_mm: from the centre at the first date,
    aligned, to that at the second. None for a lesion with one date. unseen: why it can be neither new nor vanished:
    ``not scanned`` where the other scan ends before its place, ``no kidney`` where the other date shows none around it,
    ``merged`` or ``split off`` where its place lies in another lesion of its kind at the second or first date.
    """

    before: Lesion | None
    after: Lesion | None
    volume_ml: float | None = None
    mean_mm: float | None = None
    diameter_mm: float | None = None
    axial_mm: float | None = None
    least_ml: float | None = None
    least_mm: float | None = None
    offset_mm: float | None = None
    unseen: str = ""

    @property
    def both(self) -> Iterator[Lesion]:
        """The lesion at the dates that it is found at."""
        return (lesion for lesion in (self.before, self.after) if lesion)

    @property
    def verdict(self) -> str:
        """``new``, ``vanished``, ``larger``, ``smaller``, ``unchanged`` (within the least volume), or unseen."""
        if self.unseen:
            return self.unseen
        if self.before is None or self.volume_ml is None or self.least_ml is None:
            return "new" if self.before is None else "vanished"
        if abs(self.volume_ml) <= self.least_ml:
            return "unchanged"
        return "larger" if self.volume_ml > 0 else "smaller"

    @property
    def share(self) -> float | None:
        """The change of the volume, relative to the first date."""
        return None if self.before is None or self.volume_ml is None else self.volume_ml / self.before.volume_ml

    def doubling_days(self, days: float | None) -> float | None:
        """The volume's doubling time in days, from the days between the dates; None unless it is larger."""
        if not days or self.verdict != "larger" or self.before is None or self.after is None:
            return None
        return float(days * np.log(2) / np.log(self.after.volume_ml / self.before.volume_ml))


@dataclass(frozen=True)
class Followup:
    """The lesions of both dates (those of the first date in their order, then new ones), and the kidneys' alignments.

    alignments: by side; a lesion of a kidney without one can't be found again.
    """

    changes: tuple[Change, ...]
    alignments: Mapping[str, Alignment]

    @property
    def joined(self) -> bool:
        """Whether lesions that are apart at one date are one lesion at the other."""
        return any(change.unseen in (MERGED, SPLIT) for change in self.changes)

    @property
    def not_aligned(self) -> list[str]:
        """The kidneys with lesions that could not be looked for at the other date."""
        sides = dict.fromkeys(lesion.side for change in self.changes for lesion in change.both)
        return [side for side in sides if side not in self.alignments]


def followup(before: Visit, after: Visit) -> Followup:
    """Find the lesions of the first date again at the second one.

    Each kidney's surface is aligned rigidly (``alignment.align``). A lesion may be another one's if its aligned centre
    lies within the larger lesion's radius (of a ball of its volume) and 5 mm of the other's centre; the closest pairs
    are chosen together, pairs of one kind first. A lesion whose aligned centre lies outside the other scan is not
    scanned there, in a lesion that is another one's merged with that or split off it; one of a kidney that the other
    date doesn't show is not looked for.
    """
    here, there = before.surfaces(), after.surfaces()
    alignments = {side: align(here[side], there[side]) for side in here if side in there}
    old, new = before.findings.lesions, after.findings.lesions
    offsets = _offsets(before, after, alignments)
    pairs = match(offsets, old, new, _REACH_MM)
    known = set(pairs.values())

    def unseen(lesion: Lesion, visit: Visit, other: Visit) -> str:
        align, place = alignments.get(lesion.side), visit.place(lesion)[None]
        if align is None:
            return NO_KIDNEY
        voxel = other.geometry.voxel((align(place) if visit is before else align.back(place))[0])
        if not Box((0, 0, 0), other.geometry.shape).holds(voxel):
            return NOT_SCANNED
        return (MERGED if visit is before else SPLIT) if other.holds(voxel, lesion.kind) else ""

    changes = [
        _change(lesion, new[pairs[n]], before, after, float(offsets[n][pairs[n]]))
        if n in pairs
        else Change(lesion, None, unseen=unseen(lesion, before, after))
        for n, lesion in enumerate(old)
    ]
    gained = [lesion for n, lesion in enumerate(new) if n not in known]
    changes += [Change(None, lesion, unseen=unseen(lesion, after, before)) for lesion in gained]
    return Followup(tuple(changes), alignments)


def _offsets(before: Visit, after: Visit, alignments: Mapping[str, Alignment]) -> NDArray[np.float64]:
    """The distances of the lesions' aligned centres (first, second), infinite between kidneys."""
    old, new = before.findings.lesions, after.findings.lesions
    offsets = np.full((len(old), len(new)), np.inf)
    for side, alignment in alignments.items():
        rows, columns = (np.flatnonzero([lesion.side == side for lesion in part]) for part in (old, new))
        if rows.size and columns.size:
            here = alignment(np.array([before.place(old[n]) for n in rows]))
            offsets[np.ix_(rows, columns)] = cdist(here, [after.place(new[n]) for n in columns])
    return offsets


def match(offsets: NDArray[np.float64], old: Sequence[Lesion], new: Sequence[Lesion], more_mm: float) -> dict[int, int]:
    """Which lesion of a second label map each one of a first is, by index, for those that are in both.

    Args:
        offsets: (first, second) distances of their centres in mm.
        old: lesions of the first.
        new: lesions of the second.
        more_mm: beyond the larger one's radius, within which the other's centre must lie.
    """
    if not offsets.size:
        return {}
    here, there = (np.array([_radius(lesion) for lesion in side]) for side in (old, new))
    kinds, others = (np.array([lesion.kind for lesion in side]) for side in (old, new))
    reach = np.maximum(here[:, None], there[None]) + more_mm
    same = np.where(kinds[:, None] == others[None], 1.0, _OTHER_KIND)
    closeness = np.where(offsets <= reach, (1 + 1e-6 - offsets / reach) * same, 0)
    rows, columns = linear_sum_assignment(closeness, maximize=True)
    return {int(n): int(m) for n, m in zip(rows, columns, strict=True) if closeness[n, m] > 0}


def _change(one: Lesion, other: Lesion, before: Visit, after: Visit, offset: float) -> Change:
    voxels = [float(np.mean(visit.geometry.spacing)) for visit in (before, after)]
    layer = _LEAST_LAYER * float(np.sqrt(np.mean(np.square(voxels))))
    radius = max(_radius(one), _radius(other))
    return Change(
        one,
        other,
        other.volume_ml - one.volume_ml,
        2 * (_radius(other) - _radius(one)),
        other.diameter_mm - one.diameter_mm,
        other.axial_mm - one.axial_mm,
        layer * 4 * np.pi * radius**2 / 1000,
        2 * layer,
        offset,
    )


def _radius(lesion: Lesion) -> float:
    """The radius in mm of a ball of the lesion's volume."""
    return ball_diameter(lesion.volume_ml) / 2
