"""How a network sees a region that may be larger than what it was trained on."""

from __future__ import annotations

import math
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


@dataclass(frozen=True)
class DepthWindow:
    """Windows of ``size`` slices every ``step`` slices over the full plane, summed and renormalized.

    The end is padded with zeros (guided-unetpp paper, section 2).
    """

    size: int
    step: int

    def __call__(self, predict: Predict, region: Tensor) -> Tensor:
        """The region's probabilities, on the CPU."""
        depth = region.shape[1]
        windows = max(0, math.ceil((depth - self.size) / self.step)) + 1
        padded = functional.pad(region, (0, 0, 0, 0, 0, (windows - 1) * self.step + self.size - depth))
        total, count = torch.zeros(0), torch.zeros(padded.shape[1])
        for start in range(0, windows * self.step, self.step):
            part = slice(start, start + self.size)
            found = predict(padded[None, :, part])[0].float().cpu()
            if start == 0:
                total = torch.zeros(len(found), *padded.shape[1:])
            total[:, part] += found
            count[part] += 1
        return (total / count[:, None, None])[:, :depth]


@dataclass(frozen=True)
class Slices:
    """Slice by slice, ``batch`` of them at a time."""

    batch: int

    def __call__(self, predict: Predict, region: Tensor) -> Tensor:
        """The region's probabilities, on the CPU."""
        slices = region.transpose(0, 1)[:, :, None]
        parts = [predict(part)[:, :, 0].float().cpu() for part in torch.split(slices, self.batch)]
        return torch.cat(parts).transpose(0, 1)


def _triple(values: Sequence[int]) -> Triple:
    z, y, x = values
    return z, y, x
