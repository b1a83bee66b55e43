"""Stage 1 of guided-unetpp: kidney with tumor against background (paper, section 2, Figure 1)."""

from __future__ import annotations

from torch import Tensor

from kitseg.stages.base import Stage


class ForegroundStage(Stage):
    """Finds foreground in stacks of slices; ``net`` is a ``kitseg.nets.foreground.ForegroundNet``."""

    def logits(self, x: Tensor) -> tuple[Tensor, ...]:
        """One head: (N, 2, D, H, W) for ``x`` (N, 1, D, H, W)."""
        return (self.net(x),)
