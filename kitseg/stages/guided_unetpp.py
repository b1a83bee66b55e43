"""Stage 2 of guided-unetpp: a UNet++ on the guided slices, inside the mask only (paper, section 2)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kitseg.stages.base import SliceStage


class GuidedUNetPlusPlus(SliceStage):
    """Segments slices; ``net`` is a ``kitseg.nets.unetpp.UNetPlusPlus``.

    The input's last channel is the mask, which the network doesn't see; outside it is background.
    """

    def heads(self, x: Tensor) -> Sequence[Tensor]:
        """Four heads, each (N, 3, H, W), for ``x`` (N, 4, H, W)."""
        found: Sequence[Tensor] = self.net(x[:, :-1])
        return found

    def losses(self, x: Tensor, target: Tensor) -> Tensor:
        """The masked cross-entropy, averaged over the heads."""
        total: Tensor = self.loss(self.logits(x), target, x[:, -1:])
        return total

    def probabilities(self, x: Tensor, head: int = -1) -> Tensor:
        """Softmax · mask, and background with probability 1 outside."""
        mask = x[:, -1:].to(self.device)
        inside = super().probabilities(x, head) * mask
        inside[:, self.channels.index("background")] += 1 - mask[:, 0]
        return inside
