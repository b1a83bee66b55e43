"""Deep supervision: one loss over several heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class DeepSupervision(nn.Module):
    """Σ_i w_i · loss(head i, target at the centres of the pixels of head i).

    Progressive paper, section 1: weights 0.2, 0.2, 0.2, 0.4 from the coarsest head to the finest. Guided-unetpp paper,
    section 2: the mean over the heads of UNet++, which all have the target's size.

    Args:
        loss: (logits, target, ...) -> scalar.
        weights: one per head.
    """

    def __init__(self, loss: nn.Module, weights: Sequence[float]) -> None:
        super().__init__()
        self.loss, self.weights = loss, tuple(weights)

    def forward(self, heads: Sequence[Tensor], target: Tensor, *more: Tensor) -> Tensor:
        """The loss, a scalar, of logits (N, K, *spatial) of different sizes and class ids (N, *spatial) of full size.

        more: further inputs of the loss, (N, 1, *spatial) of full size.

        Raises:
            ValueError: the numbers of heads and weights differ.
        """
        if len(heads) != len(self.weights):
            raise ValueError(f"{len(heads)} heads, but {len(self.weights)} weights")
        losses = [self.loss(head, *(_nearest(x, head.shape[2:]) for x in (target, *more))) for head in heads]
        return torch.stack([w * loss for w, loss in zip(self.weights, losses, strict=True)]).sum()


def _nearest(x: Tensor, size: Sequence[int]) -> Tensor:
    """``x`` with its last axes sampled at the centres of ``size`` cells, rounded up where they lie between points."""
    for axis, (wanted, given) in enumerate(zip(size, x.shape[-len(size) :], strict=True), start=-len(size)):
        if wanted != given:
            centres = (torch.arange(wanted, device=x.device) * given + given // 2) // wanted
            x = x.index_select(axis, centres)
    return x
