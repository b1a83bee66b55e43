"""Model T of dual-unet: tumor in slices that contain tumor (paper, section 2.1.1)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kitseg.labels import TUMOR
from kitseg.stages.model import SliceModel


class TumorUNet(SliceModel):
    """Segments tumor; ``net`` is a ``kitseg.nets.unet.UNet``."""

    def scores(self, labels: NDArray[np.uint8], truth: NDArray[np.uint8]) -> dict[str, float]:
        """Dice over the slices with tumor: it is trained on no others, where the filter removes what it predicts."""
        tumorous = (truth == TUMOR).any((1, 2))
        return super().scores(labels[tumorous], truth[tumorous])
