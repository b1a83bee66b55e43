"""Sliding windows over regions that may be larger than a network's training patches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from kitseg.types import Triple

Predict = Callable[[Tensor], Tensor]


class Window(Protocol):
    """Runs ``predict`` (N, C, d, h, w) -> (N, K, d, h, w) over a region (C, D, H, W): (K, D, H, W) float32."""

    def __call__(self, predict: Predict, region: Tensor) -> Tensor:
        """The region's probabilities, on the CPU."""

    def part(self, region: Triple) -> Triple:
        """The shape of the network's input for a region of this shape."""


@dataclass(frozen=True)
class WholeRegion:
    """The region in one pass."""

    def __call__(self, predict: Predict, region: Tensor) -> Tensor:
        """The region's probabilities, on the CPU."""
        return predict(region[None])[0].float().cpu()

    def part(self, region: Triple) -> Triple:
        """All of it."""
        return region


@dataclass(frozen=True)
class SlidingWindow:
    """Overlapping windows blended with Hann weights, accumulated in place.

    size: voxels (slices, rows, columns) of a window; overlap: fraction shared by neighbours along each axis.
    """

    size: Sequence[int]
    overlap: float

    def __post_init__(self) -> None:
        if not (len(self.size) == 3 and min(self.size) > 0 and math.prod(self.size) <= 2**27):
            raise ValueError("a window has 3 sizes, and at most 2**27 voxels in all")
        if not 0 <= self.overlap <= 0.9:
            raise ValueError("windows overlap by 0 to 0.9")

    def __call__(self, predict: Predict, region: Tensor) -> Tensor:
        """The region's probabilities, on the CPU; a region smaller than a window gets edge padding."""
        shape = region.shape[1:]
        pad = [max(0, k - n) for k, n in zip(self.size, shape, strict=True)]
        if any(pad):
            region = functional.pad(region[None], (0, pad[2], 0, pad[1], 0, pad[0]), mode="replicate")[0]
        whole, total = region.shape[1:], torch.empty(0)
        for axes in product(*(self._shares(n, k) for n, k in zip(whole, self.size, strict=True))):
            part, (z, y, x) = tuple(where for where, _ in axes), (share for _, share in axes)
            found = predict(region[None, :, *part])[0].float().cpu()
            if not total.numel():
                total = torch.zeros(len(found), *whole)
            total[:, *part].addcmul_(found, z[:, None, None] * y[:, None] * x)
            del found  # before the next pass needs its memory
        return total[:, : shape[0], : shape[1], : shape[2]]

    def part(self, region: Triple) -> Triple:
        """A window."""
        z, y, x = self.size
        return z, y, x

    def _starts(self, n: int, size: int) -> list[int]:
        """The starts of windows on an axis of ``n`` voxels; the last window ends at the end of the axis."""
        step = size - int(size * self.overlap) // 2 * 2
        return [*range(0, n - size, step), n - size]

    def _shares(self, n: int, size: int) -> list[tuple[slice, Tensor]]:
        """Where windows lie on an axis, and their share of each voxel: Hann weights divided by their sum."""
        weight, total = torch.hann_window(size + 2, periodic=False)[1:-1], torch.zeros(n)
        parts = [slice(start, start + size) for start in self._starts(n, size)]
        for part in parts:
            total[part] += weight
        return [(part, weight / total[part]) for part in parts]


@dataclass(frozen=True)
class DepthWindow:
    """Windows of ``size`` slices every ``step`` slices over the full plane, summed and renormalized.

    The end is padded with zeros (guided-unetpp paper, section 2).
    """

    size: int
    step: int

    def __post_init__(self) -> None:
        if not 1 <= self.step <= self.size <= 1024:
            raise ValueError("a window has 1 to 1024 slices, and a step of 1 to as many")

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
        return total.div_(count[:, None, None])[:, :depth]

    def part(self, region: Triple) -> Triple:
        """Some slices."""
        return self.size, region[1], region[2]


@dataclass(frozen=True)
class Slices:
    """Slice by slice, ``batch`` of them at a time."""

    batch: int

    def __post_init__(self) -> None:
        if not 1 <= self.batch <= 1024:
            raise ValueError("a batch has 1 to 1024 slices")

    def __call__(self, predict: Predict, region: Tensor) -> Tensor:
        """The region's probabilities, on the CPU."""
        slices = region.transpose(0, 1)[:, :, None]
        total = torch.empty(0)
        for start in range(0, len(slices), self.batch):
            found = predict(slices[start : start + self.batch])[:, :, 0]
            if start == 0:
                total = torch.empty(found.shape[1], len(slices), *found.shape[2:])
            total[:, start : start + self.batch] = found.transpose(0, 1)
        return total

    def part(self, region: Triple) -> Triple:
        """A slice."""
        return 1, region[1], region[2]
