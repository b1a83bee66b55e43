"""The only stage of progressive: an attention U-Net with four-scale input and deep supervision (paper, section 1)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from kitseg.stages.base import SliceStage


class ProgressiveAttentionUNet(SliceStage):
    """Segments slices; ``net`` is a ``kitseg.nets.attention_unet.AttentionUNet``."""

    def heads(self, x: Tensor) -> Sequence[Tensor]:
        """Four heads at 1/8, 1/4, 1/2 and full resolution, each (N, 3, h, w)."""
        found: Sequence[Tensor] = self.net(x)
        return found

    def probabilities(self, x: Tensor, head: int = -1) -> Tensor:
        """What one head believes, at full resolution."""
        found = super().probabilities(x, head)
        return functional.interpolate(found, size=x.shape[2:], mode="trilinear")
