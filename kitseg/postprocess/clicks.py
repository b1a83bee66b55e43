"""Correct a label map where a person clicks: a random walk decides between the clicked class and what was there.

A voxel's prior comes from its distance to the click, from its HU (the click's tissue or the kidney's) and from the
model's probability of background; the random walk smooths it along HU (`random_walk`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import edt
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from kitseg.components import Components, bounding_box, component_at
from kitseg.labels import BACKGROUND, CYST, KIDNEY, TUMOR
from kitseg.postprocess.random_walk import random_walk, resized
from kitseg.types import Box, Geometry, Triple, triple

Click = tuple[Triple, int]  # a voxel (slice, row, column) and its label

LESIONS = (TUMOR, CYST)
REACH_MM = (4.0, 75.0)  # the radius that a click may stand for
FINE, ROUGH = 300_000, 150_000  # voxels of the grids that are solved
MARGIN_MM = 8.0
SMOOTH_MM = (0.6, 1.5)  # of the HU that are compared: for edges, for faint differences
HU_SPREAD = ((10.0, 20.0), (6.0, 20.0))  # least and most in a lesion, at each smoothing
KIDNEY_HU = (150.0, 40.0)  # mean and deviation where there is no kidney to compare with
BINS = np.linspace(-200, 400, 121)
FAT_HU = -30.0
STEEP = 15.0  # HU per mm: the surface of a kidney in fat, where HU pass through those of a tumor
UNKNOWN = 2.0  # log odds of not being background where no model states its probability
EVEN, DISTANCE, LIKE, FAT = 1.5, 4.0, (0.8, 0.6), 4.0  # the prior's terms, as log odds
KNOWN = 6.0  # log odds of what is there, far from a click
NEAR, FAR = 1.0, 3.5  # times its reach: up to there a click decides, from there on it changes nothing
REST = 0.4  # of what a click removes: smaller rests of that lesion are removed too


@dataclass(frozen=True)
class _Crop:
    """A box of the scan on a grid of its own. now: where the class is; odds: log odds of not being background."""

    box: Box
    spacing: tuple[float, ...]
    hu: tuple[NDArray[np.float32], ...]
    now: NDArray[np.bool_]
    odds: NDArray[np.float32]

    def at(self, voxel: Triple) -> Triple:
        """The voxel of this grid that holds one of the scan."""
        inside = (np.subtract(voxel, self.box.start) + 0.5) * self.now.shape / self.box.size
        return triple(np.clip(inside.astype(int), 0, np.subtract(self.now.shape, 1)))

    def holds(self, voxel: Triple) -> bool:
        """Whether a voxel of the scan lies in the box."""
        return all(a <= v < b for a, v, b in zip(self.box.start, voxel, self.box.stop, strict=True))

    def distance(self, voxel: Triple) -> NDArray[np.float32]:
        """The distance of each voxel from one of the scan, mm."""
        grid = np.ogrid[tuple(slice(-a, n - a) for a, n in zip(self.at(voxel), self.now.shape, strict=True))]
        return np.asarray(
            np.sqrt(sum((axis * mm) ** 2 for axis, mm in zip(grid, self.spacing, strict=True))), np.float32
        )

    def widened(self, mask: NDArray[np.bool_]) -> Box:
        """The box of a mask on this grid with a margin, on the scan's grid."""
        step = np.divide(self.box.size, self.now.shape)
        inside = (bounding_box(mask) or self.box).grown(round(MARGIN_MM / min(self.spacing)))
        low, high = (np.multiply(end, step) + self.box.start for end in (inside.start, inside.stop))
        return Box(triple(np.floor(low)), triple(np.ceil(high)))


