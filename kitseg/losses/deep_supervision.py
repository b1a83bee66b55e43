"""One loss for several heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class DeepSupervision(nn.Module):
    """Σ_i w_i · loss(head i, target at the size of head i); sizes are matched by nearest neighbour.

    Progressive paper, section 1: weights 0.2, 0.2, 0.2, 0.4 from the coarsest head to the finest. Guided-unetpp paper,
    section 2: the heads of UNet++, all of the target's size, averaged.

    Args:
        loss: (logits, target, ...) -> scalar.
        weights: one per head.
    """

    def __init__(self, loss: nn.Module, weights: Sequence[float]) -> None:
        super().__init__()
        self.loss, self.weights = loss, tuple(weights)

    def forward(self, heads: Sequence[Tensor], target: Tensor, *more: Tensor) -> Tensor:
        """The loss, a scalar.

        Args:
            heads: logits (N, K, *spatial), each of a size of its own.
            target: (N, *spatial) int64 class ids at full size.
            more: what else the loss takes, (N, 1, *spatial) at full size.

        Raises:
            ValueError: there aren't as many heads as weights.
        """
        if len(heads) != len(self.weights):
            raise ValueError(f"{len(heads)} heads, but {len(self.weights)} weights")
        losses = [self.loss(head, *(_nearest(x, head.shape[2:]) for x in (target, *more))) for head in heads]
        return torch.stack([w * loss for w, loss in zip(self.weights, losses, strict=True)]).sum()


def _nearest(x: Tensor, size: Sequence[int]) -> Tensor:
    """``x`` with the last axes sampled at ``size`` points: every k-th where ``size`` is a k-th of them."""
    for axis, (wanted, given) in enumerate(zip(size, x.shape[-len(size) :], strict=True), start=-len(size)):
        if wanted != given:
            x = x.index_select(axis, torch.arange(wanted, device=x.device) * given // wanted)
    return x
