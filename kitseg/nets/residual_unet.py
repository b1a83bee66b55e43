"""Residual-encoder U-Net (Isensee et al. 2024, nnU-Net Revisited, section 3), which nnU-Net's presets M, L and XL use.

Tensors are (N, C, D, H, W); each of D, H and W is a multiple of the product of its strides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from kitseg.types import Triple

SLOPE = 0.01  # of the leaky ReLUs
#: Names in a state of nnU-Net's ResidualEncoderUNet and here; nnU-Net stores each weight under several names.
NNUNET_NAMES = (
    (r"^encoder\.stem\.convs\.0\.", "stem.0."),
    (r"^encoder\.stages\.(\d+)\.blocks\.(\d+)\.(conv1|conv2)\.", r"encoder.\1.\2.\3."),
    (r"^encoder\.stages\.(\d+)\.blocks\.(\d+)\.skip\.\d\.", r"encoder.\1.\2.skip.1."),
    (r"^decoder\.transpconvs\.(\d+)\.", r"decoder.\1.up."),
    (r"^decoder\.stages\.(\d+)\.convs\.0\.", r"decoder.\1.conv."),
    (r"^decoder\.seg_layers\.(\d+)\.", r"heads.\1."),
)


class InstanceNorm(nn.InstanceNorm3d):
    """Instance normalization with scale and shift.

    One training patch goes through batch normalization: equal results, but channels stay last in memory, which takes
    three quarters of the time of a step on a CPU.
    """

    computes_as_pytorch = True  # for kitseg.native

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize each channel of each sample; preserves the shape."""
        if self.training and len(x) == 1:
            return functional.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        return super().forward(x)


class ConvNorm(nn.Module):
    """Convolution and instance normalization; preserves the shape but for the stride."""

    def __init__(self, channels_in: int, channels_out: int, kernel: Triple, stride: Triple = (1, 1, 1)) -> None:
        super().__init__()
        k, j, i = kernel
        self.conv = nn.Conv3d(channels_in, channels_out, kernel, stride, padding=(k // 2, j // 2, i // 2))
        self.norm = InstanceNorm(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """Return norm(conv(x))."""
        out: Tensor = self.norm(self.conv(x))
        return out


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut, averaged where the first one strides (ResNet-D, He et al. 2019)."""

    def __init__(self, channels_in: int, channels_out: int, kernel: Triple, stride: Triple) -> None:
        super().__init__()
        self.conv1 = ConvNorm(channels_in, channels_out, kernel, stride)
        self.conv2 = ConvNorm(channels_out, channels_out, kernel)
        self.act = nn.LeakyReLU(SLOPE, inplace=True)
        pool = nn.Identity() if set(stride) == {1} else nn.AvgPool3d(stride, stride)
        project = nn.Identity() if channels_in == channels_out else _project(channels_in, channels_out)
        self.skip = nn.Sequential(pool, project)

    def forward(self, x: Tensor) -> Tensor:
        """Return act(conv2(act(conv1(x))) + skip(x))."""
        out: Tensor = self.act(self.conv2(self.act(self.conv1(x))) + self.skip(x))
        return out


class UpStage(nn.Module):
    """Upsample by the stride, concatenate the skip, then one convolution."""

    def __init__(self, below: int, channels: int, kernel: Triple, stride: Triple) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(below, channels, stride, stride)
        self.conv = ConvNorm(2 * channels, channels, kernel)
        self.act = nn.LeakyReLU(SLOPE, inplace=True)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Return act(conv(the upsampled input concatenated with the skip))."""
        out: Tensor = self.act(self.conv(torch.cat([self.up(x), skip], dim=1)))
        return out


class ResidualUNet(nn.Module):
    """Residual-encoder U-Net with a head at each level of the decoder.

    Args:
        channels_in: channels of the input.
        channels_out: channels of each head's logits.
        widths: channels of each level, the finest first.
        blocks: residual blocks of each level of the encoder; 0 for the finest leaves it the stem alone.
        strides: of each level (slices, rows, columns); the first is (1, 1, 1).
        kernels: of each level (slices, rows, columns), odd.
        heads: how many of the finest levels predict.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        widths: Sequence[int],
        blocks: Sequence[int],
        strides: Sequence[Sequence[int]],
        kernels: Sequence[Sequence[int]],
        heads: int = 1,
    ) -> None:
        super().__init__()
        if not (len(widths) == len(blocks) <= 8 and 0 <= blocks[0] <= 16 and all(1 <= n <= 16 for n in blocks[1:])):
            raise ValueError("a residual U-Net has at most 8 levels of 1 to 16 blocks; the finest may have none")
        steps, taps = [_triple(s) for s in strides], [_triple(k) for k in kernels]
        self.stem = nn.Sequential(ConvNorm(channels_in, widths[0], taps[0]), nn.LeakyReLU(SLOPE, inplace=True))
        self.encoder = nn.ModuleList()
        for before, width, count, kernel, stride in zip(
            (widths[0], *widths[:-1]), widths, blocks, taps, steps, strict=True
        ):
            inputs = [(before, stride), *[(width, (1, 1, 1))] * (count - 1)][:count]
            self.encoder.append(nn.Sequential(*(ResidualBlock(a, width, kernel, step) for a, step in inputs)))
        self.first_head = len(widths) - 1 - heads
        self.decoder, self.heads = nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(len(widths) - 1)):
            self.decoder.append(UpStage(widths[level + 1], widths[level], taps[level], steps[level + 1]))
            self.heads.append(nn.Conv3d(widths[level], channels_out, kernel_size=1))
        self.heads[: self.first_head].requires_grad_(False)  # for nnU-Net's weights alone
        _initialize(self)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Logits of ``x`` (N, channels_in, D, H, W).

        Returns:
            One tensor (N, channels_out, d, h, w) for each level that predicts, the coarsest first.
        """
        skips = [self.stem(x)]
        for stage in self.encoder:
            skips.append(stage(skips[-1]))
        out, logits = skips.pop(), []
        for level, (stage, head) in enumerate(zip(self.decoder, self.heads, strict=True)):
            out = stage(out, skips.pop())
            if level >= self.first_head:
                logits.append(head(out))
        return tuple(logits)


def from_nnunet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of nnU-Net's ``ResidualEncoderUNet`` under the names of ``ResidualUNet``."""
    found = {}
    for name, weight in state.items():
        for pattern, new in NNUNET_NAMES:
            if re.match(pattern, name) and ".all_modules." not in name:
                found[re.sub(pattern, new, name)] = weight
    return found


def _project(channels_in: int, channels_out: int) -> ConvNorm:
    project = ConvNorm(channels_in, channels_out, (1, 1, 1))
    project.conv.bias = None  # the shortcut's convolution has none
    return project


def _initialize(net: nn.Module) -> None:
    """He-normal weights and zero biases; each residual block begins as its shortcut."""
    for module in net.modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            nn.init.kaiming_normal_(module.weight, a=SLOPE)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, ResidualBlock):
            nn.init.zeros_(module.conv2.norm.weight)


def _triple(values: Sequence[int]) -> Triple:
    z, y, x = values
    return z, y, x
