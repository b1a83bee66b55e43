"""Crop boxes that may reach outside their array."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kitseg.types import Box, triple


def crop(array: NDArray[Any], box: Box, fill: float) -> NDArray[Any]:
    """The values in ``box`` of ``array`` (D, H, W), padded with ``fill`` outside the array."""
    out = np.empty(box.size, array.dtype)
    crop_into(out, array, box, fill)
    return out


def crop_into(out: NDArray[Any], array: NDArray[Any], box: Box, fill: float) -> None:
    """The same, written to ``out`` of the box's size and any type; only the box is read from a memory-mapped array."""
    inside = box.clip(triple(array.shape))
    if inside != box:
        out.fill(fill)
    out[inside.moved(box.start).slices] = array[inside.slices]


def paste(values: NDArray[Any], box: Box, onto: NDArray[Any]) -> None:
    """Write the part of ``values`` in ``box`` that is inside ``onto`` (D, H, W)."""
    inside = box.clip(triple(onto.shape))
    onto[inside.slices] = values[inside.moved(box.start).slices]
