"""Sort slices by position into stacks on a regular grid, or refuse them with a reason."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kitseg.types import Geometry
from kitseg.volumes.dicom.headers import PASSES, TIMES, Header, differing_values, read_dataset
from kitseg.volumes.header import MAX_SPACING, MIN_SPACING

FEWEST = 3  # slices
MOST_GROUPS = 100  # of one series; a hostile one has as many as files, each compared with all
SAME_PLACE = 0.01  # mm
UNEVEN = 0.1  # of the spacing, tolerated deviation of a slice's position
ROUNDED = 0.1  # mm, always tolerated, because many files round positions to it
WIDEST_GAP = 10.0  # mm between two slices with a missing slice between them
MOST_MISSING = 0.05  # of the slices
DRIFT = 0.5  # pixels, tolerated lateral shift over the stack
SAME_AXES = 2e-3  # half a pixel at the edge of 512
SAME_SPACING = 1e-3  # mm


@dataclass(frozen=True)
class Stack:
    """Slices sorted by position on a regular grid.

    slots: each slice's index on the grid, which has further slots for missing slices; native: that grid with axes
    (columns, rows, slices), in RAS+.
    """

    headers: tuple[Header, ...]
    slots: tuple[int, ...]
    native: Geometry

    @property
    def missing(self) -> tuple[int, ...]:
        """The slots without a slice; each has slices on both sides."""
        return tuple(sorted(set(range(self.native.shape[2])) - set(self.slots)))


class Unstackable(Exception):
    """Slices that form no volume; the message states the reason."""


def split_stacks(headers: Sequence[Header]) -> list[list[Header]]:
    """Group slices by orientation, size and pixel spacing, the largest group first; scouts are separate.

    A group with several slices at one position is split further by any attribute that distinguishes them. Groups of one
    size are in the order of their passes, whatever the files' names. What is left after ``MOST_GROUPS`` is one group,
    which forms no volume.
    """
    groups, others = list[list[Header]](), list[Header]()
    for header in headers:
        like = next((group for group in groups if _same_frame(group[0], header)), None)
        if like is None and len(groups) < MOST_GROUPS:
            groups.append(like := [])
        (others if like is None else like).append(header)
    parts = [*(part for group in groups for part in _by_pass(group)), *([others] if others else [])]
    return sorted(parts, key=lambda part: (-len(part), min((h.passes, h.instance, h.position) for h in part)))


def stack(headers: Sequence[Header]) -> Stack:
    """Sort slices by position along their normal.

    Raises:
        Unstackable: they form no regular grid; the message contains no file name.
    """
    first = headers[0]
    if first.broken:
        raise Unstackable("its header can't be read")
    if first.frames > 1:
        raise Unstackable("it is an enhanced multi-frame CT, several slices in one file")
    if not first.position or not first.row_axis or not first.spacing:
        raise Unstackable("its slices have no position in the patient")
    if not all(MIN_SPACING <= mm <= MAX_SPACING for mm in first.spacing):
        raise Unstackable(f"its pixels are not {MIN_SPACING:g} to {MAX_SPACING:g} mm wide")
    if not all(_same_frame(first, header, 2) for header in headers):  # each is like the first that was read
        raise Unstackable("its slices differ in orientation, size or pixels")
    if len(headers) < FEWEST:
        raise Unstackable(f"it has {len(headers)} slices, fewer than the {FEWEST} of a volume")
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
    """The plane of a slice: axial, coronal, sagittal, oblique (over 30° off the axis), or unknown."""
    if not header.row_axis:
        return "unknown"
    normal = np.abs(np.cross(header.row_axis, header.column_axis))
    axis = int(normal.argmax())
    return ("sagittal", "coronal", "axial")[axis] if normal[axis] > np.cos(np.deg2rad(30)) else "oblique"


def is_scout(header: Header) -> bool:
    """Whether the slice is a scout (overview image)."""
    return bool({"LOCALIZER", "SCOUT", "TOPOGRAM"} & set(header.image_type))


def _slots(along: NDArray[np.float64]) -> tuple[NDArray[np.int64], float]:
    """Each slice's index on a regular grid, and the grid's spacing in mm."""
    gaps = np.diff(along)
    if same := int((gaps < SAME_PLACE).sum()):
        raise Unstackable(f"{same} of its slices have the same position as another (several passes in one series?)")
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
    """Accept a few missing slices, but not two in a row, not over a wide gap, and not many."""
    wide, missing = int(steps.argmax()), int((steps - 1).sum())
    bridged = steps[wide] <= 2 and gaps[wide] <= WIDEST_GAP + SAME_PLACE and missing <= max(1, MOST_MISSING * len(gaps))
    if missing and not bridged:
        words = "1 slice is missing" if missing == 1 else f"{missing} slices are missing"
        where = f"the gap after slice {wide + 1} of {len(gaps) + 1} is {gaps[wide]:.4g} mm"
        raise Unstackable(f"{words}: {where}, the spacing elsewhere {spacing:.4g} mm")


def _check_upright(headers: tuple[Header, ...], normal: NDArray[np.float64]) -> None:
    """Check that the slices are not shifted laterally, as by a tilted gantry."""
    places = np.array([h.position for h in headers])
    shifts = places - places[0]
    lateral = np.linalg.norm(shifts - np.outer(shifts @ normal, normal), axis=1)
    if lateral.max() > DRIFT * min(headers[0].spacing):
        worst = int(lateral.argmax())
        degrees = np.rad2deg(np.arctan2(lateral[worst], shifts[worst] @ normal))
        raise Unstackable(
            f"its slices are shifted against each other by {lateral[worst]:.3g} mm (a gantry tilt of {degrees:.2g}°?)"
        )


def _same_frame(one: Header, other: Header, times: float = 1) -> bool:
    """Whether orientation, size and pixel spacing agree, within ``times`` the tolerance."""
    if one.size != other.size or is_scout(one) != is_scout(other) or bool(one.position) != bool(other.position):
        return False
    mine, its = ((*h.row_axis, *h.column_axis, *h.spacing) for h in (one, other))
    tolerance = [SAME_AXES] * (len(mine) - len(one.spacing)) + [SAME_SPACING] * len(one.spacing)
    return len(mine) == len(its) and bool((np.abs(np.subtract(mine, its)) <= np.multiply(times, tolerance)).all())


def _by_pass(group: list[Header]) -> list[list[Header]]:
    """Parts with one slice at each position, if an attribute distinguishes the passes; else the group unchanged.

    Where none of ``PASSES`` does, and the slices aren't copies, any other element that has as many values as there are
    passes may. Passes that have no position in common may have slices between each other's.
    """
    most = max(_places(group).values())
    if not group[0].position:
        return [group]
    for n, name in enumerate(PASSES):
        values = [header.passes[n] for header in group]
        if name in TIMES:
            values = _by_gaps(values, most)
        if (parts := _split(group, values)) and (most > 1 or _interleave(parts)):
            return parts
    if not repeats(without_copies(group)):
        return [group]
    found = (parts for values in differing_values(group) if len(parts := _split(group, values)) == most)
    return next(found, [group])


def _split(group: list[Header], values: list[str]) -> list[list[Header]]:
    """Parts of the same value, if each is one slice at each position and enough for a volume; else none."""
    by_value: dict[str, list[Header]] = {}
    for header, value in zip(group, values, strict=True):
        by_value.setdefault(value, []).append(header)
    parts = list(by_value.values())
    return parts if len(parts) > 1 and min(map(len, parts)) >= FEWEST and not any(map(repeats, parts)) else []


def _interleave(parts: list[list[Header]]) -> bool:
    """Whether slices of some parts lie between those of others, again and again, and each part is a volume."""
    first = parts[0][0]
    if not first.row_axis:
        return False
    normal = np.cross(first.row_axis, first.column_axis)
    places = sorted((float(normal @ header.position), n) for n, part in enumerate(parts) for header in part)
    changes = sum(one != other for (_, one), (_, other) in pairwise(places))
    return changes >= 2 * len(parts) and all(map(_is_volume, parts))


def _is_volume(part: list[Header]) -> bool:
    with suppress(Unstackable):
        return bool(stack(part))
    return False


def _by_gaps(texts: list[str], count: int) -> list[str]:
    """The names of ``count`` parts between the longest pauses of DICOM times; one part if a time is unknown."""
    seconds = [_seconds(text) for text in texts]
    if not np.isfinite(seconds).all():
        return [""] * len(texts)
    pauses = sorted(((later - at, later) for at, later in pairwise(sorted(seconds))), reverse=True)[: count - 1]
    return [str(sum(at >= later for _, later in pauses)) for at in seconds]


def _seconds(text: str) -> float:
    """A DICOM time, HHMMSS with or without a date before it, as a number that grows by seconds within a day."""
    found = re.match(r"(\d{8})?(\d\d)(\d\d)(\d\d(?:\.\d+)?)", text)
    if not found:
        return float("nan")
    return 86400 * int(found[1] or 0) + 3600 * int(found[2]) + 60 * int(found[3]) + float(found[4])


def repeats(headers: Sequence[Header]) -> bool:
    """Whether two slices are at the same position."""
    return max(_places(headers).values()) > 1


def _places(headers: Sequence[Header]) -> Counter[tuple[float, ...]]:
    return Counter(tuple(np.round(h.position, 2)) for h in headers)


def without_copies(headers: Sequence[Header]) -> list[Header]:
    """Slices without those that equal another one of the same position pixel by pixel."""
    places, found = Counter(header.position for header in headers), dict[tuple[Any, ...], Header]()
    for header in headers:
        content: object = header.path
        with suppress(Exception), warnings.catch_warnings(action="ignore"):  # read_series reports what can't be read
            if places[header.position] > 1:
                content = hashlib.sha256(read_dataset(header.path, stop_before_pixels=False).PixelData).digest()
        found.setdefault((header.position, content), header)
    return list(found.values())
