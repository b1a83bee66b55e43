"""Attention U-Net with a four-scale input and deep supervision (progressive paper, section 1, Figure 1).

The base is the network of Abraham and Khan 2019, with its BatchNorm; the paper adds the gate at full resolution.

Tensors are (N, C, H, W); H and W are multiples of 16 (four poolings).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kitseg.nets.unet import DoubleConv


class AttentionGate(nn.Module):
    """Attention gate: weighs each 2×2 cell of the skip by the features of the level below.

    skip (N, C, H, W) and below (N, B, H/2, W/2) -> (N, C, H, W).

    Args:
        channels: channels of the skip, C.
        below: channels of the level below, B.
        width: channels of the space in which the two are compared.
    """

    def __init__(self, channels: int, below: int, width: int) -> None:
        super().__init__()
        self.signal = nn.Sequential(
            nn.Conv2d(below, below, kernel_size=1, bias=False), nn.BatchNorm2d(below), nn.ReLU(inplace=True)
        )
        self.theta = nn.Conv2d(channels, width, kernel_size=2, stride=2)
        self.phi = nn.Sequential(
            nn.Conv2d(below, width, kernel_size=1), nn.ConvTranspose2d(width, width, kernel_size=3, padding=1)
        )
        self.psi = nn.Sequential(
            nn.ReLU(inplace=True), nn.Conv2d(width, 1, kernel_size=1), nn.Sigmoid(), nn.Upsample(scale_factor=2)
        )
        self.out = nn.Sequential(nn.Conv2d(channels, channels, kernel_size=1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, skip: Tensor, below: Tensor) -> Tensor:
        """Return out(skip · psi(theta(skip) + phi(signal(below))))."""
        attention = self.psi(self.theta(skip) + self.phi(self.signal(below)))
        out: Tensor = self.out(skip * attention)
        return out


class InputStage(nn.Module):
    """Concatenates a coarser input with pooled features: (N, channels_in, H, W) and (N, C, 2H, 2W) -> (N, 2C, H, W)."""

    def __init__(self, channels_in: int, features: int) -> None:
        super().__init__()
        width = 2 * features
        self.scale = nn.Sequential(nn.Conv2d(channels_in, width, kernel_size=3, padding=1), nn.ReLU(inplace=True))
        self.pool = nn.MaxPool2d(2)
        self.convs = DoubleConv(width + features, width)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        """Return convs(scale(x) concatenated with the pooled features)."""
        out: Tensor = self.convs(torch.cat([self.scale(x), self.pool(features)], dim=1))
        return out


class UpStage(nn.Module):
    """Concatenates upsampled features and the gated skip: (N, B, H/2, W/2) and (N, C, H, W) -> (N, up + C, H, W)."""

    def __init__(self, below: int, channels: int, up: int, gate: int) -> None:
        super().__init__()
        self.gate = AttentionGate(channels, below, gate)
        self.up = nn.Sequential(
            nn.ConvTranspose2d(below, up, kernel_size=3, stride=2, padding=1, output_padding=1), nn.ReLU(inplace=True)
        )

    def forward(self, below: Tensor, skip: Tensor) -> Tensor:
        """Return up(below) concatenated with gate(skip, below)."""
        return torch.cat([self.up(below), self.gate(skip, below)], dim=1)


class AttentionUNet(nn.Module):
    """Attention U-Net with a gate at each of the four levels.

    Args:
        channels_in: channels of the input.
        classes: channels of each output's logits.
        width: channels at full resolution, an even number (32 in the paper; then 64-128-256-512).
    """

    def __init__(self, channels_in: int = 1, classes: int = 3, width: int = 32) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(4)]
        self.shrink = nn.AvgPool2d(2)
        self.first = DoubleConv(channels_in, width)
        self.downs = nn.ModuleList(InputStage(channels_in, w) for w in widths[:-1])
        self.center = nn.Sequential(nn.MaxPool2d(2), DoubleConv(8 * width, 16 * width))
        self.ups, self.heads = nn.ModuleList(), nn.ModuleList()
        below = 16 * width
        for channels, up in zip(reversed(widths), (width, 2 * width, width, width), strict=True):
            self.ups.append(UpStage(below, channels, up, gate=channels // 2))
            below = up + channels
            self.heads.append(nn.Sequential(DoubleConv(below, channels), nn.Conv2d(channels, classes, kernel_size=1)))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Logits of the slices ``x`` (N, channels_in, H, W) at four resolutions.

        Returns:
            (N, classes, H/8, W/8), (…, H/4, W/4), (…, H/2, W/2) and (…, H, W). Inference uses the last.
        """
        skips = [self.first(x)]
        for stage in self.downs:
            x = self.shrink(x)
            skips.append(stage(x, skips[-1]))
        out, logits = self.center(skips[-1]), []
        for stage, head in zip(self.ups, self.heads, strict=True):
            out = stage(out, skips.pop())
            logits.append(head(out))
        return tuple(logits)
