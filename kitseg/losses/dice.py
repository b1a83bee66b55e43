"""Dice losses. p: probabilities, g: the reference as 0 and 1; all sums in float32."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from kitseg.losses.cross_entropy import CrossEntropy
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

    L = mean(−log p of the true class) + 1 − (1/F) Σ_c (2 Σ p·g + smooth) / (Σ p + Σ g + smooth), p = softmax of the
    logits, c the F foreground classes, inner sums over all pixels of the batch.

    nnU-Net (Isensee et al. 2021, online methods, "loss function"), in its form over the batch.

    Args:
        smooth: added to numerator and denominator, so that a class missing in batch and prediction costs nothing.
    """

    def __init__(self, smooth: float = 1.0) -> None:
        super().__init__()
        self.smooth, self.cross_entropy = smooth, CrossEntropy()

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss, a scalar.

        Args:
            logits: (N, K, *spatial), the first channel the background.
            target: (N, *spatial) int64 class ids.

        Raises:
            ValueError: the shapes don't match.
        """
        p = logits.float().softmax(dim=1)
        p, g = (x.movedim(1, 0).flatten(1)[1:] for x in (p, one_hot(target, p)))
        dice = (2 * (p * g).sum(1) + self.smooth) / (p.sum(1) + g.sum(1) + self.smooth)
        loss: Tensor = self.cross_entropy(logits, target)
        return loss + 1 - dice.mean()


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
