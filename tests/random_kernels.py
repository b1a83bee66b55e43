"""Convolutions of random shapes by the kernels beside PyTorch in float64: ``python random_kernels.py COUNT [SEED]``."""

from __future__ import annotations

import random
import sys

import torch
from test_native import error as allowed
from test_native import exact, kernel, leaky, noise
from torch import nn

from kitseg.native import library
from kitseg.native.arena import Arena
from kitseg.native.layers import Layer
from kitseg.native.winograd import KINDS, Convolution


def draw_product(dice: random.Random) -> tuple[float, str]:
    """One convolution with a stride, or transposed, with a norm or an activation; its error as a fraction."""
    torch.set_num_threads(dice.randint(1, 3))
    lanes = dice.choice([n for n in library.WIDTHS if n <= WIDEST])
    library.lanes = lambda: lanes
    images, most = dice.choice([1, 1, 2]), dice.choice([4, 70])
    inputs, outputs, flat, up = dice.randint(1, most), dice.randint(1, most), dice.random() < 0.3, dice.random() < 0.4
    axes = 2 if flat else 3
    steps = [dice.randint(1, 3) for _ in range(axes)]
    size = steps if up else [dice.randint(1, 5) for _ in range(axes)]
    pads = [0 if up else dice.randint(0, n - 1) for n in size]
    kind = ((nn.Conv3d, nn.Conv2d), (nn.ConvTranspose3d, nn.ConvTranspose2d))[up][flat]
    module = kind(inputs, outputs, size, steps, pads, bias=dice.random() < 0.5).double().requires_grad_(False)
    shape = [max(dice.randint(1, 14), n - 2 * pad) for n, pad in zip(size, pads, strict=True)]
    x, act = noise(images, inputs, *shape, seed=dice.randrange(10**9)), nn.LeakyReLU(0.1)
    expected = module(x.double())
    norm = dice.random() < 0.5 and expected[0, 0].numel() > 8
    norm = (nn.InstanceNorm2d if flat else nn.InstanceNorm3d)(outputs) if norm else None
    expected = act(expected if norm is None else norm(expected))
    error = (Layer(module.float(), norm, act, None, Arena())(x) - expected).abs().max()
    return float(error / 5e-4), f"{module}: {images} x {shape}, {norm}, {lanes} lanes"


def draw(dice: random.Random) -> tuple[float, str]:
    """One convolution: its largest error, as a fraction of what is allowed, and what it was."""
    kind = dice.choice(KINDS)
    most = dice.choice([4, 40])
    images, inputs, outputs = dice.choice([1, 1, 2]), dice.randint(1, most), dice.randint(1, most)
    size = [dice.randint(1, 12) for _ in range(3)]
    replicate, biased, moments = (dice.random() < 0.5 for _ in range(3))
    torch.set_num_threads(dice.randint(1, 3))
    lanes = dice.choice([n for n in library.WIDTHS if n <= WIDEST])
    library.lanes = lambda: lanes
    x, weight = noise(images, inputs, *size, seed=dice.randrange(10**9)), kernel(kind, inputs, outputs)
    bias, slope = (noise(outputs, seed=1), noise(outputs, seed=2)) if biased else (None, None)
    layer, expected = Convolution(weight, (kind,), bias, slope, replicate), exact(x, weight, bias, replicate)
    found = layer(x, Arena())
    error = (found - (leaky(expected, slope) if slope is not None else expected)).abs().max()
    if moments and images == 1:
        _, mean, variance = layer.with_moments(x, Arena())
        whole = expected[0].flatten(1)
        error = max(error, (mean - whole.mean(1)).abs().max(), (variance - whole.var(1, unbiased=False)).abs().max())
    what = f"{kind.number}: {images} x {inputs} -> {outputs}, {size}, replicate {replicate}, {lanes} lanes"
    return float(error / allowed(kind)), what


if __name__ == "__main__":
    count, dice = int(sys.argv[1]), random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    WIDEST = library.lanes()
    if not WIDEST:
        sys.exit("the kernels are not compiled")
    worst = max((draw_product if dice.random() < 0.4 else draw)(dice) for _ in range(count))
    print(f"{count} convolutions; largest error {worst[0]:.2f} of what is allowed ({worst[1]})")
    sys.exit(worst[0] > 1)
