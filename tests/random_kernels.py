"""Convolutions of random shapes by the kernels beside PyTorch in float64: ``python random_kernels.py COUNT [SEED]``."""

from __future__ import annotations

import random
import sys

import torch
from test_native import exact, kernel, leaky, noise

from kitseg.native import library
from kitseg.native.arena import Arena
from kitseg.native.winograd import KINDS, Convolution


def draw(dice: random.Random) -> tuple[float, str]:
    """One convolution: its largest error, in deviations of the output, and what it was."""
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
    layer, expected = Convolution(weight, kind, bias, slope, replicate), exact(x, weight, bias, replicate)
    found = layer(x, Arena())
    error = (found - (leaky(expected, slope) if slope is not None else expected)).abs().max()
    if moments and images == 1:
        _, mean, variance = layer.with_moments(x, Arena())
        whole = expected[0].flatten(1)
        error = max(error, (mean - whole.mean(1)).abs().max(), (variance - whole.var(1, unbiased=False)).abs().max())
    return float(
        error
    ), f"{kind.number}: {images} x {inputs} -> {outputs}, {size}, replicate {replicate}, {lanes} lanes"


if __name__ == "__main__":
    count, dice = int(sys.argv[1]), random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    WIDEST = library.lanes()
    if not WIDEST:
        sys.exit("the kernels are not compiled")
    worst = max(draw(dice) for _ in range(count))
    print(f"{count} convolutions; largest error {worst[0]:.1e} ({worst[1]})")
    sys.exit(worst[0] > 5e-4)
