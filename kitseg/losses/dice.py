"""Dice losses. p: probabilities, g: the reference as 0 and 1; all sums in float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kitseg.losses.one_hot import one_hot


class SoftDice(nn.Module):
    """Soft Dice loss with squared denominator over all classes, computed per sample.

    L = 1 − (1/(N·K)) Σ_{n,c} 2 Σ p·g / (Σ p² + Σ g² + epsilon), p = softmax of the logits, inner sums over pixels.

    Two-stage paper, section 2.2, which doesn't specify the loss; this is the one in its authors' code. A class that is
    missing in a sample's reference adds the constant 1/(N·K), without gradient.

    Args:
        epsilon: avoids division by zero if p and g are 0.
    """

    def __init__(self, epsilon: float = 1e-10) -> None:
        super().__init__()
        self.epsilon = epsilon

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss, a scalar, of logits (N, K, *spatial) and class ids (N, *spatial) int64.

        Raises:
            ValueError: the shapes don't match.
        """
        p = logits.float().softmax(dim=1)
        p, g = p.flatten(2), one_hot(target, p).flatten(2)
        dice = 2 * (p * g).sum(2) / (p.square().sum(2) + g.sum(2) + self.epsilon)
        return 1 - dice.mean()


class DiceCrossEntropy(nn.Module):
    """Sum of cross-entropy and soft Dice loss over the foreground classes, with sums over the whole batch.

    L = mean(−log p of the true class) + (1/F) Σ_c (D_c + rare · C_c), p = softmax of the logits, c the F foreground
    classes, N pixels of the batch, all inner sums over them.

    A class in the batch: D_c = 1 − (2 Σ p·g + smooth) / (Σ p + Σ g + smooth), and C_c the mean of −log p_c over its own
    pixels. Without C_c a class of few pixels is hardly learned: softmax is flat where p_c is near 0, and so is D_c.
    A class that the batch lacks: C_c = 0, and D_c the same, which nearly vanishes for any prediction of many pixels;
    or with ``absent``, D_c = Σ p / (Σ p + absent · N).

    nnU-Net (Isensee et al. 2021, online methods, "loss function"), in its form over the batch, is rare = absent = 0
    and smooth = 1e-5.

    Args:
        smooth: added to numerator and denominator, so that a class missing in batch and prediction costs nothing.
        rare: weight of the cross-entropy of each class alone.
        absent: share of the pixels at which the prediction of a class that the batch lacks costs 1/2; 0: see above.
    """

    def __init__(self, smooth: float = 1.0, rare: float = 0.0, absent: float = 0.0) -> None:
        super().__init__()
        self.smooth, self.rare, self.absent = smooth, rare, absent

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss, a scalar.

        Args:
            logits: (N, K, *spatial), the first channel the background.
            target: (N, *spatial) int64 class ids.

        Raises:
            ValueError: the shapes don't match.
        """
        log_p = logits.float().log_softmax(dim=1)
        log_p, g = (x.movedim(1, 0).flatten(1) for x in (log_p, one_hot(target, log_p)))
        true, each, pixels = g.sum(1), -(g * log_p).sum(1), g.shape[1]
        p, g, present = log_p[1:].exp(), g[1:], true[1:]
        found = p.sum(1)
        lost = 1 - (2 * (p * g).sum(1) + self.smooth) / (found + present + self.smooth)
        if self.absent:
            lost = torch.where(present > 0, lost, found / (found + self.absent * pixels))
        own = each[1:] / present.clamp(min=1)
        return each.sum() / pixels + (lost + self.rare * own).mean()


class BCEDice(nn.Module):
    """Weighted sum of binary cross-entropy and soft Dice loss of one foreground channel.

    L = bce · mean BCE(p, g) + dice · (1 − (2 Σ p·g + smooth) / (Σ p + Σ g + smooth)), p = sigmoid of the logits; mean
    and sums over all pixels of the batch.

    Dual-unet paper, section 2.1.1, equation 1 (with λ = dice = 1 − bce); the paper doesn't specify the sums and
    ``smooth``.

    Args:
        bce: weight of the cross-entropy. dice: weight of the Dice term.
        smooth: added to numerator and denominator, so that the loss is 0 if prediction and reference are empty.
    """

    def __init__(self, bce: float = 0.5, dice: float = 0.5, smooth: float = 1.0) -> None:
        super().__init__()
        self.bce, self.dice, self.smooth = bce, dice, smooth

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss, a scalar, of logits (N, 1, *spatial) and a target (N, *spatial) int64 of 0 and 1.

        Raises:
            ValueError: the shapes don't match.
        """
        x, g = logits.float(), target.unsqueeze(1).float()
        bce = F.binary_cross_entropy_with_logits(x, g)
        p = x.sigmoid()
        dice = (2 * (p * g).sum() + self.smooth) / (p.sum() + g.sum() + self.smooth)
        return self.bce * bce + self.dice * (1 - dice)
