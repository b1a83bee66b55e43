"""Winograd convolution: F(2, 3), F(4, 3), F(6, 3) and F(2, 5), F(4, 5), F(6, 5).

F(m, r) has tiles of m outputs along an axis for a kernel of r, and m + r - 1 points: infinity and those of FOUR to TEN.

Lavin and Gray 2016, Fast Algorithms for Convolutional Neural Networks; here in three dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from kitseg.native import library
from kitseg.native.arena import Arena
from kitseg.native.pointwise import Parts, merge_moments, split_parts

FOUR, SIX, EIGHT = (0.0, 1.0, -1.0), (0.0, 1.0, -1.0, 0.5, -2.0), (0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5)
# A convolution with TEN has 11 times the error of one with EIGHT, a 20th of that of bfloat16.
TEN = (0.0, 0.4, -0.4, 0.8, -0.8, 1.25, -1.25, 2.5, -2.5)


@dataclass(frozen=True)
class Kind:
    """An algorithm of the kernels: its number there, kernel size, and the points besides infinity."""

    number: int
    size: tuple[int, int, int]
    points: Sequence[float]

    @property
    def points_in_all(self) -> int:
        """Points of a tile along all axes."""
        return prod(1 if n == 1 else len(self.points) + 1 for n in self.size)

    @property
    def tile(self) -> list[int]:
        """Outputs of a tile along each axis."""
        return [1 if n == 1 else len(self.points) + 2 - n for n in self.size]

    def products(self, shape: Sequence[int]) -> int:
        """Multiplications for an output of ``shape`` (D, H, W), of one channel by another."""
        return self.points_in_all * prod(-(-n // m) for n, m in zip(shape, self.tile, strict=True))

    def transform(self, size: int) -> Tensor:
        """The matrix (points, size) from a kernel's taps along an axis to its values at the points, float64."""
        if size == 1:
            return torch.ones(1, 1, dtype=torch.float64)
        rows = [[p**k / prod(p - q for q in self.points if q != p) for k in range(size)] for p in self.points]
        return torch.tensor([*rows, [0.0] * (size - 1) + [1.0]], dtype=torch.float64)


F43, F45, F25, F43_2D, F23, F63, F65, F63_2D = KINDS = (
    Kind(0, (3, 3, 3), SIX),
    Kind(1, (5, 5, 5), EIGHT),
    Kind(2, (5, 5, 5), SIX),
    Kind(3, (1, 3, 3), SIX),
    Kind(4, (3, 3, 3), FOUR),
    Kind(5, (3, 3, 3), EIGHT),
    Kind(6, (5, 5, 5), TEN),
    Kind(7, (1, 3, 3), EIGHT),
)


def cheapest(kinds: Sequence[Kind], shape: Sequence[int]) -> Kind:
    """The kind with the fewest multiplications for an output of ``shape`` (D, H, W)."""
    return min(kinds, key=lambda kind: kind.products(shape))


