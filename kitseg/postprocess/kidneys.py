"""Keep at most two kidneys of sufficient size and probability that lie beside each other."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kitseg.components import Components, kidneys_among
from kitseg.labels import KIDNEY
from kitseg.types import Masks


@dataclass(frozen=True)
class KeepKidneys:
    """Keeps the foreground components that are kidneys; ``components.kidneys_among`` describes the settings.

    by_tissue: of the components that are large enough, those with the most kidney without masses stay instead of the
    largest ones; min_probability: components whose mean probability of foreground is smaller are removed first, so that
    they count neither for ``most`` nor for ``min_ratio``; not applied to masks without a probability of background;
    max_gap: largest distance in mm along the slices' axis between a further kidney and the first one; components that
    are farther away are removed in the same way. (The two kidneys of 206 KiTS19 label maps share 24 mm or more there.)
    """

    most: int = 2
    min_ratio: float = 0.05
    min_ml: float = 20.0
    by_tissue: bool = False
    min_probability: float = 0.0
    max_gap: float = math.inf

    def __call__(self, masks: Masks, hu: NDArray[Any], spacing: tuple[float, float, float]) -> Masks:
        """``masks`` without the other foreground components and their tumor; tumor outside the foreground remains.

        ``hu`` is not used.
        """
        parts, ml = Components.of(masks.foreground), math.prod(spacing) / 1000
        if self.min_probability and "background" in masks.probabilities:
            improbable = parts.total(masks.probabilities["background"]) > (1 - self.min_probability) * parts.sizes
            parts = replace(parts, sizes=np.where(improbable, 0, parts.sizes))
        tissue = parts.total(masks.labels() == KIDNEY) if self.by_tissue else None
        limits = self.min_ratio, self.min_ml, tissue
        if self.max_gap < math.inf and parts.sizes.any():
            first = kidneys_among(parts.sizes, ml, 1, *limits).argmax()
            far = parts.gaps(int(first)) * spacing[0] > self.max_gap
            parts = replace(parts, sizes=np.where(far, 0, parts.sizes))
        kept = parts.chosen(kidneys_among(parts.sizes, ml, self.most, *limits))
        return masks.without(masks.foreground & ~kept)
