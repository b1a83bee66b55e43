"""Correct a label map where a person clicks: a random walk decides between the clicked class and what was there.

A voxel's prior comes from its distance to the click and to the lesion that it extends, from its HU (the click's tissue,
another one of a lesion, or the kidney's) and from the model's probability of background; the random walk smooths it
along HU (`random_walk`). A box states where a lesion is: an ellipsoid in it takes the place of the ball about a click.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import edt
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from kitseg.components import Components, component_at
from kitseg.labels import BACKGROUND, CYST, KIDNEY, TUMOR
from kitseg.postprocess.clicked_scan import FINE, ROUGH, UNKNOWN, Aim, ClickedScan, Crop
from kitseg.postprocess.random_walk import random_walk, resized
from kitseg.types import Box, Geometry, Triple, triple

Click = tuple[Triple | Box, int]  # a voxel (slice, row, column) or a box, and its label

LESIONS = (TUMOR, CYST)
REACH_MM = (4.0, 75.0)  # the radius that a click may stand for
MARGIN_MM = 8.0
HU_SPREAD = ((10.0, 20.0), (6.0, 20.0))  # least and most in a lesion, at each smoothing
LESION_HU, OTHER = (80.0, 50.0), 0.25  # of any lesion: mean and deviation, and its share in one that a click is in
KIDNEY_HU = (150.0, 40.0)  # mean and deviation where there is no kidney to compare with
BINS = np.linspace(-200, 400, 121)
FAT_HU = -30.0
ALIKE_HU = 25.0  # what differs less from the click's HU may belong to its organ, whatever the model predicts
STEEP = 15.0  # HU per mm: the surface of a kidney in fat, where HU pass through those of a tumor
EVEN, DISTANCE, LIKE, FAT = 1.5, 4.0, (0.8, 0.6), 4.0  # the prior's terms, as log odds
WHOLE = -1.5  # EVEN at the same distance from the lesion that a click extends
EDGE = float(np.exp(EVEN / DISTANCE))  # times the radii: where the distance alone leaves it even
KNOWN = 6.0  # log odds of what is there, far from a click
NEAR, FAR = 1.0, 3.5  # times its reach: up to there a click removes, from there on it changes nothing
BESIDE = 2.0  # times its reach: up to there a click overrules the model's background, and extends a lesion
REST = 0.4  # of what a click removes: smaller rests of that lesion are removed too


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
    A box of a lesion adds the lesion in it, one of kidney makes kidney of the lesions in it, one of background
    removes all in it; nothing outside a box changes.

    Args:
        labels: (D, H, W) in orientation (I, P, L), with kitseg's ids.
        hu: the CT on the same grid.
        geometry: of both.
        clicks: voxels or boxes inside the grid, applied in order.
        earlier: clicks that the labels follow already.
        background: (D, H, W), the model's probability of background, 0 to 1, where known.
    """
    result = labels.copy()
    held = [(where, label) for where, label in earlier if not isinstance(where, Box)]
    for where, label in clicks:
        scan = ClickedScan(result, hu, geometry, background)
        if isinstance(where, Box):
            held = [known for known in held if not _overrules(where, label, *known)]
            _fill(scan, where, label, held)
            continue
        before = int(result[where])
        if label != before and (label in LESIONS or before == BACKGROUND):
            _add(scan, (where, label), held)
        elif label != before:
            _remove(scan, (where, label), held)
        held.append((where, label))
    return result


def _overrules(box: Box, label: int, voxel: Triple, other: int) -> bool:
    """Whether a box removes an earlier click's class: one of kidney the lesions in it, one of background all."""
    removes = label == BACKGROUND or (label == KIDNEY and other in LESIONS)
    return removes and box.holds(voxel)


def _fill(scan: ClickedScan, box: Box, label: int, held: Sequence[tuple[Triple, int]]) -> None:
    inside = scan.labels[box.slices]
    free = np.isin(inside, LESIONS) if label == KIDNEY else np.ones(inside.shape, np.bool_)
    for voxel, other in held:
        if other != label and box.holds(voxel):
            free[triple(np.subtract(voxel, box.start))] = False
    if label in LESIONS:
        z, y, x = (np.add(box.start, box.stop) - 1) / 2
        aim = Aim((z, y, x), tuple(np.multiply(box.size, scan.geometry.spacing) / 2 / EDGE))
        crop = scan.crop(box, label, FINE)
        certain = replace(crop, odds=np.where(crop.distance(aim) < EDGE, np.maximum(crop.odds, UNKNOWN), crop.odds))
        walked = resized(_walk(crop, (), label, held, _tissue(scan, certain, aim)), box.size) > 0.5
        parts = Components.of(walked | (inside == label))
        free &= parts.chosen(np.arange(parts.sizes.size) == parts.sizes.argmax())
    inside[free] = label


