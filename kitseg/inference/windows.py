"""How a network sees a region that may be larger than what it was trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torchio as tio
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from kitseg.types import Triple

Predict = Callable[[Tensor], Tensor]


class Window(Protocol):
    """Runs ``predict`` (N, C, d, h, w) -> (N, K, d, h, w) over a region (C, D, H, W): (K, D, H, W) float32."""

    def __call__(self, predict: Predict, region: Tensor) -> Tensor:
        """The region's probabilities, on the CPU."""
        ...


@dataclass(frozen=True)
class WholeRegion:
    """The region in one pass."""

    def __call__(self, predict: Predict, region: Tensor) -> Tensor:
        """The region's probabilities, on the CPU."""
        return predict(region[None])[0].float().cpu()


@dataclass(frozen=True)
class SlidingWindow:
    """Overlapping windows blended with Hann weights, through TorchIO's grid sampler and aggregator.

    size: voxels (slices, rows, columns) of a window; overlap: the share that neighbours have in common on each axis.
    """

    size: Sequence[int]
    overlap: float

    def __call__(self, predict: Predict, region: Tensor) -> Tensor:
        """The region's probabilities, on the CPU; a region smaller than a window is padded by repeating its edge."""
        shape = region.shape[1:]
        pad = [max(0, k - n) for k, n in zip(self.size, shape, strict=True)]
        padded = functional.pad(region[None], (0, pad[2], 0, pad[1], 0, pad[0]), mode="replicate")[0]
        overlap = _triple([int(k * self.overlap) // 2 * 2 for k in self.size])
        sampler = tio.GridSampler(tio.Subject(region=tio.ScalarImage(tensor=padded)), _triple(self.size), overlap)
        aggregator = tio.GridAggregator(sampler, overlap_mode="hann")
        for patch in tio.SubjectsLoader(cast("Dataset[tio.Subject]", sampler), batch_size=1):
            probabilities = predict(patch["region"][tio.DATA])
            aggregator.add_batch(probabilities.float().cpu(), patch[tio.LOCATION])
        output: Tensor = aggregator.get_output_tensor()
        return output[:, : shape[0], : shape[1], : shape[2]].to(torch.float32)


def _triple(values: Sequence[int]) -> Triple:
    z, y, x = values
    return z, y, x
