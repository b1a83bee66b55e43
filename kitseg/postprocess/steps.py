"""The steps of post-processing that a method's configuration chains; each is a setting plus one pure function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kitseg.postprocess.components import keep_kidneys_labels, remove_low_hu_tumors


class PostStep(Protocol):
    """One cleaning of a label map."""

    def __call__(self, labels: NDArray[np.uint8], hu: NDArray[Any], voxel_ml: float) -> NDArray[np.uint8]:
        """The cleaned label map of ``labels`` (D, H, W).

        ``hu`` is the CT of the same shape in Hounsfield units, ``voxel_ml`` the volume of a voxel in millilitres.
        """
        ...


@dataclass(frozen=True)
class KeepKidneys:
    """Keeps the components that can be kidneys: see ``components.keep_kidneys`` for the settings."""

    most: int = 2
    min_ratio: float = 0.05
    min_ml: float = 20.0

    def __call__(self, labels: NDArray[np.uint8], hu: NDArray[Any], voxel_ml: float) -> NDArray[np.uint8]:
        """``labels`` without foreground outside the kidneys; doesn't look at ``hu``."""
        return keep_kidneys_labels(labels, voxel_ml, self.most, self.min_ratio, self.min_ml)


@dataclass(frozen=True)
class RemoveLowHuTumors:
    """Removes tumor components with a mean below ``threshold`` HU: see ``components.remove_low_hu_tumors``."""

    threshold: float = 10.0

    def __call__(self, labels: NDArray[np.uint8], hu: NDArray[Any], voxel_ml: float) -> NDArray[np.uint8]:
        """``labels`` without tumors as dark as fluid; ``voxel_ml`` makes no difference."""
        return remove_low_hu_tumors(labels, hu, self.threshold)
