"""Boxes that reach outside their array."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kitseg.types import Box


def crop(array: NDArray[Any], box: Box, fill: float) -> NDArray[Any]:
    """The contents of ``box`` from ``array`` (D, H, W), ``fill`` where the box reaches outside."""
    inside = box.clip((array.shape[0], array.shape[1], array.shape[2]))
    pad = [(a - b, d - c) for a, b, c, d in zip(inside.start, box.start, inside.stop, box.stop, strict=True)]
    return np.pad(array[inside.slices], pad, constant_values=fill)


def paste(values: NDArray[Any], box: Box, onto: NDArray[Any]) -> None:
    """Write ``values``, the contents of ``box``, into ``onto`` (D, H, W), as far as they lie inside."""
    inside = box.clip((onto.shape[0], onto.shape[1], onto.shape[2]))
    onto[inside.slices] = values[inside.moved(box.start).slices]