def _add(scan: ClickedScan, click: tuple[Triple, int], held: Sequence[tuple[Triple, int]]) -> None:
    (voxel, label), before = click, int(scan.labels[click[0]])
    rough = scan.crop(scan.around(voxel, REACH_MM[1]), label, ROUGH)
    reach, extends = _reach_of_added(rough, voxel)
    aim, shape = Aim(voxel, (reach,) * 3), scan.labels.shape
    if extends:
        box = scan.around(voxel, FAR * reach + MARGIN_MM)
        box = rough.widened(rough.lesion(aim, BESIDE), 2 * reach + MARGIN_MM).union(box).clip(shape)
    else:  # a new lesion, of any size
        found = _walk(rough, [click], label, held, _tissue(scan, rough, aim)) > 0.3
        box = rough.widened(found, MARGIN_MM).union(scan.around(voxel, MARGIN_MM)).clip(shape)
    crop = scan.crop(box, label, FINE)
    score = _tissue(scan, crop, aim, crop.lesion(aim, BESIDE) if extends else None)
    walked = _walk(crop, [click], label, held, _trusting(crop, aim, score, score))
    inside, here = scan.labels[box.slices], triple(np.subtract(voxel, box.start))
    now = inside == label
    free = np.isin(inside, (BACKGROUND, KIDNEY, before)) if label in LESIONS else inside == before
    others = [triple(np.subtract(v, box.start)) for v, n in held if n != label and v != voxel and crop.box.holds(v)]
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


def _remove(scan: ClickedScan, click: tuple[Triple, int], held: Sequence[tuple[Triple, int]]) -> None:
    (voxel, label), of = click, int(scan.labels[click[0]])
    whole = component_at(scan.labels == of, voxel)
    rough = scan.crop(scan.around(voxel, REACH_MM[1]), of, ROUGH)
    reach = _edge(rough, voxel, rough.now)
    inner = [v for v, n in held if n == of and whole[v]]
    box = scan.around(voxel, FAR * reach + MARGIN_MM)
    crop, aim = scan.crop(box, of, FINE), Aim(voxel, (reach,) * 3)
    score = _trusting(crop, aim, -EVEN - _nearness(crop.distance(aim), reach), -KNOWN)
    kept = resized(_walk(crop, [click], of, held, score), box.size) > 0.5
    for place in (*filter(crop.box.holds, inner), voxel):
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


def _reach_of_added(crop: Crop, voxel: Triple) -> tuple[float, bool]:
    """The radius that a click stands for, mm, and whether it extends what is there.

    People click into the middle of what is wrong: the radius is the distance to its nearest edge, that of the current
    labels or that of kidney and mass together. The model states where the latter lies, and the HU do: alike tissue
    belongs together, and fat around it ends it. The radius is the geometric mean of these two.
    """
    alike = np.abs(crop.hu[1] - crop.hu[1][crop.at(voxel)]) < ALIKE_HU
    hull = ndimage.binary_closing((_odds(crop, voxel) >= 0) | alike, iterations=2)
    soft = crop.hu[0] > FAT_HU
    organs = (ndimage.binary_fill_holes(hull) & soft, soft)
    free, whole = (
        math.sqrt(math.prod(_edge(crop, voxel, organ & within) for organ in organs))
        for within in (~crop.now, np.ones_like(crop.now))
    )
    return free, free < whole


def _odds(crop: Crop, voxel: tuple[float, float, float]) -> NDArray[np.float32]:
    """The log odds of not being background; unknown where the model takes the click itself for background."""
    near = crop.odds[tuple(slice(max(0, a - 2), a + 3) for a in crop.at(voxel))]
    return crop.odds if np.median(near) > 0 else np.maximum(crop.odds, UNKNOWN)


def _edge(crop: Crop, voxel: Triple, mask: NDArray[np.bool_]) -> float:
    """The distance of a voxel from the edge of a mask, within ``REACH_MM``."""
    inside = mask.copy()
    inside[tuple(slice(max(0, a - 1), a + 2) for a in crop.at(voxel))] = True
    return float(np.clip(edt.edt(inside.astype(np.uint8), anisotropy=crop.spacing)[crop.at(voxel)], *REACH_MM))


