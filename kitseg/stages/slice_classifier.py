"""Stage 1 of two-stage: does a slice hold kidney or tumor? (paper, section 2.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from kitseg.inference.channels import foreground
from kitseg.links.guides import recall_threshold
from kitseg.stages.model import StageModel


class SliceClassifier(StageModel):
    """Two classes for each slice, spread over its pixels; ``net`` gives logits (N, 2) for slices (N, C, H, W).

    Args:
        net: see ``StageModel``. channels: see ``StageModel``.
        recall: the share of slices with foreground that the threshold, chosen on validation cases, must find.
    """

    def __init__(self, net: nn.Module, channels: Sequence[str], recall: float) -> None:
        super().__init__(net, channels)
        self.recall = recall

    def logits(self, x: Tensor) -> tuple[Tensor, ...]:
        """One head: (N, 2, 1, H, W), the same on the whole slice."""
        logits: Tensor = self.net(x[:, :, 0])
        return (logits[:, :, None, None, None].expand(-1, -1, -1, x.shape[3], x.shape[4]),)

    def losses(self, x: Tensor, target: Tensor, loss: Callable[..., Tensor]) -> Tensor:
        """Cross-entropy of the slices: a slice is positive where any of its pixels is."""
        logits = tuple(head[..., :1, :1] for head in self.logits(x))
        return loss(logits, target.amax(dim=(2, 3), keepdim=True))

    def scores(self, labels: NDArray[np.uint8], truth: NDArray[np.uint8]) -> dict[str, float]:
        """Recall and specificity over the slices; 1 where there is nothing to find or to leave."""
        found, there = np.asarray(labels.any((1, 2))), np.asarray(truth.any((1, 2)))
        recall = float(found[there].mean()) if there.any() else 1.0
        specificity = float((~found[~there]).mean()) if not there.all() else 1.0
        return {"recall": recall, "specificity": specificity}

    def threshold(self, cases: Iterable[tuple[Tensor, NDArray[np.uint8]]]) -> float | None:
        """The largest one up to 0.5 that finds the wanted share of slices with foreground (section 2.1 is silent)."""
        seen = [(foreground(values, self.channels)[:, 0, 0].numpy(), labels.any((1, 2))) for values, labels in cases]
        probability, positive = (np.concatenate(parts) for parts in zip(*seen, strict=True))
        return min(0.5, recall_threshold(probability, positive, self.recall))
