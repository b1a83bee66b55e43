"""Keep at most two kidneys of sufficient size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from kitseg.components import keep_kidneys
from kitseg.types import Masks


@dataclass(frozen=True)
class KeepKidneys:
    """Keeps the foreground components that are kidneys; ``components.kidneys_among`` describes the settings."""

    most: int = 2
    min_ratio: float = 0.05
    min_ml: float = 20.0

    def __call__(self, masks: Masks, hu: NDArray[Any], spacing: tuple[float, float, float]) -> Masks:
        """``masks`` without the other foreground components and their tumor; tumor outside the foreground remains.

        ``hu`` is not used.
        """
        ml = math.prod(spacing) / 1000
        kept = keep_kidneys(masks.foreground, ml, self.most, self.min_ratio, self.min_ml)
        return masks.without(masks.foreground & ~kept)