def _nearness(distance: NDArray[np.float32], reach: float) -> NDArray[np.float32]:
    """The log odds by the distance from something, in units of its radius; reach: the radius in mm."""
    return np.asarray(-DISTANCE * np.log(np.clip(distance + 0.3 / reach, 0.12, 9)), np.float32)


def _trusting(
    crop: Crop, aim: Aim, score: NDArray[np.float32], absent: NDArray[np.float32] | float
) -> NDArray[np.float32]:
    """Log odds that become those of the current labels far from a click; absent: where the class is not."""
    far = np.clip(np.log(np.maximum(crop.distance(aim), 0.1) / NEAR) / np.log(FAR / NEAR), 0, 1)
    return np.asarray(score + far * (np.where(crop.now, KNOWN, absent) - score), np.float32)


def _tissue(scan: ClickedScan, crop: Crop, aim: Aim, lesion: NDArray[np.bool_] | None = None) -> NDArray[np.float32]:
    """The log odds of the tissue aimed at: it is that rather than kidney, and it is not background.

    lesion: what a click extends.
    """
    away = crop.distance(aim)
    shape = EVEN + _nearness(away, max(aim.radii))
    if lesion is not None:
        apart = edt.edt((~lesion).astype(np.uint8), anisotropy=crop.spacing) / aim.reach
        shape = np.maximum(shape, WHOLE + _nearness(apart, aim.reach))
    tissue = shape + _likeness(scan, crop, aim)
    organ = np.where(away < BESIDE, _odds(crop, aim.voxel), crop.odds) - FAT * (crop.hu[0] < FAT_HU)
    return np.asarray(-np.logaddexp(-tissue, -organ), np.float32)


def _likeness(scan: ClickedScan, crop: Crop, aim: Aim) -> NDArray[np.float32]:
    """The log odds of HU in a lesion that is aimed at against those in the farther half of the kidneys."""
    total = np.zeros(crop.now.shape, np.float32)
    ball = crop.distance(Aim(aim.voxel, (1.0,) * 3)) < max(
        float(np.clip(0.6 * aim.reach, 3, 12)), 0.6 * max(crop.spacing)
    )
    places, levels = scan.kidneys
    apart = np.linalg.norm(places - np.multiply(aim.voxel, scan.geometry.spacing).astype(np.float32), axis=1)
    far = apart > max(1.2 * aim.reach, float(np.median(apart)) if apart.size else 0)
    for weight, (least, most), hu, kidney in zip(LIKE, HU_SPREAD, crop.hu, levels, strict=True):
        middle = float(np.median(hu[ball]))
        spread = float(np.clip(1.48 * np.median(np.abs(hu[ball] - middle)), least, most))
        others = kidney[far]
        if others.size < 100:
            others = np.random.default_rng(0).normal(*KIDNEY_HU, 1000).astype(np.float32)
        counts = ndimage.gaussian_filter1d(np.histogram(others, BINS)[0].astype(float), 2)
        density = counts / max(1.0, counts.sum()) + 3e-5
        same = np.log(1 - OTHER) + np.maximum(-6, _normal(hu, middle, spread))
        own = np.logaddexp(same, np.log(OTHER) + _normal(hu, *LESION_HU))
        total += np.float32(weight) * np.clip(own - np.log(density)[np.clip(np.digitize(hu, BINS) - 1, 0, 119)], -3, 3)
    axes = [(axis, mm) for axis, mm in enumerate(crop.spacing) if total.shape[axis] > 1]
    slope = sum(np.gradient(crop.hu[0], mm, axis=axis) ** 2 for axis, mm in axes)
    return np.asarray(np.where(total > 0, total / (1 + slope / STEEP**2), total), np.float32)


def _normal(hu: NDArray[np.float32], mean: float, spread: float) -> NDArray[np.float32]:
    """The logarithm of a normal density, per bin."""
    return np.asarray(-(((hu - mean) / spread) ** 2) / 2 - np.log(spread / 2), np.float32)


def _walk(
    crop: Crop,
    clicks: Sequence[tuple[Triple, int]],
    of: int,
    held: Sequence[tuple[Triple, int]],
    score: NDArray[np.float32],
) -> NDArray[np.float32]:
    """The probability of the class ``of`` from its log odds, with clicks as seeds."""
    seeds = [(crop.at(voxel), float(label == of)) for voxel, label in (*held, *clicks) if crop.box.holds(voxel)]
    prior = 1 / (1 + np.exp(-np.clip(score, -12, 12)))
    return random_walk(prior.astype(np.float32), crop.hu[0], crop.spacing, seeds)
