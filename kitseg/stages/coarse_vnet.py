"""Phase 1 of two-phase: one V-Net on patches of the coarse grid (paper, section 3.2)."""

from __future__ import annotations

from torch import Tensor

from kitseg.stages.model import StageModel


class CoarseVNet(StageModel):
    """Localizes kidney and tumor; ``net`` is a ``kitseg.nets.vnet.VNet``."""

    def logits(self, x: Tensor) -> tuple[Tensor, ...]:
        """One head: (N, 3, D, H, W) for ``x`` (N, 1, D, H, W); the decoder's maps are not used."""
        logits, _ = self.net(x)
        return (logits,)
