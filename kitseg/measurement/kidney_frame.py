"""A kidney's axes, its sinus and its polar lines, from a label map, however patient and kidney are turned.

Everything is computed on a grid of 1 mm. The kidney's outline is the convex hull of its parenchyma. The renal sinus is
what lies at least 6 mm inside the outline without being labelled: fat, vessels and the collecting system, which KiTS's
labels leave out where they can be distinguished from parenchyma.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import edt
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import ConvexHull, cKDTree

from kitseg.components import Components, bounding_box
from kitseg.labels import KIDNEY
from kitseg.measurement.body_axes import across
from kitseg.measurement.diameters import line_ends
from kitseg.types import Geometry, triple

DEEP_MM = 6.0  # inside the outline, from which on a gap belongs to the sinus
_INNER_MM = 10.0  # inside the outline, from which on every gap but a speck is part of the sinus
_SPECK_ML = 0.05  # below which a gap is a speck
SINUS_ML = 0.5  # a smaller one is not used
_OPEN_MM = 2.0  # inside the outline, up to which a gap reaches the outside
_STEP = 1.0  # mm of the grid
_THICK = 1.5  # mm, from which on slices are interpolated
_PIECE = 0.05  # of the largest piece of parenchyma; smaller ones are ignored
_LARGEST_ML = 15_000  # of a kidney's box; labels all over a scan are noise
_FEWEST = 30  # points on a grid of 3 mm in an outline, 1 ml
_DIRECTIONS = 512
_SAMPLES = 20_000  # most voxels of a tumor that are compared with the outline
_FEW = 500  # of its voxels, which limit how far away the sinus is
_ROUGH = 64  # of the directions, which rule most voxels out
_AT_ONCE = 1024  # voxels, whose heights in all directions stay in the processor's cache
_BLOCK = 4  # voxels along an axis, which are ruled out together
_ROUND = 1.15  # ratio of the two longest axes, below which the longest is not the kidney's
# A usual kidney. A sinus of this size counts as much, since labels may fill most of it.
_USUAL_ML, _USUAL_MM = 1.0, 20.0  # from the kidney's centre to the sinus's
_TURNED = np.deg2rad(30)  # from medial to anterior: where the hilum points
_POLAR, _SINUS = 0.2, 0.25  # from the centre to the polar lines and to the ends of the sinus, over the kidney's length
_STRAY = 0.005  # of a sinus's voxels, beyond the lines on either side

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class KidneyFrame:
    """A kidney on a grid of 1 mm.

    tumor, sinus: masks; affine: of the grid, RAS+; centre: of the outline's volume, in voxels; up, hilum, front: unit
    vectors in voxels, to the patient's head, and across the kidney's long axis to its sinus and to its anterior
    surface; upper, lower: the polar lines, in mm along ``up`` from the centre; sinus_lines: the ends of the sinus, the
    lower one first, in the same way; outside: the share of the tumor outside the outline; seen: whether a sinus is
    left, without which ``hilum`` and the lines are those of a usual kidney.
    """

    tumor: Mask
    sinus: Mask
    affine: Array
    centre: Array
    up: Array
    hilum: Array
    front: Array
    upper: float
    lower: float
    sinus_lines: tuple[float, float]
    outside: float
    seen: bool

    def along(self, axis: Array) -> Array:
        """The position in mm along an axis, from the centre, of each of the tumor's voxels."""
        return np.asarray(self._offsets @ axis, np.float64)

    @cached_property
    def _offsets(self) -> Array:
        """From the centre to each of the tumor's voxels (N, 3)."""
        return np.asarray(np.argwhere(self.tumor) - self.centre, np.float64)

    def at(self, points: Array) -> NDArray[np.int64]:
        """The voxel nearest to each of (..., 3) points in the patient's space."""
        moved = np.asarray(points) - self.affine[:3, 3]
        return np.rint(moved @ np.linalg.inv(self.affine[:3, :3]).T).astype(np.int64)

    def distance(self) -> float:
        """The gap in mm between tumor and sinus; infinite without a sinus."""
        return max(self._nearest[1] - _STEP, 0.0)

    def nearest(self) -> NDArray[np.int64]:
        """The tumor's voxel nearest to the sinus, or without one to the kidney's centre."""
        return self._nearest[0]

    @cached_property
    def _nearest(self) -> tuple[NDArray[np.int64], float]:
        """The tumor's voxel nearest to the sinus, and its distance; infinite without a sinus."""
        box = bounding_box(self.sinus)
        if box is None:
            near = np.argmin((self._offsets**2).sum(axis=1))
            return np.rint(self._offsets[near] + self.centre).astype(np.int64), float("inf")
        sample = self._offsets[:: -(-len(self._offsets) // _FEW)] + self.centre
        most = cKDTree(np.argwhere(self.sinus)).query(sample)[0].min()
        around = box.grown(int(np.ceil(most)) + 1).clip(triple(self.sinus.shape))
        distance = np.where(self.tumor[around.slices], edt.edt(~self.sinus[around.slices], parallel=1), np.inf)
        at = np.unravel_index(distance.argmin(), distance.shape)
        return np.add(at, around.start), float(distance[at])


def kidney_frame(labels: NDArray[np.uint8], geometry: Geometry, lesion: Mask, body: Array) -> KidneyFrame | None:
    """Find the axes of a kidney and its sinus; None for what is too small or too large to be a kidney.

    Args:
        labels: (D, H, W), only of this kidney and its lesions, cropped to them: 1 is parenchyma.
        geometry: of the labels.
        lesion: the tumor to look at (D, H, W).
        body: unit vectors (3, 3) to the patient's midline, front and head, RAS+.
    """
    if labels.size * geometry.voxel_ml > _LARGEST_ML or not (labels == KIDNEY).any():
        return None
    kidney, lesions = (_field(mask, geometry.spacing) for mask in (labels == KIDNEY, labels > KIDNEY))
    tumor, any_label = (_field(mask, geometry.spacing) > 0 for mask in (lesion, labels > 0))
    parenchyma = any_label & (kidney > lesions)
    pieces = Components.of(parenchyma)
    if not pieces.sizes.any() or not tumor.any():
        return None
    outline = _Outline.of(pieces.chosen(pieces.sizes >= _PIECE * pieces.sizes.max()))
    depth = outline.depths(~(any_label | tumor))
    solid = outline.inside(np.argwhere(np.ones([-(-n // 3) for n in tumor.shape], bool)) * 3)
    if len(solid) < _FEWEST:
        return None
    centre = solid.mean(axis=0)
    axes = geometry.affine[:3, :3] / geometry.spacing
    inward, forward, up = body @ axes
    sinus = _sinus(depth, centre, inward)
    seen = bool(sinus.sum() * _STEP**3 / 1000 >= SINUS_ML)
    sinus &= seen
    found = np.argwhere(sinus) - centre
    long = _long_axis(solid - centre, up)
    usual = np.cos(_TURNED) * inward + np.sin(_TURNED) * forward
    hilum = across(found.sum(axis=0) * _STEP**4 / 1000 + _USUAL_ML * _USUAL_MM * usual, long)
    front = np.cross(long, hilum)
    front *= np.sign(front @ forward)
    points = np.argwhere(tumor)
    outside = float(np.mean(outline.depth(points[:: -(-len(points) // _SAMPLES)]) < 0))
    levels = (solid - centre) @ up
    length, share = float(np.ptp(levels)), len(found) / (len(found) + _USUAL_ML * 1000 / _STEP**3)
    lower, upper = _lines(_open_levels(depth, sinus, centre, up), _POLAR * length, share)
    sinus_lines = _lines(found @ up, _SINUS * length, share)
    affine = np.eye(4)
    affine[:3, :3] = axes * _STEP
    affine[:3, 3] = geometry.affine[:3, 3] + axes @ ((_STEP - np.array(geometry.spacing)) / 2)
    return KidneyFrame(tumor, sinus, affine, centre, up, hilum, front, upper, lower, sinus_lines, outside, seen)


@dataclass(frozen=True)
class _Outline:
    """A convex hull by its extent in many directions, which takes a fraction of the time of its own planes."""

    directions: NDArray[np.float32]
    extents: NDArray[np.float32]

    @classmethod
    def of(cls, mask: Mask) -> _Outline:
        ends = np.concatenate([line_ends(mask, axis, 0.5) for axis in range(3)])
        corners = ends[ConvexHull(ends).vertices].astype(np.float32)
        n = np.random.default_rng(0).permutation(_DIRECTIONS)  # the first of them point everywhere too
        z, turn = 1 - (2 * n + 1) / _DIRECTIONS, n * np.pi * (3 - np.sqrt(5))
        flat = np.sqrt(1 - z**2)
        directions = np.stack([z, flat * np.cos(turn), flat * np.sin(turn)], axis=1).astype(np.float32)
        return cls(directions, (corners @ directions.T).max(axis=0))

    def depth(self, points: NDArray[Any], directions: int = _DIRECTIONS) -> NDArray[np.float32]:
        """The depth in mm below the outline of (N, 3) places in voxels; negative outside."""
        deepest = np.empty(len(points), np.float32)
        for start in range(0, len(points), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            heights = self.directions[:directions] @ points[part].T.astype(np.float32)
            deepest[part] = np.subtract(self.extents[:directions, None], heights, out=heights).min(axis=0)
        return deepest

    def inside(self, points: NDArray[np.int64]) -> NDArray[np.int64]:
        """The (N, 3) voxels within the outline."""
        rough = points[self.depth(points, _ROUGH) > 0]
        return rough[self.depth(rough) > 0]

    def depths(self, mask: Mask) -> NDArray[np.float32]:
        """The depth of a mask's voxels, −1 elsewhere and outside the outline."""
        points = np.argwhere(mask & self._near(mask.shape))
        points = points[self.depth(points, _ROUGH) >= 0]
        depth = np.full(mask.shape, -1.0, np.float32)
        depth[tuple(points.T)] = np.maximum(self.depth(points), -1)
        return depth

    def _near(self, shape: tuple[int, ...]) -> Mask:
        """The blocks of voxels that reach into the outline."""
        blocks = [-(-n // _BLOCK) for n in shape]
        middles = np.indices(blocks).reshape(3, -1).T * _BLOCK + (_BLOCK - 1) / 2
        near = (self.depth(middles) >= -_BLOCK).reshape(blocks)  # more than half a block's diagonal
        for axis in range(3):
            near = near.repeat(_BLOCK, axis)
        return near[tuple(slice(n) for n in shape)]


def _field(mask: Mask, spacing: tuple[float, float, float]) -> NDArray[np.float32]:
    """A field on the grid of 1 mm, positive in a mask: 1 at the nearest voxel, with thick slices the signed distance.

    Of two masks with a common surface, what lies between two slices belongs to the one with the larger field.
    """
    counts = [max(int(n * mm / _STEP), 1) for n, mm in zip(mask.shape, spacing, strict=True)]
    places = [(np.arange(n) + 0.5) * _STEP / mm - 0.5 for n, mm in zip(counts, spacing, strict=True)]
    thick = [mm > _THICK for mm in spacing]
    for axis, at in enumerate(places):
        if not thick[axis]:
            mask = mask.take(np.clip(np.rint(at).astype(int), 0, mask.shape[axis] - 1), axis)
    if not any(thick):
        return np.ascontiguousarray(mask, np.float32)
    steps = tuple(mm if slow else _STEP for mm, slow in zip(spacing, thick, strict=True))
    field: NDArray[np.float32] = edt.sdf(np.pad(mask, 1), anisotropy=steps, parallel=1)
    for axis, at in enumerate(places):
        inner = at + 1 if thick[axis] else np.arange(mask.shape[axis]) + 1
        field = _between(field, np.asarray(inner, np.float64), axis)
    return field


def _between(field: NDArray[np.float32], places: Array, axis: int) -> NDArray[np.float32]:
    """A field at places between its voxels along an axis, linearly interpolated."""
    below = np.floor(places).astype(int)
    share = (places - below).astype(np.float32).reshape([-1 if n == axis else 1 for n in range(3)])
    between: NDArray[np.float32] = field.take(below, axis) * (1 - share)
    if share.any():
        between += field.take(below + 1, axis) * share
    return between


def _lines(levels: Array, usual: float, share: float) -> tuple[float, float]:
    """The mean, by weight, of where levels begin and end but for stray ones, and of a usual kidney's lines."""
    ends = np.quantile(levels, (_STRAY, 1 - _STRAY)) if levels.size else np.zeros(2)
    low, high = share * ends + (1 - share) * np.array([-usual, usual])
    return float(low), float(high)


def _long_axis(offsets: Array, up: Array) -> Array:
    """The longest principal axis of a solid, towards the head; ``up`` where it is too round to have one."""
    spread, axes = np.linalg.eigh(np.cov(offsets.T))
    if spread[2] < _ROUND**2 * spread[1]:
        return up
    return np.asarray(axes[:, 2] * np.sign(axes[:, 2] @ up), np.float64)


def _sinus(depth: NDArray[np.float32], centre: Array, inward: Array) -> Mask:
    """The largest gap deep inside the outline, medial where there is one there, and gaps further in but for specks.

    A lateral gap belongs to it only if it is closed: others are notches of the outer surface, such as beneath a tumor.
    """
    found = Components.of(depth >= DEEP_MM)
    if not found.sizes.any():
        return np.zeros(depth.shape, bool)
    points = np.argwhere(found.numbers)
    numbers = found.numbers[tuple(points.T)]
    sums = np.bincount(numbers, (points + found.box.start - centre) @ inward, found.sizes.size)
    sizes = np.where(sums > 0, found.sizes, 0)
    deepest, shallowest = np.zeros(found.sizes.size), np.full(found.sizes.size, np.inf)
    values = depth[found.box.slices][tuple(points.T)]
    np.maximum.at(deepest, numbers, values)
    np.minimum.at(shallowest, numbers, values)
    largest = np.arange(found.sizes.size) == int(np.argmax(sizes if sizes.any() else found.sizes))
    inner = (deepest >= _INNER_MM) & (found.sizes * _STEP**3 / 1000 >= _SPECK_ML)
    closed = shallowest >= DEEP_MM + _STEP
    return found.chosen(largest | (inner & (closed | (sums > 0))))


def _open_levels(depth: NDArray[np.float32], sinus: Mask, centre: Array, up: Array) -> Array:
    """The levels of the sinus's voxels where it reaches the outside, in mm along ``up`` from the centre.

    There the medial lip of parenchyma is interrupted, which defines the polar lines (Kutikov and Uzzo 2009). Levels are
    planes across ``up``; without an open one, those of all of the sinus.
    """
    side = across(np.eye(3)[int(np.argmin(np.abs(up)))], up)
    frame = np.stack([up, side, np.cross(up, side)])
    points = np.argwhere(depth >= 0)
    turned = np.rint((points - centre) @ frame.T / _STEP).astype(int)
    places = turned - turned.min(axis=0, initial=0)
    gap = np.zeros(places.max(axis=0, initial=0) + 1, bool)
    gap[tuple(places.T)] = True
    gap = ndimage.binary_closing(gap, np.ones((1, 3, 3)))
    parts, _ = ndimage.label(gap, np.array([[[0] * 3] * 3, [[1] * 3] * 3, [[0] * 3] * 3]))
    number, inner = parts[tuple(places.T)], sinus[tuple(points.T)]
    opened = inner & np.isin(number, number[depth[tuple(points.T)] < _OPEN_MM])
    return np.asarray(turned[opened if opened.any() else inner, 0] * _STEP, np.float64)
