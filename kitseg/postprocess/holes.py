"""Kidneys and tumors have no holes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from kitseg.postprocess.components import bounding_box
from kitseg.types import Masks

BALL = ndimage.generate_binary_structure(3, 1)  # of radius 1: a voxel and the six that share a face with it


@dataclass(frozen=True)
class FillHoles:
    """Closes both masks with a ball of radius 1 voxel, then fills what each slice encloses.

    Dual-unet paper, section 2.2, which says no more than that holes are filled using morphological operators.
    """

    def __call__(self, masks: Masks, hu: NDArray[Any], spacing: tuple[float, float, float]) -> Masks:
        """``masks`` and their holes; looks neither at ``hu`` nor at ``spacing``."""
        return Masks(fill_holes(masks.foreground), fill_holes(masks.tumor))


def fill_holes(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A (D, H, W) mask, closed in 3D and then without holes in any slice; no voxel gets lost at the array's borders."""
    filled = mask.copy()
    box = bounding_box(mask)
    if box is not None:
        closed = ndimage.binary_closing(np.pad(mask[box.slices], 1), BALL)[1:-1, 1:-1, 1:-1]
        filled[box.slices] = [ndimage.binary_fill_holes(plane) for plane in closed]
    return filled
