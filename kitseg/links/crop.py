"""Boxes that reach outside their array."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kitseg.types import Box


def crop(array: NDArray[Any], box: Box, fill: float) -> NDArray[Any]:
    """The contents of ``box`` from ``array`` (D, H, W), ``fill`` where the box reaches outside."""
    out = np.empty(box.size, array.dtype)
    crop_into(out, array, box, fill)
    return out


def crop_into(out: NDArray[Any], array: NDArray[Any], box: Box, fill: float) -> None:
    """The same in ``out``, which has the box's size and any type; of a mapped array only the box is read."""
    inside = box.clip((array.shape[0], array.shape[1], array.shape[2]))
    if inside != box:
        out.fill(fill)
    out[inside.moved(box.start).slices] = array[inside.slices]


def paste(values: NDArray[Any], box: Box, onto: NDArray[Any]) -> None:
    """Write ``values``, the contents of ``box``, into ``onto`` (D, H, W), as far as they lie inside."""
    inside = box.clip((onto.shape[0], onto.shape[1], onto.shape[2]))
    onto[inside.slices] = values[inside.moved(box.start).slices]
