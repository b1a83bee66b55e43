"""The only stage of progressive: an attention U-Net with four-scale input and deep supervision (paper, section 1)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from kitseg.stages.model import SliceModel


class ProgressiveAttentionUNet(SliceModel):
    """Segments slices; ``net`` is a ``kitseg.nets.attention_unet.AttentionUNet``.

    Its four heads are at 1/8, 1/4, 1/2 and full resolution.
    """

    def probabilities(self, x: Tensor, head: int = -1) -> Tensor:
        """The probabilities of one head, at full resolution."""
        found = super().probabilities(x, head)
        return functional.interpolate(found, size=x.shape[2:], mode="trilinear")