@dataclass
class _Scan:
    """The labels, which one click changes in place, with what decides how."""

    labels: NDArray[np.uint8]
    hu: NDArray[Any]
    geometry: Geometry
    background: NDArray[Any] | None

    def around(self, voxel: Triple, mm: float) -> Box:
        sides = [int(np.ceil(mm / step)) for step in self.geometry.spacing]
        return Box(triple(np.subtract(voxel, sides)), triple(np.add(voxel, sides) + 1)).clip(self.labels.shape)

    def crop(self, box: Box, of: int, most: int) -> _Crop:
        """A box on a grid of about cubes, about ``most`` of them at most, none smaller than the scan's voxels."""
        size, side = np.multiply(box.size, self.geometry.spacing), 0.0
        for _ in range(4):  # axes that keep the scan's step leave more voxels to the others
            steps = np.maximum(side, self.geometry.spacing)
            shape = triple(np.clip(np.rint(size / steps), 1, box.size))
            if np.prod(shape) <= most:
                break
            side = float(steps.min() * (np.prod(shape) / most) ** (1 / 3) * 1.02)
        inside, spacing = self.labels[box.slices], size / shape
        clipped = np.clip(self.hu[box.slices], -400, 500).astype(np.float32)
        rough = resized(_blocks(clipped, np.maximum(1, np.divide(box.size, shape).astype(int))), shape)
        levels = tuple(ndimage.gaussian_filter(rough, mm / spacing) for mm in SMOOTH_MM)
        if self.background is None:
            odds = UNKNOWN + resized(inside != BACKGROUND, shape)
        else:
            doubt = np.clip(resized(self.background[box.slices], shape), 0, 1)
            odds = np.log((1.02 - doubt) / (0.02 + doubt))
        return _Crop(box, tuple(spacing), levels, resized(inside == of, shape) > 0.5, odds)

    @cached_property
    def kidneys(self) -> tuple[NDArray[np.float32], list[NDArray[np.float32]]]:
        """Places in the kidneys, mm, and their HU at each smoothing."""
        box = bounding_box(self.labels == KIDNEY)
        if box is None:
            return np.zeros((0, 3), np.float32), [np.zeros(0, np.float32) for _ in SMOOTH_MM]
        crop = self.crop(box, KIDNEY, ROUGH)
        inside = ndimage.binary_erosion(crop.now)
        places = np.argwhere(inside) * crop.spacing + np.multiply(box.start, self.geometry.spacing)
        return places.astype(np.float32), [hu[inside] for hu in crop.hu]


def apply_clicks(
    labels: NDArray[np.uint8],
    hu: NDArray[Any],
    geometry: Geometry,
    clicks: Sequence[Click],
    earlier: Sequence[Click] = (),
    background: NDArray[Any] | None = None,
) -> NDArray[np.uint8]:
    """The labels after clicks, each of which assigns a label to a voxel and to what belongs to it around it.

    A click of a class that is not there adds to it and removes nothing of it. A click of kidney or background on
    another class removes that and adds nothing to it. A click that states what is there holds its voxel against others.

    Args:
        labels: (D, H, W) in orientation (I, P, L), with kitseg's ids.
        hu: the CT on the same grid.
        geometry: of both.
        clicks: applied in order.
        earlier: clicks that the labels follow already.
        background: (D, H, W), the model's probability of background, 0 to 1, where known.
    """
    held, result = list(earlier), labels.copy()
    for voxel, label in clicks:
        scan, before = _Scan(result, hu, geometry, background), int(result[voxel])
        if label != before and (label in LESIONS or before == BACKGROUND):
            _add(scan, (voxel, label), held)
        elif label != before:
            _remove(scan, (voxel, label), held)
        held.append((voxel, label))
    return result


