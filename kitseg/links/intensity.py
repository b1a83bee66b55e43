"""Intensity scaling: from Hounsfield units to the input of a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

AIR = -1000.0


class Intensity(Protocol):
    """Scales Hounsfield units (1, d, h, w) to channels of a network's input (C, d, h, w), float32."""

    def __call__(self, hu: Tensor, statistics: tuple[float, float]) -> Tensor:
        """The scaled intensities; ``statistics``: mean and standard deviation of the whole scan in HU."""


@dataclass(frozen=True)
class ClipScale:
    """Clip to [low, high] HU, then (x - shift) / scale; float32.

    The two-phase paper clips to [-250, 250] (section 2.2), then / 250. Padding with air thus becomes -250 HU.

    windows: [low, high] in HU for further channels, each clipped and scaled to [-1, 1]. Instance normalization takes
    the level of a channel away, so that from one channel a network can hardly know whether a homogeneous region is
    water or tissue. A window ends at fixed HU: what it leaves depends on the level.

    Raises:
        ValueError: low is not less than high, or the scale is not above 0.
    """

    low: float
    high: float
    scale: float
    shift: float = 0.0
    windows: Sequence[Sequence[float]] = ()

    def __post_init__(self) -> None:
        if not (self.low < self.high and self.scale > 0):
            stated = f"HU from {self.low:g} to {self.high:g} divided by {self.scale:g}"
            raise ValueError(f"{stated}: low must be less than high, and the divisor more than 0")
        if not all(isinstance(one, Sequence) and len(one) == 2 and one[0] < one[1] for one in self.windows):
            raise ValueError(f"windows {list(self.windows)}: each is [low, high] in HU, low less than high")

    def __call__(self, hu: Tensor, statistics: tuple[float, float]) -> Tensor:
        """(1 + windows, ...) from HU (1, ...), or without windows any shape; the scan's statistics are not used."""
        rows = [(self.low, self.high, self.shift, self.scale)]
        rows += [(low, high, (low + high) / 2, (high - low) / 2) for low, high in self.windows]
        made = [hu.float().clamp(low, high).sub_(shift).div_(scale) for low, high, shift, scale in rows]
        return torch.cat(made) if self.windows else made[0]


@dataclass(frozen=True)
class ZScore:
    """Zero mean and unit variance over the whole uncropped scan; not specified in the guided-unetpp paper."""

    def __call__(self, hu: Tensor, statistics: tuple[float, float]) -> Tensor:
        """The scaled intensities; a constant scan becomes 0."""
        mean, deviation = statistics
        return (hu.float() - mean).div_(deviation or 1.0)
