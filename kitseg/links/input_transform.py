"""From a scan on a stage's grid, and an earlier stage's output, to the input of the stage's network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kitseg.links.crop import crop
from kitseg.links.guides import Link
from kitseg.links.intensity import AIR, Intensity
from kitseg.types import Box


@dataclass(frozen=True)
class InputTransform:
    """Makes a network's input from HU and, where the stage has a link, from the guide of the earlier stage."""

    intensity: Intensity
    link: Link | None

    def __call__(self, hu: Tensor, statistics: tuple[float, float], guide: Tensor | None) -> Tensor:
        """(C, d, h, w) float32 from HU (1, d, h, w) and a guide (G, d, h, w)."""
        image = self.intensity(hu, statistics)
        return image if self.link is None or guide is None else self.link(image, guide)

    def region(
        self, hu: NDArray[Any], statistics: tuple[float, float], region: Box, guide: NDArray[Any] | None
    ) -> tuple[Tensor, NDArray[np.bool_]]:
        """The network's input (C, d, H, W) for a region, and which of the region's slices it holds, (D,) bool."""
        kept = np.ones(region.size[0], np.bool_)
        guidance: Tensor | None = None
        image = torch.from_numpy(crop(hu, region, AIR).astype(np.float32))[None]
        if guide is not None:
            cropped = np.stack([crop(channel, region, 0) for channel in guide])
            kept = cropped[-1].any((1, 2))
            guidance, image = torch.from_numpy(cropped[:, kept]), image[:, kept]
        return self(image, statistics, guidance), kept