def _add(scan: _Scan, click: Click, held: Sequence[Click]) -> None:
    (voxel, label), before = click, int(scan.labels[click[0]])
    rough = scan.crop(scan.around(voxel, REACH_MM[1]), label, ROUGH)
    reach, extends = _reach_of_added(rough, voxel)
    if extends:
        box = scan.around(voxel, FAR * reach + MARGIN_MM)
    else:  # a new lesion, of any size
        found = _walk(rough, click, label, held, _added(scan, rough, voxel, reach, False)) > 0.3
        box = rough.widened(found).union(scan.around(voxel, MARGIN_MM)).clip(scan.labels.shape)
    crop = scan.crop(box, label, FINE)
    walked = _walk(crop, click, label, held, _added(scan, crop, voxel, reach, extends))
    inside, here = scan.labels[box.slices], triple(np.subtract(voxel, box.start))
    now = inside == label
    free = np.isin(inside, (BACKGROUND, KIDNEY, before)) if label in LESIONS else inside == before
    others = [triple(np.subtract(v, box.start)) for v, n in held if n != label and v != voxel and crop.holds(v)]
    for other in others:
        free[other] = False
    mask = now | ((resized(walked, box.size) > 0.5) & free)
    mask[here] = True
    parts = Components.of(mask)
    touch = np.zeros(parts.sizes.size, bool)
    touch[parts.numbers[now[parts.box.slices]]] = True
    mask = parts.chosen(touch) | component_at(mask, here)
    holes = ndimage.binary_fill_holes(mask) & ~mask
    for other in others:
        if holes[other]:
            holes &= ~component_at(holes, other)
    inside[(mask | holes) & free] = label


def _remove(scan: _Scan, click: Click, held: Sequence[Click]) -> None:
    (voxel, label), of = click, int(scan.labels[click[0]])
    whole = component_at(scan.labels == of, voxel)
    reach = _edge(scan.crop(scan.around(voxel, REACH_MM[1]), of, ROUGH), voxel, None)
    inner = [v for v, n in held if n == of and whole[v]]
    box = scan.around(voxel, FAR * reach + MARGIN_MM)
    crop = scan.crop(box, of, FINE)
    score = _trusting(crop, voxel, reach, DISTANCE * _away(crop, voxel, reach) - EVEN, True)
    kept = resized(_walk(crop, click, of, held, score), box.size) > 0.5
    for place in (*filter(crop.holds, inner), voxel):
        kept[triple(np.subtract(place, box.start))] = place != voxel
    inside = scan.labels[box.slices]
    inside[(inside == of) & ~kept & whole[box.slices]] = label
    left = whole & (scan.labels == of)
    parts = Components.of(left)
    small = parts.sizes < REST * np.count_nonzero(whole & ~left)
    small[0] = False
    for held_voxel in inner:
        small[parts.number_at(held_voxel)] = False
    scan.labels[parts.chosen(small)] = label


def _reach_of_added(crop: _Crop, voxel: Triple) -> tuple[float, bool]:
    """The radius that a click stands for, mm, and whether it extends what is there.

    People click into the middle of what is wrong: the radius is the distance to its nearest edge, that of the current
    labels or that of kidney and mass together.
    """
    hull = _odds(crop, voxel) >= 0
    hull = ndimage.binary_fill_holes(ndimage.binary_closing(hull, iterations=2)) & (crop.hu[0] > FAT_HU)
    free, whole = _edge(crop, voxel, hull & ~crop.now), _edge(crop, voxel, hull)
    return free, free < whole


def _odds(crop: _Crop, voxel: Triple) -> NDArray[np.float32]:
    """The log odds of not being background; unknown where the model takes the click itself for background."""
    near = crop.odds[tuple(slice(max(0, a - 2), a + 3) for a in crop.at(voxel))]
    return crop.odds if np.median(near) > 0 else np.maximum(crop.odds, UNKNOWN)


def _edge(crop: _Crop, voxel: Triple, mask: NDArray[np.bool_] | None) -> float:
    """The distance of a voxel from the edge of a mask, of the class itself by default, within ``REACH_MM``."""
    inside = (crop.now if mask is None else mask).copy()
    inside[tuple(slice(max(0, a - 1), a + 2) for a in crop.at(voxel))] = True
    return float(np.clip(edt.edt(inside.astype(np.uint8), anisotropy=crop.spacing)[crop.at(voxel)], *REACH_MM))


def _away(crop: _Crop, voxel: Triple, reach: float) -> NDArray[np.float32]:
    """The logarithm of the distance from a click, in units of its reach."""
    return np.asarray(np.log(np.clip((crop.distance(voxel) + 0.3) / reach, 0.12, 9)), np.float32)


