"""ResNet (He et al. 2015) as the classifier of slices with and without foreground (two-stage paper, section 2.1)."""

from __future__ import annotations

from torch import Tensor, nn

from kitseg.nets.unet import he_normal

#: Residual blocks at each of the four resolutions, by depth.
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


def conv_norm(channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution without bias, then BatchNorm; padded, so that only the stride reduces the grid."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(channels_out),
    )


class ResidualBlock(nn.Module):
    """ReLU(body(x) + shortcut(x)): (N, in, H, W) -> (N, out, H/stride, W/stride).

    Basic: two 3×3 convolutions, ``width`` channels out. Bottleneck: 1×1, 3×3 and 1×1, 4·``width`` channels out, with
    the stride in the 3×3, as in current implementations; in He et al. it is in the first 1×1. If the shape changes, the
    shortcut is a 1×1 convolution with BatchNorm.
    """

    def __init__(self, channels_in: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        channels_out = 4 * width if bottleneck else width
        if bottleneck:
            convs = [
                conv_norm(channels_in, width, 1),
                conv_norm(width, width, 3, stride),
                conv_norm(width, channels_out, 1),
            ]
        else:
            convs = [conv_norm(channels_in, width, 3, stride), conv_norm(width, width, 3)]
        self.relu = nn.ReLU(inplace=True)
        self.body = nn.Sequential(*(layer for conv in convs for layer in (conv, self.relu)))[:-1]
        same = channels_in == channels_out and stride == 1
        self.shortcut = nn.Identity() if same else conv_norm(channels_in, channels_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return ReLU(body(x) + shortcut(x))."""
        out: Tensor = self.relu(self.body(x) + self.shortcut(x))
        return out


class ResNet(nn.Module):
    """ResNet-18, -34 or -50 for slices of any size, with features at 1/4 to 1/32 of it.

    The paper doesn't specify the depth.

    Args:
        depth: 18 or 34 (basic blocks), 50 (bottlenecks).
        channels_in: channels of the input.
        classes: number of logits.
        width: channels of the stem and of the first blocks (64 in He et al.; then 128-256-512, fourfold after a
            bottleneck).

    Raises:
        ValueError: unknown depth.
    """

    def __init__(self, depth: int = 18, channels_in: int = 1, classes: int = 2, width: int = 64) -> None:
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(f"a ResNet's depth must be 18, 34 or 50, not {depth}")
        self.stem = nn.Sequential(
            conv_norm(channels_in, width, 7, stride=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )
        self.stages = nn.Sequential()
        channels = width
        for i, count in enumerate(BLOCKS[depth]):
            stage = nn.Sequential()
            for k in range(count):
                stage.append(ResidualBlock(channels, width * 2**i, 2 if i and not k else 1, depth == 50))
                channels = width * 2**i * (4 if depth == 50 else 1)
            self.stages.append(stage)
        self.head = nn.Linear(channels, classes)
        he_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of the slices ``x`` (N, channels_in, H, W)."""
        logits: Tensor = self.head(self.stages(self.stem(x)).mean(dim=(2, 3)))
        return logits
