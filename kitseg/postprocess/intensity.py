"""Remove tumors as dark as fluid, which are most likely cysts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from kitseg.components import Components
from kitseg.types import Masks


@dataclass(frozen=True)
class RemoveLowHuTumors:
    """Removes tumor components with a mean below ``threshold`` HU. Two-phase paper, section 5.2.

    If such a component touches kidney (foreground without tumor; a shared corner is enough), its foreground remains, so
    that it becomes kidney; otherwise its foreground is removed too.
    """

    threshold: float = 10.0

    def __call__(self, masks: Masks, hu: NDArray[Any], spacing: tuple[float, float, float]) -> Masks:
        """``masks`` without tumors as dark as fluid; ``spacing`` is not used.

        Raises:
            ValueError: the shapes of masks and CT differ.
        """
        if masks.tumor.shape != hu.shape:
            raise ValueError(f"masks and CT differ in shape: {masks.tumor.shape} and {hu.shape}")
        tumors = Components.of(masks.tumor)
        dark = tumors.total(hu) < self.threshold * tumors.sizes
        touching = tumors.total(_near_kidney(masks, tumors)) > 0
        kept = masks.foreground & ~tumors.chosen(dark & ~touching)
        return replace(masks, foreground=kept, tumor=masks.tumor & ~tumors.chosen(dark))


def _near_kidney(masks: Masks, tumors: Components) -> NDArray[np.bool_]:
    """The voxels within a corner of kidney; computed around the tumors only."""
    near = np.zeros(tumors.shape, np.bool_)
    box = tumors.box.grown(1).clip(tumors.shape)
    kidney = masks.foreground[box.slices] & ~masks.tumor[box.slices]
    near[box.slices] = ndimage.maximum_filter(kidney, size=3, mode="constant")
    return near
