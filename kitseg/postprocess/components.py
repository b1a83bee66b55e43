"""Connected components of kidneys and tumors. All components are 26-connected: voxels touch by a corner too."""

from __future__ import annotations

from typing import Any

import cc3d
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from kitseg.labels import BACKGROUND, KIDNEY, TUMOR
from kitseg.types import Box


def bounding_box(mask: NDArray[np.bool_]) -> Box | None:
    """The smallest box that holds every True voxel of a (D, H, W) mask; None for an empty mask."""
    start, stop = [0, 0, 0], list(mask.shape)
    for axis in range(3):
        inside = mask[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))]
        hit = np.flatnonzero(inside.any(axis=tuple({0, 1, 2} - {axis})))
        if not hit.size:
            return None
        start[axis], stop[axis] = int(hit[0]), int(hit[-1]) + 1
    return Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))


def keep_kidneys(
    mask: NDArray[np.bool_], voxel_ml: float, most: int = 2, min_ratio: float = 0.05, min_ml: float = 20.0
) -> NDArray[np.bool_]:
    """The kidneys (with their tumors) of a foreground mask: its largest component and those that can be another kidney.

    Two-phase paper, section 5.2; the paper is silent on when one kidney is all there is. Here each component after the
    first needs at least ``min_ratio`` of the first one's volume and at least ``min_ml``; at most ``most`` are kept.
    Of equally large components the one that comes first in the array goes first.

    Args:
        mask: (D, H, W), kidney ∪ tumor.
        voxel_ml: volume of a voxel in millilitres.
        most: how many components to keep at most.
        min_ratio: smallest volume of a further component, as a part of the first.
        min_ml: smallest volume of a further component in millilitres.
    """
    kept = np.zeros(mask.shape, np.bool_)
    box = bounding_box(mask)
    if box is None:
        return kept
    components, sizes = _components(mask[box.slices])
    order = np.argsort(-sizes[1:], kind="stable")[:most] + 1
    large = (sizes[order] >= min_ratio * sizes[order[:1]]) & (sizes[order] * voxel_ml >= min_ml)
    large[:1] = True
    chosen = np.zeros(sizes.size, np.bool_)
    chosen[order[large]] = True
    kept[box.slices] = chosen[components]
    return kept


def keep_kidneys_labels(
    labels: NDArray[np.uint8], voxel_ml: float, most: int = 2, min_ratio: float = 0.05, min_ml: float = 20.0
) -> NDArray[np.uint8]:
    """A (D, H, W) label map without the foreground that ``keep_kidneys`` drops from kidney ∪ tumor."""
    return labels * keep_kidneys(labels != BACKGROUND, voxel_ml, most, min_ratio, min_ml)


def remove_low_hu_tumors(labels: NDArray[np.uint8], hu: NDArray[Any], threshold: float = 10.0) -> NDArray[np.uint8]:
    """A label map without the tumor components that are as dark as fluid, most likely cysts.

    Two-phase paper, section 5.2. A tumor component whose mean is below ``threshold`` becomes kidney where it touches a
    kidney voxel (by a corner is enough), else background.

    Args:
        labels: (D, H, W) label map.
        hu: (D, H, W) CT in Hounsfield units.
        threshold: mean in Hounsfield units below which a tumor component goes.

    Raises:
        ValueError: the shapes differ.
    """
    if labels.shape != hu.shape:
        raise ValueError(f"labels and CT differ in shape: {labels.shape} and {hu.shape}")
    cleaned = labels.copy()
    tumor_box = bounding_box(labels == TUMOR)
    if tumor_box is None:
        return cleaned
    depth, height, width = labels.shape
    box = tumor_box.grown(1).clip((depth, height, width))
    inside = cleaned[box.slices]
    tumor = inside == TUMOR
    components, sizes = _components(tumor)
    of_voxel = components[tumor]
    near_kidney = ndimage.maximum_filter(inside == KIDNEY, size=3, mode="constant")[tumor]
    sums = np.bincount(of_voxel, weights=hu[box.slices][tumor], minlength=sizes.size)
    low = sums < threshold * sizes
    touching = np.bincount(of_voxel, weights=near_kidney, minlength=sizes.size) > 0
    becomes = np.where(low, np.where(touching, KIDNEY, BACKGROUND), TUMOR).astype(np.uint8)
    inside[tumor] = becomes[of_voxel]
    return cleaned


def _components(mask: NDArray[np.bool_]) -> tuple[NDArray[np.unsignedinteger[Any]], NDArray[np.int64]]:
    """Component numbers (0: none, then by first voxel in array order) and how many voxels each has (0 for number 0)."""
    components: NDArray[np.unsignedinteger[Any]]
    components, count = cc3d.connected_components(np.ascontiguousarray(mask), connectivity=26, return_N=True)
    return components, np.bincount(components[mask], minlength=count + 1)
