"""What follows a convolution: statistics of channels, and scale, shift, activation and residual in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from kitseg.native import library

SLAB = 4096  # voxels a row of moments, as in pointwise.h


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the biased variance (C,) of each channel of one image (1, C, D, H, W), float64."""
    rows = torch.empty(-(-x[0, 0].numel() // SLAB), 3, x.shape[1], dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    _run("moments", x, (None,) * 5, rows)
    return merge_moments(rows)


def merge_moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the biased variance of all values from (parts, 3, C) counts, means and squared differences."""
    count, mean, squares = rows.unbind(1)
    total = count.sum(0)
    middle = (count * mean).sum(0) / total
    return middle, (squares.sum(0) + (count * (mean - middle) ** 2).sum(0)) / total


def affine(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    first: Tensor | None = None,
    residual: Tensor | None = None,
    second: Tensor | None = None,
) -> Tensor:
    """``leaky(leaky(scale x + shift, first) + residual, second)`` of (N, C, D, H, W), in place if channels are last.

    scale, shift, and the slopes first and second: (C,). What is None is left out.
    """
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError("a residual has the shape of what it is added to")
        residual = residual.contiguous(memory_format=torch.channels_last_3d)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    rows = [None if row is None else row.float().contiguous() for row in (scale, shift, first, second)]
    if any(row is not None and row.shape != x.shape[1:2] for row in rows):
        raise ValueError("scale, shift and slopes have a value for each channel")
    _run("affine", x, (*rows, residual), None)
    return x


def _run(name: str, x: Tensor, more: tuple[Tensor | None, ...], rows: Tensor | None) -> None:
    if any(t is not None and (t.dtype, t.device.type) != (torch.float32, "cpu") for t in (x, *more)):
        raise ValueError("the kernels take float32 on the CPU")
    channels, residual = x.shape[1], more[-1]
    sizes = (x.numel(), channels, 0 if residual is None else residual.numel(), 0 if rows is None else rows.numel())
    voxels = x.numel() // channels
    buffers = map(library.address, (x, *more, rows))
    job = library.Pointwise(*buffers, *sizes, voxels, channels, library.lanes(), torch.get_num_threads())
    library.call(name, job)
