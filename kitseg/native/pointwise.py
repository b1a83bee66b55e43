"""What follows a convolution: statistics of channels, and scale, shift, activation and residual in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from kitseg.native import library
from kitseg.native.arena import join

SLAB = 4096  # voxels a row of moments, as in pointwise.h
Parts = tuple[Tensor, Tensor]  # a tensor as its first channels and the others


def split_parts(x: Tensor | Parts) -> tuple[Tensor, Tensor | None]:
    """One or two tensors for a kernel, which have their channels last; two become one where a vector would span both.

    Raises:
        ValueError: they are not float32 on the CPU, or of different shapes.
    """
    first, more = (x, None) if isinstance(x, Tensor) else x
    if more is not None and (first.shape[0], first.shape[2:]) != (more.shape[0], more.shape[2:]):
        raise ValueError("two parts of a tensor differ in their channels only")
    if any(t is not None and t.dtype != torch.float32 for t in (first, more)):
        raise ValueError("the kernels take tensors in float32, with the channels that they were made for")
    if more is not None and first.shape[1] % library.lanes():
        first, more = join([first, more], 1), None
    last = torch.channels_last_3d
    return first.contiguous(memory_format=last), None if more is None else more.contiguous(memory_format=last)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the biased variance (C,) of each channel of one image (1, C, D, H, W), float64."""
    if x.device.type == "meta":
        return (mean := torch.empty(x.shape[1], dtype=torch.float64, device="meta")), mean
    rows = torch.empty(-(-x[0, 0].numel() // SLAB), 3, x.shape[1], dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    _run("moments", x, (None,) * 6, rows)
    return merge_moments(rows)


def merge_moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the biased variance of all values from (parts, 3, C) counts, means and squared differences."""
    count, mean, squares = rows.unbind(1)
    if rows.device.type == "meta":
        return mean[0], mean[0]
    total = count.sum(0)
    middle = (count * mean).sum(0) / total
    return middle, (squares.sum(0) + (count * (mean - middle) ** 2).sum(0)) / total


def affine(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    first: Tensor | None = None,
    residual: Tensor | Parts | None = None,
    second: Tensor | None = None,
) -> Tensor:
    """``leaky(leaky(scale x + shift, first) + residual, second)`` of (N, C, D, H, W), in place if channels are last.

    scale, shift, and the slopes first and second: (C,). What is None is left out. A residual of fewer channels is added
    several times, see ``fits_residual``.
    """
    more = None
    if residual is not None:
        residual, more = split_parts(residual)
        channels = residual.shape[1] + (0 if more is None else more.shape[1])
        if (len(residual), channels, *residual.shape[2:]) != x.shape and (
            more is not None or not fits_residual(residual, x.shape)
        ):
            raise ValueError("a residual has the shape of what it is added to")
    x = x.contiguous(memory_format=torch.channels_last_3d)
    rows = [None if row is None else row.float().contiguous() for row in (scale, shift, first, second)]
    if any(row is not None and row.shape != x.shape[1:2] for row in rows):
        raise ValueError("scale, shift and slopes have a value for each channel")
    if x.device.type != "meta":
        _run("affine", x, (*rows, residual, more), None)
    return x


def fits_residual(residual: Tensor, shape: torch.Size) -> bool:
    """Whether ``affine`` can add it to a tensor of a shape: the same, or with its channels several times."""
    if residual.shape == shape:
        return True
    if (residual.shape[:1], residual.shape[2:]) != (shape[:1], shape[2:]):
        return False
    channels, lanes = residual.shape[1], library.lanes()
    return shape[1] % channels == 0 and 0 in (channels % lanes, lanes % channels)


def _run(name: str, x: Tensor, more: tuple[Tensor | None, ...], rows: Tensor | None) -> None:
    if any(t is not None and (t.dtype, t.device.type) != (torch.float32, "cpu") for t in (x, *more)):
        raise ValueError("the kernels take float32 on the CPU")
    channels, residual = x.shape[1], more[-2]
    counts = (0 if buffer is None else buffer.numel() for buffer in (residual, more[-1], rows))
    sizes = (x.numel(), channels, *counts, x.numel() // channels, channels)
    buffers = map(library.address, (x, *more, rows))
    how = (0 if residual is None else residual.shape[1], library.lanes(), torch.get_num_threads())
    library.call(name, library.Pointwise(*buffers, *sizes, *how))
