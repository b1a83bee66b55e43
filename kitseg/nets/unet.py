"""U-Net (Ronneberger et al. 2015) as the two-stage paper (section 2.2) and the dual U-Net paper (section 2.1) use it.

Tensors are (N, C, H, W); H and W are multiples of 16 (four poolings).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def he_normal(net: nn.Module, dropout: float = 0.0) -> None:
    """Initialize all 2D convolutions, also transposed ones, with He-normal weights (fan-in) and zero biases.

    dropout: of the inputs of the convolutions, which multiplies their second moment in training by 1 / (1 − dropout);
    the weights are scaled by √(1 − dropout), so that it stays the same from layer to layer.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and not module.weight.is_meta:  # which would import sympy
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            module.weight.data *= (1 - dropout) ** 0.5
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class DoubleConv(nn.Sequential):
    """Two blocks of conv 3², BatchNorm and ReLU; padded to preserve H and W. No bias, because BatchNorm has a shift."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        layers: list[nn.Module] = []
        for channels in (channels_in, channels_out):
            conv = nn.Conv2d(channels, channels_out, kernel_size=3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True)]
        super().__init__(*layers)


class UpStage(nn.Module):
    """Double the grid, halve the channels, concatenate the skip: (N, 2C, H, W) and (N, C, 2H, 2W) -> (N, C, 2H, 2W)."""

    def __init__(self, channels_out: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(2 * channels_out, channels_out, kernel_size=2, stride=2)
        self.convs = DoubleConv(2 * channels_out, channels_out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Return convs(skip concatenated with the upsampled input)."""
        out: Tensor = self.convs(torch.cat([skip, self.up(x)], dim=1))
        return out


class UNet(nn.Module):
    """U-Net with five levels, padded convolutions and BatchNorm.

    Weights are He-normal and biases zero (dual U-Net paper, section 2.1.1: Gaussian weights, zero biases).

    Args:
        channels_in: channels of the input.
        classes: channels of the logits.
        width: channels at full resolution (64 in the paper; then 128-256-512-1024).
    """

    def __init__(self, channels_in: int = 1, classes: int = 3, width: int = 64) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(5)]
        inputs = [channels_in, *widths[:-1]]
        self.downs = nn.ModuleList(DoubleConv(a, b) for a, b in zip(inputs, widths, strict=True))
        self.pool = nn.MaxPool2d(2)
        self.ups = nn.ModuleList(UpStage(w) for w in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, classes, kernel_size=1)
        he_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes, H, W) of the slices ``x`` (N, channels_in, H, W)."""
        skips = [self.downs[0](x)]
        for stage in self.downs[1:]:
            skips.append(stage(self.pool(skips[-1])))
        out = skips.pop()
        for stage in self.ups:
            out = stage(out, skips.pop())
        logits: Tensor = self.head(out)
        return logits
