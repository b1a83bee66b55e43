"""A convolution with what follows it (norm, activation, residual) as one layer, channels last."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kitseg.native.arena import Arena, join, meta_call
from kitseg.native.pointwise import Parts, affine, fits_residual, moments
from kitseg.native.product import Product, is_product
from kitseg.native.winograd import F23, F25, F43, F43_2D, F45, F63, F63_2D, F65, Convolution, Kind, plan

CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
INSTANCE_NORMS = (nn.InstanceNorm2d, nn.InstanceNorm3d)
BATCH_NORMS = (nn.BatchNorm2d, nn.BatchNorm3d)
ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.PReLU)
LARGEST = {
    F43: 40e6,
    F63: 40e6,
    F45: 140e6,
    F65: 20e6,
    F43_2D: 40e6,
    F63_2D: 40e6,
}  # bytes of a layer's weights; F(2, 3), F(2, 5) have less than half as many as F(4, 3), F(4, 5)


class Layer(nn.Module):
    """``second(first(norm(convolution(x))) + residual)``; each part may be missing.

    A convolution without a kernel of ours stays PyTorch's. arena: memory that all layers of a network share; keep:
    whether the network has several passes, for which transformed weights are kept.
    """

    def __init__(
        self,
        convolution: nn.Module | None,
        norm: nn.Module | None,
        first: nn.Module | None,
        second: nn.Module | None,
        arena: Arena,
        keep: bool = True,
    ) -> None:
        super().__init__()
        conv: Any = deepcopy(convolution)
        if conv is not None and isinstance(norm, BATCH_NORMS) and not (conv.transposed and conv.groups > 1):
            conv, norm = fuse_conv_bn_eval(conv, norm, conv.transposed), None
        self.channels: int = getattr(conv if norm is None else norm, "out_channels" if norm is None else "num_features")
        self.first, self.second = slopes(first, self.channels), slopes(second, self.channels)
        self.norm: Any = deepcopy(norm)
        self.native: Convolution | Product | None = None
        self.arena, self.repeats = arena, tuple[int, ...]()  # how often the residual is repeated along its axes
        if has_kernel(conv):
            early = None
            if norm is None:  # the kernel applies the activation
                early, self.first = self.first, None
            if kinds := kinds_of(conv):
                weight = conv.weight if conv.weight.dim() == 5 else conv.weight[:, :, None]
                replicate = conv.padding_mode == "replicate"
                self.native = Convolution(weight, kinds, conv.bias, early, replicate, keep)
            else:
                self.native = Product(conv, early)
            conv = None
        self.convolution: Any = conv

    def forward(self, x: Tensor | Parts, residual: Tensor | Parts | None = None) -> Tensor:
        """Run the layer on (N, C, D, H, W) or (N, C, H, W); the result has its channels last."""
        if isinstance(residual, Tensor):
            few = residual.dim() == len(self.repeats) > 0 and residual.shape[1] * self.repeats[1] == self.channels
            residual = residual.repeat(self.repeats) if self.repeats and not few else residual
            residual = residual[(None,) * (_first(x).dim() - residual.dim())]  # as PyTorch broadcasts it
        if self.native is None:
            whole = _whole(x)  # what follows works in place
            x = whole.clone() if self.convolution is None else meta_call(self.convolution, whole)
        if _first(x).dim() == 5:
            return self._run(x, residual)
        deep = _each(x, lambda part: part[:, :, None])
        return self._run(deep, None if residual is None else _each(residual, lambda part: part[:, :, None]))[:, :, 0]

    def _run(self, x: Tensor | Parts, residual: Tensor | Parts | None) -> Tensor:
        images = len(_first(x))
        if isinstance(self.norm, INSTANCE_NORMS) and images > 1:
            if residual is None or len(_first(residual)) == 1:
                rows = [residual] * images
            else:
                rows = [_image(residual, i) for i in range(images)]
            return join([self._run(_image(x, i), row) for i, row in enumerate(rows)])
        found: tuple[Tensor, Tensor] | None = None
        if self.native is not None and isinstance(self.norm, INSTANCE_NORMS):
            x, *rest = self.native.with_moments(x, self.arena, residual is None)
            found = rest[0], rest[1]
        elif self.native is not None:
            x = self.native(x, self.arena, residual is None)
        x = _whole(x)
        if isinstance(residual, tuple) and _first(residual).shape[2:] != x.shape[2:]:
            residual = join(residual, 1)
        scale, shift = self._scale(x, found)
        if isinstance(residual, Tensor) and not fits_residual(residual, x.shape):  # PyTorch repeats what is smaller
            few = self.repeats and residual.shape[1] * self.repeats[1] == self.channels
            wide = residual.repeat(1, self.repeats[1], 1, 1, 1) if few else residual
            x = affine(x, scale, shift, self.first) + wide
            return (
                x if self.second is None else torch.where(x > 0, x, x * self.second.to(x.device)[:, None, None, None])
            )
        if self.norm is None and self.first is None and residual is None and self.second is None:
            return x
        return affine(x, scale, shift, self.first, residual, self.second)

    def _scale(self, x: Tensor, found: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """The norm as a scale and a shift of each channel."""
        ones, zeros = x.new_ones(self.channels), x.new_zeros(self.channels)
        if self.norm is None:
            return ones, zeros
        if isinstance(self.norm, BATCH_NORMS):
            mean, variance = self.norm.running_mean, self.norm.running_var
        else:
            mean, variance = found or moments(x)
        if x.device.type == "meta":
            return ones, zeros
        weight, bias = (ones, zeros) if self.norm.weight is None else (self.norm.weight, self.norm.bias)
        scale = weight / (variance + self.norm.eps).sqrt()
        return scale, bias - mean * scale


def _first(x: Tensor | Parts) -> Tensor:
    return x if isinstance(x, Tensor) else x[0]


def _whole(x: Tensor | Parts) -> Tensor:
    return x if isinstance(x, Tensor) else join(x, 1)


def _each(x: Tensor | Parts, change: Callable[[Tensor], Tensor]) -> Tensor | Parts:
    return change(x) if isinstance(x, Tensor) else (change(x[0]), change(x[1]))


def _image(x: Tensor | Parts, number: int) -> Tensor | Parts:
    return _each(x, lambda part: part[number : number + 1])


def has_kernel(convolution: Any) -> bool:
    """Whether a kernel computes a convolution; PyTorch does otherwise."""
    return bool(kinds_of(convolution)) or is_product(convolution)


def kinds_of(convolution: Any) -> tuple[Kind, ...]:
    """The algorithms for a convolution; none where PyTorch computes it."""
    if not isinstance(convolution, nn.Conv2d | nn.Conv3d):
        return ()
    size = (1, *convolution.kernel_size)[-3:]
    same = convolution.padding in ("same", tuple(n // 2 for n in convolution.kernel_size))
    plain = {*convolution.stride, *convolution.dilation, convolution.groups} == {1}
    if not (same and plain and convolution.padding_mode in ("zeros", "replicate")):
        return ()
    bytes_a_point = 4 * convolution.in_channels * convolution.out_channels
    fitting = (
        kind for kind, most in LARGEST.items() if kind.size == size and kind.points_in_all <= most / bytes_a_point
    )
    return (*fitting,) or tuple(kind for kind in (F23, F25, F43_2D) if kind.size == size)


class Halve(nn.Module):
    """Average pooling by 2 along some axes, several times as fast as PyTorch's where channels are last."""

    def __init__(self, pool: nn.AvgPool2d | nn.AvgPool3d) -> None:
        super().__init__()
        self.pool, self.steps = pool, _steps(pool)

    def forward(self, x: Tensor) -> Tensor:
        """Pool (N, C, D, H, W) or (N, C, H, W)."""
        axes = [axis for axis, step in enumerate(self.steps, 2) if step == 2]
        if any(x.shape[axis] % 2 for axis in axes):
            found: Tensor = self.pool(x)
            return found
        for axis in axes:
            before = (slice(None),) * axis
            x = x[(*before, slice(0, None, 2))] + x[(*before, slice(1, None, 2))]
        return x * 0.5 ** len(axes)


