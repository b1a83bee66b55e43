"""The foreground network for kidney and tumor as one class (guided UNet++ paper, section 2, Figure 1).

2D at half resolution, 3D at a quarter and below, 2D in the upper decoder. The paper only has a figure; the layers are
those of the authors' code, except for InstanceNorm: the code's BatchNorm uses each window's own statistics also at
inference, which is equivalent at batch size 1.

Tensors are (N, C, D, H, W); D is a multiple of 4, H and W are multiples of 16, and the window is larger than 4×16×16
voxels: InstanceNorm needs more than one voxel at the deepest stage.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

Kernel = tuple[int, int, int]
SLICE: Kernel = (1, 3, 3)  #: a 2D convolution of each slice, padded with zeros
VOLUME: Kernel = (3, 3, 3)  #: a 3D convolution, padded by replication


def convolution(channels_in: int, channels_out: int, kernel: Kernel, halve: bool = False) -> nn.Conv3d:
    """A convolution without bias that preserves the grid size, or halves it along the axes of a kernel size of 3."""
    pad, stride = (kernel[0] // 2, 1, 1), (1 + kernel[0] // 2, 2, 2) if halve else 1
    conv = nn.Conv3d(channels_in, channels_out, kernel, stride, pad, bias=False)
    conv.padding_mode = "replicate" if kernel == VOLUME else "zeros"
    return conv


def transposed(channels_in: int, channels_out: int, kernel: Kernel, bias: bool = False) -> nn.ConvTranspose3d:
    """A transposed convolution that doubles the grid size along the axes of a kernel size of 3."""
    pad, stride = (kernel[0] // 2, 1, 1), (1 + kernel[0] // 2, 2, 2)
    return nn.ConvTranspose3d(channels_in, channels_out, kernel, stride, pad, output_padding=pad, bias=bias)


class NormReLU(nn.Sequential):
    """InstanceNorm over D, H and W, then ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.InstanceNorm3d(channels, affine=True), nn.ReLU(inplace=True))


def block(conv: nn.Conv3d | nn.ConvTranspose3d) -> nn.Sequential:
    """Convolution, InstanceNorm, ReLU."""
    return nn.Sequential(conv, NormReLU(conv.out_channels))


def space_to_depth(x: Tensor) -> Tensor:
    """Space-to-depth of each slice's 2×2 cells: (N, 1, D, H, W) -> (N, 4, D, H/2, W/2).

    The channels are the cell's upper left, upper right, lower left and lower right pixel.
    """
    return functional.pixel_unshuffle(x.transpose(1, 2), 2).transpose(1, 2)


class DownStage(nn.Module):
    """``entry`` changes grid and channels, followed by a residual block: ReLU(norm(entry + convs(entry))).

    The last of the ``convs`` convolutions has no norm and no ReLU.
    """

    def __init__(self, entry: nn.Module, channels: int, kernel: Kernel, convs: int) -> None:
        super().__init__()
        self.entry = entry
        self.convs = nn.Sequential(
            *(block(convolution(channels, channels, kernel)) for _ in range(convs - 1)),
            convolution(channels, channels, kernel),
        )
        self.act = NormReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return act(entry + convs(entry))."""
        entry = self.entry(x)
        out: Tensor = self.act(entry + self.convs(entry))
        return out


class UpStage(nn.Module):
    """Double the grid, halve the channels and concatenate the skip, with a residual from the transposed convolution.

    (N, 2C, D, H, W) and (N, C, 2D, 2H, 2W) -> (N, C, 2D, 2H, 2W); a 2D kernel preserves D.
    """

    def __init__(self, channels_out: int, kernel: Kernel) -> None:
        super().__init__()
        self.up = block(transposed(2 * channels_out, channels_out, kernel))
        self.convs = nn.Sequential(
            block(convolution(2 * channels_out, channels_out, kernel)), convolution(channels_out, channels_out, kernel)
        )
        self.act = NormReLU(channels_out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Return act(up + convs(up concatenated with skip))."""
        up = self.up(x)
        out: Tensor = self.act(up + self.convs(torch.cat([up, skip], dim=1)))
        return out


class ForegroundNet(nn.Module):
    """Space-to-depth 2D-3D-2D network.

    Args:
        classes: channels of the logits (background and foreground in the paper).
        width: channels at half resolution (32 in the paper; then 64 in 3D at a quarter, 128 and 256 below).
    """

    def __init__(self, classes: int = 2, width: int = 32) -> None:
        super().__init__()
        w2, w4, w8 = 2 * width, 4 * width, 8 * width
        to_3d = nn.Sequential(
            block(convolution(width, width, SLICE, halve=True)), block(convolution(width, w2, VOLUME))
        )
        downs = (
            DownStage(block(convolution(4, width, SLICE)), width, SLICE, convs=1),
            DownStage(to_3d, w2, VOLUME, convs=1),
            DownStage(block(convolution(w2, w4, VOLUME, halve=True)), w4, VOLUME, convs=2),
            DownStage(block(convolution(w4, w8, VOLUME, halve=True)), w8, VOLUME, convs=2),
        )
        self.downs = nn.ModuleList(downs)
        self.ups = nn.ModuleList([UpStage(w4, VOLUME), UpStage(w2, VOLUME), UpStage(width, SLICE)])
        self.head = transposed(width, classes, SLICE, bias=True)
        # P(background) starts at 0.98. Else all features learn to stand for background, and where they are off, in
        # kidneys, a narrow network has no gradient left.
        self.head.bias = nn.Parameter(torch.tensor([2.0] + [-2.0] * (classes - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes, D, H, W) of the window ``x`` (N, 1, D, H, W)."""
        skips = [self.downs[0](space_to_depth(x))]
        for stage in self.downs[1:]:
            skips.append(stage(skips[-1]))
        out = skips.pop()
        for stage in self.ups:
            out = stage(out, skips.pop())
        logits: Tensor = self.head(out)
        return logits
