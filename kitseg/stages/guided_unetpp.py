"""Stage 2 of guided-unetpp: a UNet++ on the guided slices, inside the mask only (paper, section 2)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kitseg.stages.model import SliceModel


class GuidedUNetPlusPlus(SliceModel):
    """Segments slices; ``net`` is a ``kitseg.nets.unetpp.UNetPlusPlus`` with four heads.

    The input's last channel is the mask, which the network doesn't get; outside it is background.
    """

    def logits(self, x: Tensor) -> tuple[Tensor, ...]:
        """Four heads, each (N, 3, 1, H, W), for ``x`` (N, 4, 1, H, W)."""
        return super().logits(x[:, :-1])

    def losses(self, x: Tensor, target: Tensor, loss: Callable[..., Tensor]) -> Tensor:
        """The masked cross-entropy, averaged over the heads."""
        return loss(self.logits(x), target, x[:, -1:])

    def probabilities(self, x: Tensor, head: int = -1) -> Tensor:
        """Softmax · mask, and background with probability 1 outside."""
        mask = x[:, -1:].to(self.device)
        inside = super().probabilities(x, head) * mask
        inside[:, self.channels.index("background")] += 1 - mask[:, 0]
        return inside
