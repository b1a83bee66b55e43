"""Phase 2 of two-phase: V-Net₁ and V-Net₂ on the ROI, trained jointly (paper, sections 3.3 and 3.4)."""

from __future__ import annotations

from torch import Tensor

from kitseg.stages.base import Stage


class FusedVNet(Stage):
    """Segments the ROI; ``net`` is a ``kitseg.nets.vnet.FusedVNet``, the loss is the sum over both networks."""

    def logits(self, x: Tensor) -> tuple[Tensor, ...]:
        """Two heads, V-Net₁ and V-Net₂: each (N, 3, D, H, W) for ``x`` (N, 1, D, H, W)."""
        first, second = self.net(x)
        return first, second
