"""The network that every side of a window row runs, and the weights that blend windows; needs PyTorch alone.

It has the shape of nnU-Net's default 3D U-Net: six levels of 32 to 320 channels, two convolutions each, instance norm.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

WINDOW, OVERLAP, CLASSES = (64, 192, 192), 0.5, 3
REGION = (96, 288, 288)  # two windows along each axis: every tool puts them at the same places
WIDTHS = (32, 64, 128, 256, 320, 320)


class UNet(nn.Module):
    """(N, 1, d, h, w) to logits (N, CLASSES, d, h, w)."""

    def __init__(self) -> None:
        super().__init__()
        strides = [(1, 1, 1), *[(2, 2, 2)] * 4, (1, 2, 2)]
        ins = (1, *WIDTHS[:-1])
        self.down = nn.ModuleList(_block(i, w, s) for i, w, s in zip(ins, WIDTHS, strides, strict=True))
        pairs = list(zip(WIDTHS[:0:-1], WIDTHS[-2::-1], strides[:0:-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose3d(i, o, s, s) for i, o, s in pairs)
        self.merge = nn.ModuleList(_block(2 * o, o, (1, 1, 1)) for _, o, _ in pairs)
        self.last = nn.Conv3d(WIDTHS[0], CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, skips[-2::-1], strict=True):
            x = merge(torch.cat([up(x), skip], 1))
        return self.last(x)


def load(work: Path) -> nn.Module:
    """The trained network as a function to class probabilities."""
    net = UNet()
    net.load_state_dict(torch.load(work / "network.pt", weights_only=True))
    return nn.Sequential(net, nn.Softmax(1)).eval().requires_grad_(False)


def region(work: Path) -> Tensor:
    """The image (1, D, H, W) that is predicted, scaled as in training."""
    return torch.load(work / "region.pt", weights_only=True)["image"]


def hann(size: tuple[int, ...]) -> Tensor:
    """Blending weights of a window."""
    z, y, x = (torch.hann_window(n + 2, periodic=False)[1:-1] for n in size)
    return z[:, None, None] * y[:, None] * x


def train(work: Path, steps: int) -> None:
    """A few steps on parts of the region, so that labels are not those of random weights."""
    torch.manual_seed(0)
    net, data = UNet(), torch.load(work / "region.pt", weights_only=True)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    inside = data["label"].nonzero()
    for step in range(steps):
        centre = inside[torch.randint(len(inside), ())] if step % 2 else torch.tensor(REGION) // 2
        corner = [int(min(max(c - n // 2, 0), s - n)) for c, n, s in zip(centre, (32, 96, 96), REGION, strict=True)]
        place = tuple(slice(a, a + n) for a, n in zip(corner, (32, 96, 96), strict=True))
        logits = net(data["image"][(slice(None), *place)][None])
        loss = nn.functional.cross_entropy(logits, data["label"][place][None].long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.save(net.state_dict(), work / "network.pt")


def _block(channels_in: int, channels: int, stride: tuple[int, int, int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for into, step in ((channels_in, stride), (channels, (1, 1, 1))):
        norm = nn.InstanceNorm3d(channels, affine=True)
        layers += [nn.Conv3d(into, channels, 3, step, 1), norm, nn.LeakyReLU(inplace=True)]
    return nn.Sequential(*layers)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args()
    train(given.work, given.steps)