def transform_weights(weight: Tensor, kind: Kind, panel: int) -> Tensor:
    """Weights (out, in, kernel) as the kernels read them: (points, panels, in, panel) float32."""
    z, y, x = (kind.transform(n) for n in kind.size)
    outputs, inputs = weight.shape[:2]
    panels = -(-outputs // panel)
    found = torch.zeros(len(z) * len(y) * len(x), panels, inputs, panel)
    for number in range(panels):
        part = weight[number * panel : (number + 1) * panel].double()
        rows = z @ part.permute(2, 3, 4, 1, 0).flatten(1)
        rows = y @ rows.view(len(z), y.shape[1], -1)
        rows = x @ rows.view(len(z) * len(y), x.shape[1], -1)
        found[:, number, :, : len(part)] = rows.view(len(found), inputs, len(part))
    return found


def plan(kind: Kind, shape: Sequence[int], inputs: int, outputs: int) -> Any:
    """What a convolution of ``shape`` (N, D, H, W) needs: the fields of ``Plan`` in kernels.cpp."""
    found = library.Plan()
    numbers = dict(zip(("images", "depth", "height", "width"), shape, strict=True))
    numbers |= {"channels_in": inputs, "channels_out": outputs, "kind": kind.number}
    job = library.Convolution(**numbers, lanes=library.lanes(), threads=torch.get_num_threads())
    library.call("plan", job, found)
    return found


class Convolution:
    """A convolution with stride 1, padded to preserve D, H and W, by the ``cheapest`` of some kinds.

    weight: (out, in, *kind.size). slope: of a leaky ReLU that follows, for each channel. replicate: pad with the edge
    instead of zeros. keep: whether to keep the transformed weights, up to 19 times as large, for later calls.
    """

    takes_parts = True

    def __init__(
        self,
        weight: Tensor,
        kinds: Sequence[Kind],
        bias: Tensor | None = None,
        slope: Tensor | None = None,
        replicate: bool = False,
        keep: bool = True,
    ) -> None:
        for kind in kinds:
            if weight.shape[2:] != kind.size:
                raise ValueError(f"a kernel of {tuple(weight.shape[2:])} isn't one of {kind.size}")
        self.outputs, self.inputs = weight.shape[:2]
        self.kinds, self.replicate, self.lanes, self.keep = kinds, replicate, library.lanes(), keep
        self.bias, self.slope = (None if v is None else v.detach().float().contiguous() for v in (bias, slope))
        self.weight = weight.detach()
        self.points: tuple[Kind, Tensor] | None = None  # the kind of the last call, and its weights
        if keep and len(kinds) == 1:
            self._weights(kinds[0])
            del self.weight

    def __call__(self, x: Tensor | Parts, arena: Arena, spare: bool = False) -> Tensor:
        """Convolve (N, in, D, H, W): (N, out, D, H, W), channels last. spare: the layer reads x only here."""
        return self._run(x, arena, False, spare)[0]

    def with_moments(self, x: Tensor | Parts, arena: Arena, spare: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """The same of one image, and the mean and the biased variance (out,) of each of its channels, float64."""
        y, rows = self._run(x, arena, True, spare)
        return y, *merge_moments(rows)

    def _weights(self, kind: Kind) -> Tensor:
        if self.points is not None and self.points[0] == kind:
            return self.points[1]
        self.points = None
        found = transform_weights(self.weight, kind, 2 * self.lanes)
        self.points = (kind, found) if self.keep else None
        return found

    def _run(self, x: Tensor | Parts, arena: Arena, moments: bool, spare: bool) -> tuple[Tensor, Tensor]:
        x, more = split_parts(x)
        images, first, *size = x.shape
        if first + (0 if more is None else more.shape[1]) != self.inputs:
            raise ValueError(f"a tensor of {self.inputs} channels is needed")
        kind = cheapest(self.kinds, size)
        needs = plan(kind, (images, *size), self.inputs, self.outputs)
        shape = (images, self.outputs, *size)
        y = arena.empty(shape, x.device, (x, more) if spare and more is not None else (), needs.lead * self.outputs)
        if x.device.type == "meta":
            return y, torch.empty(1, 3, self.outputs, dtype=torch.float64, device="meta")
        rows = torch.empty(needs.blocks if moments else 0, 3, self.outputs, dtype=torch.float64)
        work = arena.work(needs.scratch * torch.get_num_threads())
        buffers = (x, more, self._weights(kind), self.bias, self.slope, y, work, rows if moments else None)
        sizes = (0 if buffer is None else buffer.numel() for buffer in buffers)
        channels = (self.inputs, first, self.outputs, first, self.inputs - first, self.outputs)
        how = (images, *size, *channels, kind.number, self.replicate, self.lanes, torch.get_num_threads())
        library.call("convolve", library.Convolution(*map(library.address, buffers), *sizes, *how))
        return y, rows
