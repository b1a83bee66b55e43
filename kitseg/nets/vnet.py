"""V-Net (Milletari et al. 2016) as in the two-phase paper, and the fused V-Nets of its second phase.

Tensors are (N, C, D, H, W); D, H and W are multiples of 16 (four down stages).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


def block(conv: nn.Conv3d | nn.ConvTranspose3d) -> nn.Sequential:
    """Convolution, InstanceNorm, PReLU. The paper's BatchNorm is replaced because the batch is 1."""
    return nn.Sequential(conv, nn.InstanceNorm3d(conv.out_channels, affine=True), nn.PReLU(conv.out_channels))


def blocks(width: int, count: int) -> nn.Sequential:
    """Blocks with a convolution 5³ of ``width`` channels; they preserve the shape."""
    return nn.Sequential(*(block(nn.Conv3d(width, width, kernel_size=5, padding=2)) for _ in range(count)))


class ThinConv(nn.Conv3d):
    """A convolution with few output channels: (N, C, D, H, W) -> (N, out, D, H, W), preserves the shape.

    CPUs compute 16 output channels even for 3. Here the taps along the rows become channels, which are shifted and
    summed: 5 x 3 channels of 25 taps instead of 3 (16) of 125, with equal results except for rounding.
    """

    computes_as_pytorch = True  # for kitseg.native

    def __init__(self, channels_in: int, channels_out: int, kernel_size: int = 5) -> None:
        super().__init__(channels_in, channels_out, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve; on a GPU and in training by the standard implementation."""
        if self.training or x.is_cuda or self.bias is None:
            return super().forward(x)
        taps = self.weight.movedim(4, 0).flatten(0, 1)[..., None]
        maps = functional.conv3d(x, taps, padding=self.kernel_size[0] // 2)
        out = self.bias[:, None, None, None]
        for shift, tap in enumerate(maps.chunk(self.kernel_size[0], dim=1)):
            out = out + tap[..., shift : shift + x.shape[-1]]
        return out


class InputStage(nn.Module):
    """Conv 5³ to ``width`` channels plus the input tiled to ``width`` channels: (N, C, ...) -> (N, width, ...)."""

    def __init__(self, channels_in: int, width: int) -> None:
        super().__init__()
        if width % channels_in:
            raise ValueError(f"{channels_in} input channels can't be tiled to a width of {width}")
        self.copies = width // channels_in
        self.conv = nn.Conv3d(channels_in, width, kernel_size=5, padding=2)
        self.norm = nn.InstanceNorm3d(width, affine=True)
        self.act = nn.PReLU(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return act(norm(conv(x)) + tiled x)."""
        out: Tensor = self.act(self.norm(self.conv(x)) + x.repeat(1, self.copies, 1, 1, 1))
        return out


class DownStage(nn.Module):
    """Halve the grid, double the channels, then ``convs`` residual convolutions.

    (N, C, D, H, W) -> (N, 2C, D/2, H/2, W/2).
    """

    def __init__(self, channels_in: int, convs: int, dropout: float) -> None:
        super().__init__()
        width = 2 * channels_in
        self.down = block(nn.Conv3d(channels_in, width, kernel_size=2, stride=2))
        self.dropout = nn.Dropout3d(dropout)
        self.convs = blocks(width, convs)
        self.act = nn.PReLU(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return act(convs(dropout(down)) + down)."""
        down = self.down(x)
        out: Tensor = self.act(self.convs(self.dropout(down)) + down)
        return out


class UpStage(nn.Module):
    """Double the grid and concatenate the skip: (N, C, D, H, W) and (N, out/2, 2D, 2H, 2W) -> (N, out, 2D, 2H, 2W)."""

    def __init__(self, channels_in: int, channels_out: int, convs: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout3d(dropout)
        self.up = block(nn.ConvTranspose3d(channels_in, channels_out // 2, kernel_size=2, stride=2))
        self.convs = blocks(channels_out, convs)
        self.act = nn.PReLU(channels_out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Return act(convs(joined) + joined), where joined is the upsampled input concatenated with the skip."""
        joined = torch.cat([self.up(self.dropout(x)), skip], dim=1)
        out: Tensor = self.act(self.convs(joined) + joined)
        return out


class VNet(nn.Module):
    """V-Net with four down and four up stages.

    Args:
        channels_in: channels of the input; ``width`` is a multiple of it.
        classes: channels of the logits.
        width: channels at full resolution (16 in the paper; then 32-64-128-256).
        down: convolutions per down stage, in the order of the data flow, as in the V-Net paper's figure.
        up: convolutions per up stage, in the order of the data flow.
        dropout: channel dropout at the two deepest down and up stages.
        checkpointing: recompute activations in the backward pass to save memory.
    """

    def __init__(
        self,
        channels_in: int = 1,
        classes: int = 3,
        width: int = 16,
        down: Sequence[int] = (2, 3, 3, 3),
        up: Sequence[int] = (3, 3, 2, 1),
        dropout: float = 0.5,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if not all(0 <= convs <= 16 for convs in (*down, *up)):
            raise ValueError("a stage of a V-Net has at most 16 convolutions")
        drops = (0.0, 0.0, dropout, dropout)
        widths_up = (16 * width, 8 * width, 4 * width, 2 * width)
        inputs_up = (16 * width, *widths_up[:3])
        self.checkpointing = checkpointing
        self.input = InputStage(channels_in, width)
        self.downs = nn.ModuleList(
            DownStage(width * 2**i, n, p) for i, (n, p) in enumerate(zip(down, drops, strict=True))
        )
        self.ups = nn.ModuleList(
            UpStage(a, b, n, p) for a, b, n, p in zip(inputs_up, widths_up, up, reversed(drops), strict=True)
        )
        self.head = nn.Sequential(
            ThinConv(2 * width, classes),  # no norm here: see docs/methods/two-phase.md
            nn.PReLU(classes),
            nn.Conv3d(classes, classes, kernel_size=1),
        )

    def forward(self, x: Tensor, guidance: Sequence[Tensor] = ()) -> tuple[Tensor, list[Tensor]]:
        """Logits and the four decoder feature maps, deepest first.

        Args:
            x: (N, channels_in, D, H, W).
            guidance: another V-Net's decoder maps, added to this one's before the next up stage (two-phase, Fig. 4).

        Returns:
            (N, classes, D, H, W) and maps at 1/8, 1/4, 1/2 and full resolution.
        """
        skips = [self._run(self.input, x)]
        for stage in self.downs:
            skips.append(self._run(stage, skips[-1]))
        out, features = skips.pop(), []
        for i, stage in enumerate(self.ups):
            out = self._run(stage, out, skips.pop())
            if guidance:
                out = out + guidance[i]
            features.append(out)
        return self._run(self.head, out), features

    def _run(self, stage: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        if self.checkpointing and self.training:
            out: Tensor = checkpoint(stage, *inputs, use_reentrant=False)
            return out
        return stage(*inputs)


class FusedVNet(nn.Module):
    """Two V-Nets in sequence (two-phase paper, section 3.3 and Fig. 4).

    V-Net₁ takes the ROI. V-Net₂ takes the ROI concatenated with V-Net₁'s softmax, and V-Net₁'s decoder maps are added
    to its own.

    Args:
        first: takes (N, 1, D, H, W). second: takes (N, 1 + classes, D, H, W).
    """

    def __init__(self, first: VNet, second: VNet) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of both networks for the ROI ``x`` (N, 1, D, H, W): twice (N, classes, D, H, W)."""
        logits, features = self.first(x)
        fused, _ = self.second(torch.cat([x, logits.softmax(dim=1)], dim=1), features)
        return logits, fused
