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
    """Clip to [low, high] HU, then (x - shift) / scale; any shape, float32.

    The two-phase paper clips to [-250, 250] (section 2.2), then / 250. Padding with air thus becomes -250 HU.
    """

    low: float
    high: float
    scale: float
    shift: float = 0.0

    def __post_init__(self) -> None:
        if not (self.low < self.high and self.scale > 0):
            stated = f"HU from {self.low:g} to {self.high:g} divided by {self.scale:g}"
            raise ValueError(f"{stated}: low must be less than high, and the divisor more than 0")

    def __call__(self, hu: Tensor, statistics: tuple[float, float]) -> Tensor:
        """The scaled intensities; the scan's statistics are not used."""
        return hu.float().clamp(self.low, self.high).sub_(self.shift).div_(self.scale)


@dataclass(frozen=True)
class HuWindows:
    """Several ranges of HU as channels, each clipped to [low, high] and scaled linearly to [-1, 1].

    The instance normalization of a network takes the level of each channel away, so that from one channel alone a
    network can't know whether a homogeneous region is water or tissue. Where a range is clipped doesn't depend on the
    level.
    """

    windows: Sequence[Sequence[float]]

    def __post_init__(self) -> None:
        if not self.windows or not all(len(one) == 2 and one[0] < one[1] for one in self.windows):
            raise ValueError(f"windows {self.windows}: each is [low, high] in HU, low less than high")

    def __call__(self, hu: Tensor, statistics: tuple[float, float]) -> Tensor:
        """(C, d, h, w), a channel per window, from HU (1, d, h, w); the scan's statistics are not used."""
        middles = [(high + low) / 2 for low, high in self.windows]
        return torch.cat(
            [
                hu.float().clamp(*one).sub_(middle).mul_(2 / (one[1] - one[0]))
                for one, middle in zip(self.windows, middles, strict=True)
            ]
        )


@dataclass(frozen=True)
class ZScore:
    """Zero mean and unit variance over the whole uncropped scan; not specified in the guided-unetpp paper."""

    def __call__(self, hu: Tensor, statistics: tuple[float, float]) -> Tensor:
        """The scaled intensities; a constant scan becomes 0."""
        mean, deviation = statistics
        return (hu.float() - mean).div_(deviation or 1.0)
