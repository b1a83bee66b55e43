"""Cross-entropy over all pixels, and inside a mask."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from kitseg.losses.one_hot import one_hot


class CrossEntropy(nn.Module):
    """Cross-entropy, the mean over all pixels of the batch.

    L = −mean_n log p of the true class, p = softmax of the logits. Equal to ``nn.CrossEntropyLoss``, whose reduction is
    not deterministic on a GPU.
    """

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss, a scalar, of logits (N, K, *spatial) and class ids (N, *spatial) int64."""
        return functional.cross_entropy(logits.float(), target, reduction="none").mean()


class MaskedCrossEntropy(nn.Module):
    """Cross-entropy inside a mask.

    L = −mean(mask · g · log p), p = softmax of the logits, g the reference as 0 and 1; the mean is over all pixels of
    the batch, inside and outside the mask, and over the K channels.

    Guided-unetpp paper, section 2, second equation, in which the minus sign is missing.
    """

    def forward(self, logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """The loss, a scalar, of logits (N, K, *spatial), class ids (N, *spatial) int64 and a mask (N, 1, *spatial).

        Raises:
            ValueError: the shapes don't match.
        """
        if mask.shape != target.unsqueeze(1).shape:
            raise ValueError(f"mask of shape {tuple(mask.shape)} doesn't match class ids of {tuple(target.shape)}")
        log_p = logits.float().log_softmax(dim=1)
        return -(mask * one_hot(target, log_p) * log_p).mean()
