"""From Hounsfield units to what a network sees."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

AIR = -1000.0


@dataclass(frozen=True)
class ClipScale:
    """Clip to [low, high] HU, then (x - shift) / scale; any shape, float32.

    The two-phase paper clips to [-250, 250] (section 2.2), then / 250. Padding with air thus becomes -250 HU.
    """

    low: float
    high: float
    scale: float
    shift: float = 0.0

    def __call__(self, hu: Tensor) -> Tensor:
        """The scaled intensities."""
        return (hu.float().clamp(self.low, self.high) - self.shift) / self.scale
