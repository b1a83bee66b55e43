"""Means of probabilities, and the labels that follow from them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from kitseg.labels import BACKGROUND, KIDNEY, TUMOR
from kitseg.types import Box, Probabilities

IDS = {"background": BACKGROUND, "kidney": KIDNEY, "tumor": TUMOR}


def mean(members: Iterable[tuple[Probabilities, float]]) -> Probabilities:
    """The weighted mean of members, summed in float32 in their order, rounded to float16 at the end.

    Holds the running sum and one member at a time. Where a member's box ends, its background has probability 1.

    Raises:
        ValueError: no members, or members of other channels or another scan than the first.
    """
    first: Probabilities | None = None
    total, weights = np.empty(0, np.float32), 0.0
    for member, weight in members:
        if first is None:
            first, box = replace(member, array=np.empty((0, 0, 0, 0), np.float16)), member.box
            total = np.zeros(member.array.shape, np.float32)
        _same_kind(first, member)
        wider = box.union(member.box)
        total = _widen(total, box, wider, first.channels, weights)
        box = wider
        total += _widen(member.array.astype(np.float32), member.box, box, first.channels, 1.0) * np.float32(weight)
        weights += weight
    if first is None:
        raise ValueError("a mean needs at least one member")
    values = (total / np.float32(weights)).astype(np.float16)
    return Probabilities(values, first.channels, box, first.geometry, first.native, first.case_id)


def to_labels(probabilities: Probabilities) -> NDArray[np.uint8]:
    """The most probable label of each voxel of the whole scan, (D, H, W) uint8."""
    labels = np.zeros(probabilities.geometry.shape, np.uint8)
    ids = np.array([IDS[channel] for channel in probabilities.channels], np.uint8)
    if probabilities.array.size:
        labels[probabilities.box.slices] = ids[probabilities.array.argmax(axis=0)]
    return labels


def _same_kind(first: Probabilities, other: Probabilities) -> None:
    if other.channels != first.channels:
        raise ValueError(f"{other.case_id} has channels {other.channels} here and {first.channels} there")
    if not other.geometry.same_as(first.geometry):
        raise ValueError(f"{other.case_id} lies on two different grids")


def _widen(
    values: NDArray[np.float32], box: Box, wider: Box, channels: tuple[str, ...], background: float
) -> NDArray[np.float32]:
    """``values`` of ``box`` in a ``wider`` box, with ``background`` in the background channel around it."""
    if box == wider:
        return values
    out = np.zeros((len(channels), *wider.size), np.float32)
    out[[i for i, channel in enumerate(channels) if channel == "background"]] = background
    if values.size:
        out[(slice(None), *box.moved(wider.start).slices)] = values
    return out
