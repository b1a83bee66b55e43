"""UNet++ (Zhou et al. 2018) with deep supervision, the second network of the guided UNet++ paper (section 2).

Tensors are (N, C, H, W); H and W are multiples of 16 (four poolings).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kitseg.nets.unet import he_normal

LEVELS = 5


class ConvBlock(nn.Sequential):
    """Two blocks of conv 3², ReLU and dropout; padded to preserve H and W. No norm, as in the authors' code."""

    def __init__(self, channels_in: int, channels_out: int, dropout: float) -> None:
        layers: list[nn.Module] = []
        for channels in (channels_in, channels_out):
            conv = nn.Conv2d(channels, channels_out, kernel_size=3, padding=1)
            layers += [conv, nn.ReLU(inplace=True), nn.Dropout(dropout)]
        super().__init__(*layers)


class NestedNode(nn.Module):
    """Node X(i, j), j ≥ 1: concatenates the j earlier nodes of its level and the upsampled node X(i + 1, j − 1).

    j times (N, C, H, W) and (N, 2C, H/2, W/2) -> (N, C, H, W).
    """

    def __init__(self, channels: int, skips: int, dropout: float) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(2 * channels, channels, kernel_size=2, stride=2)
        self.convs = ConvBlock((skips + 1) * channels, channels, dropout)

    def forward(self, skips: list[Tensor], below: Tensor) -> Tensor:
        """Return convs(skips concatenated with the upsampled node below)."""
        out: Tensor = self.convs(torch.cat([*skips, self.up(below)], dim=1))
        return out


class UNetPlusPlus(nn.Module):
    """UNet++ L4: five levels, ten nested nodes, four heads. Weights are He-normal · √(1 − dropout), biases zero.

    Args:
        channels_in: channels of the input.
        classes: channels of each head's logits.
        width: channels at full resolution (32 in the paper; then 64-128-256-512).
        dropout: dropout probability after each convolution.
    """

    def __init__(self, channels_in: int = 3, classes: int = 3, width: int = 32, dropout: float = 0.5) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(LEVELS)]
        inputs = [channels_in, *widths[:-1]]
        self.backbone = nn.ModuleList(ConvBlock(a, b, dropout) for a, b in zip(inputs, widths, strict=True))
        self.pool = nn.MaxPool2d(2)
        self.nested = nn.ModuleDict(
            {f"{i},{j}": NestedNode(widths[i], j, dropout) for i in range(LEVELS - 1) for j in range(1, LEVELS - i)}
        )
        self.heads = nn.ModuleList(nn.Conv2d(width, classes, kernel_size=1) for _ in range(LEVELS - 1))
        he_normal(self, dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Logits of the slices ``x`` (N, channels_in, H, W): four tensors (N, classes, H, W).

        Returns:
            The logits of L1 to L4: of the nodes X(0, 1) to X(0, 4). Inference uses the last.
        """
        levels = [[self.backbone[0](x)]]
        for depth in range(1, LEVELS):
            levels.append([self.backbone[depth](self.pool(levels[-1][0]))])
            for i in range(depth - 1, -1, -1):
                levels[i].append(self.nested[f"{i},{depth - i}"](levels[i], levels[i + 1][-1]))
        return tuple(head(node) for head, node in zip(self.heads, levels[0][1:], strict=True))
