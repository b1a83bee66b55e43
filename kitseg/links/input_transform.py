"""From a scan on a stage's grid, and an earlier stage's output, to the input of the stage's network."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kitseg.errors import UsageError
from kitseg.links.crop import crop
from kitseg.links.guides import Link
from kitseg.links.intensity import AIR, Intensity
from kitseg.types import Box


@dataclass(frozen=True)
class InputTransform:
    """Makes a network's input from HU and, where the stage has a link, from the guide of the earlier stage.

    Raises:
        UsageError: a link, which takes one channel, and an intensity that makes several.
    """

    intensity: Intensity
    link: Link | None

    def __post_init__(self) -> None:
        if self.link is not None and self._of_scan > 1:
            raise UsageError(f"{self.link} takes one channel, and {self.intensity} makes {self._of_scan}")

    @cached_property
    def _of_scan(self) -> int:
        return len(self.intensity(torch.zeros(1, 1, 1, 1), (0.0, 1.0)))

    @property
    def channels(self) -> int:
        """Channels of the network's input."""
        return self._of_scan if self.link is None else self.link.channels

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