def _added(scan: _Scan, crop: _Crop, voxel: Triple, reach: float, extends: bool) -> NDArray[np.float32]:
    """The log odds of what a click adds."""
    return _trusting(crop, voxel, reach, _tissue(scan, crop, voxel, reach), extends)


def _tissue(scan: _Scan, crop: _Crop, voxel: Triple, reach: float) -> NDArray[np.float32]:
    """The log odds of the tissue around a click: it is the click's rather than kidney, and it is not background."""
    tissue = EVEN - DISTANCE * _away(crop, voxel, reach) + _likeness(scan, crop, voxel, reach)
    organ = _odds(crop, voxel) - FAT * (crop.hu[0] < FAT_HU)
    return np.asarray(-np.logaddexp(-tissue, -organ), np.float32)


def _trusting(
    crop: _Crop, voxel: Triple, reach: float, score: NDArray[np.float32], extends: bool
) -> NDArray[np.float32]:
    """Log odds that become those of the current labels far from a click; extends: also where the class is not."""
    far = np.clip((_away(crop, voxel, reach) - np.log(NEAR)) / np.log(FAR / NEAR), 0, 1)
    known = np.where(crop.now, KNOWN, -KNOWN if extends else score)
    return np.asarray(score + far * (known - score), np.float32)


def _likeness(scan: _Scan, crop: _Crop, voxel: Triple, reach: float) -> NDArray[np.float32]:
    """The log odds of HU in the click's tissue against those in the kidneys, outside what the click may stand for."""
    total = np.zeros(crop.now.shape, np.float32)
    ball = crop.distance(voxel) < max(float(np.clip(0.6 * reach, 3, 12)), 0.6 * max(crop.spacing))
    places, levels = scan.kidneys
    apart = np.linalg.norm(places - np.multiply(voxel, scan.geometry.spacing).astype(np.float32), axis=1)
    for weight, (least, most), hu, kidney in zip(LIKE, HU_SPREAD, crop.hu, levels, strict=True):
        middle = float(np.median(hu[ball]))
        spread = float(np.clip(1.48 * np.median(np.abs(hu[ball] - middle)), least, most))
        others = kidney[apart > 1.2 * reach]
        if others.size < 100:
            others = np.random.default_rng(0).normal(*KIDNEY_HU, 1000).astype(np.float32)
        counts = ndimage.gaussian_filter1d(np.histogram(others, BINS)[0].astype(float), 2)
        density = counts / max(1.0, counts.sum()) + 3e-5
        own = np.maximum(-6, -(((hu - middle) / spread) ** 2) / 2 - np.log(spread / 2))
        total += np.float32(weight) * np.clip(own - np.log(density)[np.clip(np.digitize(hu, BINS) - 1, 0, 119)], -3, 3)
    slope = sum(part**2 for part in np.gradient(crop.hu[0], *crop.spacing))
    return np.asarray(np.where(total > 0, total / (1 + slope / STEEP**2), total), np.float32)


def _walk(crop: _Crop, click: Click, of: int, held: Sequence[Click], score: NDArray[np.float32]) -> NDArray[np.float32]:
    """The probability of the class ``of`` from its log odds, with clicks as seeds."""
    seeds = [(crop.at(voxel), float(label == of)) for voxel, label in (*held, click) if crop.holds(voxel)]
    prior = 1 / (1 + np.exp(-np.clip(score, -12, 12)))
    return random_walk(prior.astype(np.float32), crop.hu[0], crop.spacing, seeds)


def _blocks(array: NDArray[np.float32], by: NDArray[np.int_]) -> NDArray[np.float32]:
    """The means of blocks of voxels, of smaller ones at the end."""
    for axis, n in enumerate(by):
        starts = np.arange(0, array.shape[axis], n)
        sizes = np.diff(np.append(starts, array.shape[axis])).reshape([-1 if a == axis else 1 for a in range(3)])
        array = np.asarray(np.add.reduceat(array, starts, axis) / sizes, np.float32)
    return array