def halves(module: nn.Module) -> bool:
    """Whether it is an average pooling that ``Halve`` computes."""
    if not isinstance(module, nn.AvgPool2d | nn.AvgPool3d):
        return False
    windows = {1, 2} >= {*_steps(module)} and module.stride in (module.kernel_size, _steps(module))
    return windows and module.padding in (0, (0,) * len(_steps(module))) and not module.divisor_override


def _steps(pool: nn.AvgPool2d | nn.AvgPool3d) -> tuple[int, ...]:
    size, dims = pool.kernel_size, 2 if isinstance(pool, nn.AvgPool2d) else 3
    return (size,) * dims if isinstance(size, int) else tuple(size)


def is_norm(module: nn.Module) -> bool:
    """Whether it is an instance or batch normalization whose inference a layer computes."""
    if isinstance(module, INSTANCE_NORMS):
        return not module.track_running_stats
    return isinstance(module, BATCH_NORMS) and module.running_mean is not None


def slopes(activation: Any, channels: int) -> Tensor | None:
    """The slope below zero of each channel's ReLU, leaky ReLU or PReLU; None for no activation."""
    if activation is None:
        return None
    if isinstance(activation, nn.PReLU):
        return activation.weight.detach().float().expand(channels).contiguous()
    return torch.full((channels,), getattr(activation, "negative_slope", 0.0))


def memory_needs(model: nn.Module) -> tuple[int, int]:
    """Bytes of a network's weights for the kernels, and of the memory that these work in, at most."""
    weights, scratch = 0, 0
    module: Any
    for module in model.modules():
        own = sum(value.nbytes for value in module.parameters(recurse=False))
        if kinds := kinds_of(module):
            needs = [plan(kind, (1, 256, 256, 256), module.in_channels, module.out_channels) for kind in kinds]
            own = 4 * max(need.weights for need in needs) + own * (len(kinds) > 1)  # a choice needs the original, too
            scratch = max(scratch, *(4 * need.scratch * torch.get_num_threads() for need in needs))
        weights += own
    return weights, scratch
