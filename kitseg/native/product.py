"""Convolutions as products of matrices: with a stride, of one voxel, and transposed ones whose blocks don't overlap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kitseg.native import library
from kitseg.native.arena import Arena, join
from kitseg.native.pointwise import Parts, merge_moments, split_parts


def is_product(convolution: Any) -> bool:
    """Whether the kernel computes a convolution of PyTorch's."""
    if not isinstance(convolution, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return False
    plain = {*convolution.dilation, convolution.groups} == {1} and {*convolution.output_padding} == {0}
    plain = plain and convolution.padding_mode == "zeros"
    sizes = list(zip(convolution.kernel_size, convolution.stride, _padding(convolution), strict=True))
    if convolution.transposed:
        return plain and all(kernel == stride <= 64 and pad == 0 for kernel, stride, pad in sizes)
    return plain and all(0 <= pad < kernel <= 64 and stride <= 64 for kernel, stride, pad in sizes)


class Product:
    """A convolution ``is_product`` with its weights as the kernel reads them.

    slope: of a leaky ReLU that follows, for each channel.
    """

    takes_parts = False

    def __init__(self, convolution: Any, slope: Tensor | None = None) -> None:
        self.inputs, self.outputs = convolution.in_channels, convolution.out_channels
        self.transposed = convolution.transposed
        self.sizes = [(1, 1, *values)[-3:] for values in (convolution.kernel_size, convolution.stride)]
        self.sizes.append((0, 0, *_padding(convolution))[-3:])
        bias = convolution.bias
        self.bias, self.slope = (None if v is None else v.detach().float().contiguous() for v in (bias, slope))
        self.lanes = library.lanes()
        weight = convolution.weight.detach().float().flatten(2)
        rows = weight.permute(2, 0, 1) if self.transposed else weight.permute(2, 1, 0).flatten(0, 1)[None]
        panels = -(-self.outputs // (2 * self.lanes))  # (places, panels, inputs, panel)
        wide = torch.zeros(*rows.shape[:2], panels * 2 * self.lanes)
        wide[..., : self.outputs] = rows
        self.weights = wide.view(*rows.shape[:2], panels, -1).transpose(1, 2).contiguous()

    def __call__(self, x: Tensor | Parts, arena: Arena, spare: bool = False) -> Tensor:
        """Convolve (N, in, D, H, W): (N, out, D, H, W), channels last."""
        return self._run(x, arena, False)[0]

    def with_moments(self, x: Tensor | Parts, arena: Arena, spare: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """The same of one image, and the mean and the biased variance (out,) of each of its channels, float64."""
        y, rows = self._run(x, arena, True)
        return y, *merge_moments(rows)

    def _run(self, x: Tensor | Parts, arena: Arena, moments: bool) -> tuple[Tensor, Tensor]:
        x, _ = split_parts(x if isinstance(x, Tensor) else join(x, 1))
        images, channels, *size = x.shape
        if channels != self.inputs:
            raise ValueError(f"a tensor of {self.inputs} channels is needed")
        axes = list(zip(size, *self.sizes, strict=True))
        out = [n * step if self.transposed else (n + 2 * pad - k) // step + 1 for n, k, step, pad in axes]
        y = arena.empty((images, self.outputs, *out), x.device)
        if x.device.type == "meta":
            return y, torch.empty(1, 3, self.outputs, dtype=torch.float64, device="meta")
        numbers = (images, channels, self.outputs, *size, *out, *(n for row in self.sizes for n in row))
        how = (*numbers, self.transposed, self.lanes, torch.get_num_threads())
        needs = library.Plan()
        library.call("product_plan", library.Product(*(None,) * 7, *(0,) * 7, *how), needs)
        rows = torch.empty(needs.blocks if moments else 0, 3, self.outputs, dtype=torch.float64)
        work = arena.work(needs.scratch * torch.get_num_threads())
        buffers = (x, self.weights, self.bias, self.slope, y, work, rows if moments else None)
        counts = (0 if buffer is None else buffer.numel() for buffer in buffers)
        library.call("product", library.Product(*map(library.address, buffers), *counts, *how))
        return y, rows


def _padding(convolution: Any) -> tuple[int, ...]:
    """Voxels on each side; -1 where they differ."""
    if not isinstance(convolution.padding, str):
        return tuple(convolution.padding)
    edges = (0 if convolution.padding == "valid" else n - 1 for n in convolution.kernel_size)
    return tuple(n // 2 if n % 2 == 0 else -1 for n in edges)
