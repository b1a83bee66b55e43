"""Correct a label map where a person clicks: geodesic distances along similar HU decide how far a click reaches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from kitseg.components import Components, component_at
from kitseg.labels import BACKGROUND, CYST, KIDNEY, TUMOR
from kitseg.types import Box, Geometry, Triple, triple

REACH_MM = 45.0  # a click changes nothing farther away along an axis
SMOOTH_MM = 1.2
LOCAL_MM = 4.0  # around a click, for its HU and their noise
NOISE_HU = (8.0, 12.0)
FAT_HU = -90.0
LIMIT = 1.5  # the cost that a click reaches
DISTANCE, DIFFERENCE, DOUBT, OUTSIDE = 0.015, 0.5, 0.15, 0.03  # per mm, see ``_costs``
NEAR = 8.0  # times the cost: a click that corrects what is near
EDGE = 1.0  # HU per mm, in units of the noise, that is not an edge yet
REST = 0.2  # of the changed volume: smaller rests of a tumor that a click removes are removed too


@dataclass(frozen=True)
class _Reach:
    """A click's costs in its box, infinite where it does not reach; alike: where HU are the click's."""

    voxel: Triple
    label: int
    box: Box
    cost: NDArray[np.float32]
    alike: NDArray[np.bool_]


def apply_clicks(
    labels: NDArray[np.uint8],
    hu: NDArray[Any],
    geometry: Geometry,
    clicks: Sequence[tuple[Triple, int]],
    earlier: Sequence[tuple[Triple, int]] = (),
    probabilities: Mapping[int, NDArray[Any]] | None = None,
) -> NDArray[np.uint8]:
    """The labels after clicks, each of which assigns a label to a voxel and to what looks alike around it.

    A voxel belongs to the click from which the cheapest path leads to it, through similar HU. A click on a tumor that
    states another label reaches tumor only, any other click everything but tumor; kidney and background replace only
    the label of the clicked voxel. A click that states what is there already keeps other clicks away.

    Args:
        labels: (D, H, W) in orientation (I, P, L), with kitseg's ids.
        hu: the CT on the same grid.
        geometry: of both.
        clicks: a voxel (slice, row, column) and its label, each.
        earlier: clicks that the labels follow already, which keep new ones away.
        probabilities: (D, H, W) of each label, 0 to 1, where known: a click stops where its label becomes doubtful.
    """
    known = probabilities or {}
    reaches = [_reach(labels, hu, geometry, *click, known.get(click[1])) for click in (*earlier, *clicks)]
    cheapest = np.full(labels.shape, LIMIT, np.float32)
    for reach in reaches:
        part = cheapest[reach.box.slices]
        np.minimum(part, reach.cost, out=part)
    result = labels.copy()
    for reach in reaches[len(earlier) :]:
        inside, before = labels[reach.box.slices], int(labels[reach.voxel])
        here = triple(np.subtract(reach.voxel, reach.box.start))
        mask = reach.cost <= cheapest[reach.box.slices]
        mask |= ndimage.binary_dilation(mask) & reach.alike & (cheapest[reach.box.slices] >= LIMIT)  # half of its edge
        mask = _whole(mask, here, geometry)
        mask &= (inside != TUMOR) == (before != TUMOR)
        if reach.label not in (TUMOR, CYST):
            mask &= inside == before
            if before == TUMOR:
                mask |= _rests(inside, here, mask)
        result[reach.box.slices][mask] = reach.label
    return result


def _reach(
    labels: NDArray[np.uint8],
    hu: NDArray[Any],
    geometry: Geometry,
    voxel: Triple,
    label: int,
    probability: NDArray[Any] | None,
) -> _Reach:
    sides = [int(np.ceil(REACH_MM / mm)) for mm in geometry.spacing]
    first, last = np.subtract(voxel, sides), np.add(voxel, sides) + 1
    box = Box(triple(first), triple(last)).clip(geometry.shape)
    here, inside = triple(np.subtract(voxel, box.start)), labels[box.slices]
    costs, alike = _costs(hu[box.slices].astype(np.float32), inside, geometry, here, label)
    if probability is not None:
        known = probability[box.slices].astype(np.float32)
        costs += DOUBT * np.maximum(0, np.log((known[here] + 0.02) / (known + 0.02)))
    costs[(inside == TUMOR) != (labels[voxel] == TUMOR)] = -1  # no way
    return _Reach(voxel, label, box, _geodesic(costs, here, geometry.spacing), alike & (costs > 0))


def _costs(
    hu: NDArray[np.float32], labels: NDArray[np.uint8], geometry: Geometry, here: Triple, label: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The cost of each mm of a path, and where HU are alike: nearer to the click's than to kidney and to fat.

    Lesions have such a range; other labels, and lesions as bright as the kidney, the noise around the click. Steep
    edges cost too: at the surface of a kidney in fat, HU pass through those of a tumor. A click at an edge, and one
    that keeps a tumor away, correct what is near.
    """
    smooth = ndimage.gaussian_filter(hu, [SMOOTH_MM / mm for mm in geometry.spacing])
    size = [round(LOCAL_MM / mm) for mm in geometry.spacing]
    near = tuple(slice(max(0, a - n), a + n + 1) for a, n in zip(here, size, strict=True))
    level, noise = float(np.median(smooth[near])), float(np.clip(smooth[near].std(), *NOISE_HU))
    low = high = 2 * noise
    kidney = smooth[labels == KIDNEY]
    if label in (TUMOR, CYST) and kidney.size:
        apart = float(np.median(kidney)) - level
        if apart > noise:
            low, high = max(low, (level - FAT_HU) / 2), apart / 2
        elif apart < -noise:
            low = -apart / 2
    unlike = np.maximum(0, np.maximum(smooth - level - high, level - low - smooth)) / noise
    slope = np.sqrt(sum(part**2 for part in np.gradient(smooth, *geometry.spacing)))
    edge = np.maximum(0, slope / noise - EDGE)
    outside = OUTSIDE * (labels == BACKGROUND) if label in (TUMOR, CYST) else 0.0
    near_only = NEAR if edge[here] > 0 or (label not in (TUMOR, CYST) and labels[here] != TUMOR) else 1.0
    return (near_only * (DISTANCE + DIFFERENCE * (unlike + edge) + outside)).astype(np.float32), unlike == 0


def _geodesic(costs: NDArray[np.float32], here: Triple, spacing: Sequence[float]) -> NDArray[np.float32]:
    """The cost of the cheapest path to each voxel, infinite above ``LIMIT``; negative costs block."""
    from skimage.graph import MCP_Geometric

    class Within(MCP_Geometric):  # type: ignore[misc]
        def goal_reached(self, index: int, cumcost: float) -> int:
            return 2 if cumcost > LIMIT else 0

    found, _ = Within(costs, sampling=spacing).find_costs([here])
    return np.where(found <= LIMIT, found, np.inf).astype(np.float32)


def _whole(mask: NDArray[np.bool_], here: Triple, geometry: Geometry) -> NDArray[np.bool_]:
    """A mask around a click without holes and single voxels at its edge."""
    filled = ndimage.binary_fill_holes(mask).astype(np.float32)
    smooth = ndimage.gaussian_filter(filled, [SMOOTH_MM / mm for mm in geometry.spacing]) > 0.5
    smooth[here] = True
    return component_at(smooth, here)


def _rests(labels: NDArray[np.uint8], here: Triple, changed: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """What is left of the clicked tumor where it is small beside what the click changes."""
    left = Components.of(component_at(labels == TUMOR, here) & ~changed)
    return left.chosen(left.sizes < REST * max(1, int(changed.sum())))
