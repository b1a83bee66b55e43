"""Focal Tversky loss."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from kitseg.losses.one_hot import one_hot

FLOOR = 1e-6  # of 1 − TI; below it there is no gradient, which would be unbounded near 0


class FocalTversky(nn.Module):
    """Focal Tversky loss, summed over the given classes.

    L = Σ_c max(1 − TI_c, FLOOR)^power with
    TI_c = (TP + smooth) / (TP + fn_weight · FN + fp_weight · FP + smooth); TP = Σ p·g, FN = Σ (1 − p)·g,
    FP = Σ p·(1 − g), p = softmax of the logits, g the reference as 0 and 1, sums over all pixels of the batch.

    Progressive paper, section 1, following its reference [1] (power = 1/γ, γ = 4/3).

    Args:
        fn_weight: of false negatives. fp_weight: of false positives.
        power: exponent of 1 − TI; below 1 the gradient is largest for small errors.
        smooth: added to numerator and denominator of TI.
        classes: ids of the classes in the sum.
        count_absent: whether a class that the batch lacks is in the sum. There TI = smooth / (fp_weight · FP + smooth),
            and a few false positives weigh more than all pixels of a tumor in another batch.
    """

    def __init__(
        self,
        fn_weight: float = 0.7,
        fp_weight: float = 0.3,
        power: float = 0.75,
        smooth: float = 1.0,
        classes: Sequence[int] = (1, 2),
        count_absent: bool = True,
    ) -> None:
        super().__init__()
        self.fn_weight, self.fp_weight = fn_weight, fp_weight
        self.power, self.smooth = power, smooth
        self.classes, self.count_absent = list(classes), count_absent

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss, a scalar, of logits (N, K, *spatial) and class ids (N, *spatial) int64.

        Raises:
            ValueError: the shapes don't match.
        """
        p = logits.float().softmax(dim=1)
        g = one_hot(target, p)
        p, g = (x[:, self.classes].transpose(0, 1).flatten(1) for x in (p, g))
        hits = (p * g).sum(1)
        errors = self.fn_weight * ((1 - p) * g).sum(1) + self.fp_weight * (p * (1 - g)).sum(1)
        one_minus_index = errors / (hits + errors + self.smooth)
        lost = one_minus_index.clamp(min=FLOOR).pow(self.power)
        return (lost if self.count_absent else lost * g.any(1)).sum()
