"""How slices lie in the patient: sorted by position into stacks on a regular lattice, or refused in words. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kitseg.types import Geometry
from kitseg.volumes.dicom.headers import Header
from kitseg.volumes.header import MAX_SPACING, MIN_SPACING

FEWEST = 3  # slices
SAME_PLACE = 0.01  # mm
UNEVEN = 0.1  # of the spacing, that a slice may lie beside its place
ROUNDED = 0.1  # mm, that it may always do: many files round their positions to that
WIDEST_GAP = 10.0  # mm, between two slices with one missing between them
MOST_MISSING = 0.05  # of the slices
DRIFT = 0.5  # pixels, that the stack may lean to a side
SAME_AXES = 1e-3


@dataclass(frozen=True)
class Stack:
    """Slices in order of position on a regular lattice.

    slots: each slice's place on the lattice, which has more where slices are missing; native: that lattice with axes
    (columns, rows, slices), in RAS+.
    """

    headers: tuple[Header, ...]
    slots: tuple[int, ...]
    native: Geometry

    @property
    def missing(self) -> tuple[int, ...]:
        """The places on the lattice without a slice; each has a slice on both sides."""
        return tuple(sorted(set(range(self.native.shape[2])) - set(self.slots)))


class Unstackable(Exception):
    """Slices that make no volume; says why."""


def split_stacks(headers: Sequence[Header]) -> list[list[Header]]:
    """A series' slices in groups of one orientation, size and pixel spacing, the largest first; scouts go apart.

    A group with several slices at one place is split on by acquisition, time, or image type where that parts them.
    """
    groups: list[list[Header]] = []
    for header in headers:
        like = next((group for group in groups if _same_frame(group[0], header)), None)
        if like is None:
            groups.append(like := [])
        like.append(header)
    parts = [part for group in groups for part in _by_pass(group)]
    return sorted(parts, key=len, reverse=True)  # a stable sort


def stack(headers: Sequence[Header]) -> Stack:
    """The slices in order of position along their normal.

    Raises:
        Unstackable: they make no regular lattice; the words name no file.
    """
    first = headers[0]
    if first.frames > 1:
        raise Unstackable("it is an enhanced multi-frame CT, several slices in one file")
    if not first.position or not first.row_axis or not first.spacing:
        raise Unstackable("its slices don't say where they lie in the patient")
    if not all(MIN_SPACING <= mm <= MAX_SPACING for mm in first.spacing):
        raise Unstackable(f"its pixels are not {MIN_SPACING:g} to {MAX_SPACING:g} mm wide")
    if len(headers) < FEWEST:
        raise Unstackable(f"it has {len(headers)} of the at least {FEWEST} slices that make a volume")
    row, column = np.array(first.row_axis), np.array(first.column_axis)
    if np.abs([row @ column, row @ row - 1, column @ column - 1]).max() > SAME_AXES:
        raise Unstackable("its rows and columns are not at right angles")
    normal = np.cross(row, column)
    along = np.array([normal @ h.position for h in headers])
    order = np.argsort(along, kind="stable")
    slots, spacing = _slots(along[order])
    ordered = tuple(headers[i] for i in order)
    _check_upright(ordered, normal)
    axes = np.stack([row * first.spacing[1], column * first.spacing[0], normal * spacing], axis=1)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes, ordered[0].position
    shape = (first.size[1], first.size[0], int(slots[-1]) + 1)
    return Stack(ordered, tuple(map(int, slots)), Geometry(shape, np.diag([-1.0, -1, 1, 1]) @ affine))


def orientation(header: Header) -> str:
    """How a slice cuts the patient: axial, coronal, sagittal, oblique (over 30° off the axis), or unknown."""
    if not header.row_axis:
        return "unknown"
    normal = np.abs(np.cross(header.row_axis, header.column_axis))
    axis = int(normal.argmax())
    return ("sagittal", "coronal", "axial")[axis] if normal[axis] > np.cos(np.deg2rad(30)) else "oblique"


def is_scout(header: Header) -> bool:
    """Whether it is an overview that the scan was planned on."""
    return bool({"LOCALIZER", "SCOUT", "TOPOGRAM"} & set(header.image_type))


def _slots(along: NDArray[np.float64]) -> tuple[NDArray[np.int64], float]:
    """Each slice's place on a regular lattice, and the lattice's spacing in mm."""
    gaps = np.diff(along)
    if same := int((gaps < SAME_PLACE).sum()):
        raise Unstackable(f"{same} of its slices lie at the same place as another (several passes in one series?)")
    usual = float(np.median(gaps))
    steps = np.rint(gaps / usual).astype(np.int64)
    slots = np.concatenate([[0], np.cumsum(steps)])
    spacing = float((along[-1] - along[0]) / max(slots[-1], 1))
    off = np.abs(along - along[0] - slots * spacing).max()
    if steps.min() < 1 or off > max(UNEVEN * spacing, ROUNDED):
        raise Unstackable(f"its slices are not evenly spaced: {gaps.min():.4g} to {gaps.max():.4g} mm apart")
    _check_gaps(steps, gaps, spacing)
    return slots, spacing


def _check_gaps(steps: NDArray[np.int64], gaps: NDArray[np.float64], spacing: float) -> None:
    """A slice may be missing here and there; not two in a row, not over a wide gap, and not many."""
    wide, missing = int(steps.argmax()), int((steps - 1).sum())
    bridged = steps[wide] <= 2 and gaps[wide] <= WIDEST_GAP + SAME_PLACE and missing <= max(1, MOST_MISSING * len(gaps))
    if missing and not bridged:
        words = "1 slice is missing" if missing == 1 else f"{missing} slices are missing"
        where = f"after slice {wide + 1} of {len(gaps) + 1} the next one comes {gaps[wide]:.4g} mm on"
        raise Unstackable(f"{words}: {where}, elsewhere {spacing:.4g} mm")


def _check_upright(headers: tuple[Header, ...], normal: NDArray[np.float64]) -> None:
    """Each slice lies straight behind the one before, not shifted sideways as a tilted gantry does it."""
    places = np.array([h.position for h in headers])
    shifts = places - places[0]
    aside = np.linalg.norm(shifts - np.outer(shifts @ normal, normal), axis=1)
    if aside.max() > DRIFT * min(headers[0].spacing):
        worst = int(aside.argmax())
        degrees = np.rad2deg(np.arctan2(aside[worst], shifts[worst] @ normal))
        raise Unstackable(
            f"its slices are shifted against each other by {aside[worst]:.3g} mm (a gantry tilt of {degrees:.2g}°?)"
        )


def _same_frame(one: Header, other: Header) -> bool:
    if one.size != other.size or is_scout(one) != is_scout(other) or bool(one.position) != bool(other.position):
        return False
    mine, its = ((*h.row_axis, *h.column_axis, *h.spacing) for h in (one, other))
    return len(mine) == len(its) and bool(np.allclose(mine, its, rtol=0, atol=SAME_AXES))


def _by_pass(group: list[Header]) -> list[list[Header]]:
    """Parts with one slice at each place, if the headers tell the passes apart; else the group as it is."""
    if not group[0].position or not _repeats(group):
        return [group]
    keys: tuple[Callable[[Header], object], ...] = (
        lambda h: h.acquisition,
        lambda h: h.time,
        lambda h: h.image_type,
    )
    for key in keys:
        parts = [[h for h in group if key(h) == value] for value in dict.fromkeys(map(key, group))]
        if len(parts) > 1 and not any(map(_repeats, parts)):
            return parts
    return [group]


def _repeats(headers: Iterable[Header]) -> bool:
    places = [tuple(np.round(h.position, 2)) for h in headers]
    return len(set(places)) < len(places)
