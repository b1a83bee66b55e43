"""Keep tumors that overlap the kidney."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kitseg.components import Components
from kitseg.types import Masks


@dataclass(frozen=True)
class KeepTumorInKidney:
    """Keeps tumor components T with |T ∩ foreground| / |T| of at least ``min_overlap``. Dual-unet paper, section 2.2.

    It has an effect only if foreground and tumor come from two networks; the tumors of a label map overlap fully.
    """

    min_overlap: float = 0.95

    def __call__(self, masks: Masks, hu: NDArray[Any], spacing: tuple[float, float, float]) -> Masks:
        """``masks`` without tumors outside the foreground; ``hu`` and ``spacing`` are not used."""
        tumors = Components.of(masks.tumor)
        overlap = tumors.total(masks.foreground) / np.maximum(tumors.sizes, 1)
        return replace(masks, tumor=tumors.chosen(overlap >= self.min_overlap))
