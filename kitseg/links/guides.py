"""Guides: voxelwise input from the previous stage, on the grid that both stages share.

A guide is an array (G, D, H, W). Its last channel is a mask: a slice with an empty mask is background, and the network
is not applied to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from kitseg.components import bounding_box
from kitseg.types import triple


class Link(Protocol):
    """Converts an earlier stage's output to input channels of a network."""

    channels: int  # input channels of the network
    in_training: bool  # whether the guide is also used in training

    def guide(self, probability: NDArray[np.float32], foreground: NDArray[np.bool_]) -> NDArray[np.float16]:
        """The guide of a scan, (G, D, H, W).

        Args:
            probability: (D, H, W) of foreground, from the earlier stage.
            foreground: (D, H, W) mask of the foreground; in training, that of the label.
        """

    def __call__(self, image: Tensor, guide: Tensor) -> Tensor:
        """The network's input (channels, d, h, w) from the scaled image (1, d, h, w) and the guide (G, d, h, w)."""


@dataclass(frozen=True)
class SliceGate:
    """Skips slices without foreground, which become background (two-stage paper, section 2.3).

    fill_gaps: whether to include slices between two slices with foreground.
    """

    fill_gaps: bool = False
    channels: int = 1
    in_training: bool = False

    def guide(self, probability: NDArray[np.float32], foreground: NDArray[np.bool_]) -> NDArray[np.float16]:
        """(1, D, H, W): 1 on every slice that is not skipped."""
        passes = np.asarray(foreground.any((1, 2)))
        if self.fill_gaps:
            passes[1:-1] |= passes[:-2] & passes[2:]  # NumPy buffers overlapping operands
        return np.broadcast_to(passes.astype(np.float16)[:, None, None], foreground.shape)[None]

    def __call__(self, image: Tensor, guide: Tensor) -> Tensor:
        """The image unchanged."""
        return image


@dataclass(frozen=True)
class GuidedByForeground:
    """mask · concat(y·I, I, (1 − y)·I), and the mask as a further channel (guided-unetpp paper, section 2).

    y is the probability of foreground, the mask its dilation by a ball.

    radius: (slices, rows, columns) of the ball in voxels; a voxel belongs to it where (i/r)² + (j/r)² + (k/r)² < 1.
    """

    radius: tuple[float, float, float]
    channels: int = 4
    in_training: bool = True

    def guide(self, probability: NDArray[np.float32], foreground: NDArray[np.bool_]) -> NDArray[np.float16]:
        """(2, D, H, W): y and the mask."""
        return np.stack([probability.astype(np.float16), dilate(foreground, self.radius).astype(np.float16)])

    def __call__(self, image: Tensor, guide: Tensor) -> Tensor:
        """(4, d, h, w): the three guided images, 0 outside the mask, and the mask."""
        y, mask = guide[:1].float(), (guide[1:] > 0.5).float()
        return torch.cat([mask * y * image, mask * image, mask * (1 - y) * image, mask])


def dilate(mask: NDArray[np.bool_], radius: tuple[float, float, float]) -> NDArray[np.bool_]:
    """A mask (D, H, W) dilated by an ellipsoid of ``radius`` in voxels (distances strictly below the radius)."""
    out = np.zeros_like(mask)
    box = bounding_box(mask)
    if box is None:
        return out
    near = box.grown(math.ceil(max(radius))).clip(triple(mask.shape))
    scale = [1 / r for r in radius]
    out[near.slices] = ndimage.distance_transform_edt(~mask[near.slices], sampling=scale) < 1 - 1e-9
    return out


def recall_threshold(probability: NDArray[np.floating], positive: NDArray[np.bool_], recall: float) -> float:
    """The largest threshold for which ``probability >= threshold`` finds at least ``recall`` of the positives.

    Both arrays are (n,). Without positives it is 0.5.
    """
    found = np.sort(probability[positive])
    if not found.size:
        return 0.5
    allowed = math.floor((1 - recall) * found.size + 1e-9)
    return float(found[allowed])
