"""Another scanner: calibration, kernel, dose, slice thickness, streaks, field of view, table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from kitseg.augmentation import intensity
from kitseg.synthesis.fields import Vector, blur, deviation, upsampled, white
from kitseg.synthesis.habitus import AIR

THICKEST = 5.0  # mm
OFFSET, FAR_OFF = (-5.0, 5.0), (-30.0, 20.0)  # HU, of the calibration of most scanners, and of FAR_OFF_SHARE
FAR_OFF_SHARE = 0.2


def scan(hu: Tensor, spacing: Vector, rng: Generator) -> Tensor:
    """HU (D, H, W) as another scanner would show them; each of the changes at random."""
    offset = rng.uniform(*(FAR_OFF if rng.random() < FAR_OFF_SHARE else OFFSET))
    hu = hu * float(rng.uniform(0.97, 1.03)) + offset
    draw = rng.random()
    if draw < 0.3:
        hu = blur(hu, rng.uniform(0.4, 1.3) / spacing)
    elif draw < 0.42:
        hu = hu + float(rng.uniform(0.3, 1.0)) * (hu - blur(hu, 1.0 / spacing))
    if rng.random() < 0.6:
        hu = hu + dose_noise(hu.shape, spacing, rng) * abs(float(rng.normal(0, 12)))
    if rng.random() < 0.12:
        hu = streaks(hu, spacing, rng)
    if rng.random() < 0.45 and spacing[0] < THICKEST:
        hu = thick_slices(hu, float(rng.uniform(spacing[0], THICKEST)) / spacing[0])
    return gamma(hu, rng) if rng.random() < 0.15 else hu


def dose_noise(shape: Sequence[int], spacing: Vector, rng: Generator) -> Tensor:
    """Noise of standard deviation 1, white or with the in-plane grain of a smooth kernel."""
    noise = white(rng, shape)
    if rng.random() < 0.6:
        grain = rng.uniform(0.5, 1.2)
        noise = blur(noise, [0.5 * grain / spacing[0], grain / spacing[1], grain / spacing[2]])
        noise = noise / deviation(noise)
    return noise


def thick_slices(hu: Tensor, voxels: float) -> Tensor:
    """Slices averaged over so many voxels, at that distance, and interpolated back."""
    if voxels < 1.15:
        return hu
    few = [max(2, round(len(hu) / voxels)), *hu.shape[1:]]
    coarse = upsampled(blur(hu, [0.35 * voxels, 0, 0])[None, None], few)
    return upsampled(coarse, hu.shape)[0, 0]


def streaks(hu: Tensor, spacing: Vector, rng: Generator) -> Tensor:
    """Fine streaks of one direction in some slices, as of arms beside the body or of a lack of photons."""
    slices, rows, columns = hu.shape
    angle = rng.normal(0, 0.25)  # mostly along the rows
    y = torch.arange(rows, dtype=torch.float32)[:, None] * float(spacing[1] * np.cos(angle))
    x = torch.arange(columns, dtype=torch.float32)[None] * float(spacing[2] * np.sin(angle))
    line = (y + x) / float(rng.uniform(1.0, 2.5))
    low = torch.floor(line - line.min()).long()
    profile = blur(white(rng, (slices, int(low.max()) + 2)), [0.8 / spacing[0], 0.7])
    share = line - line.min() - low
    pattern = profile[:, low] * (1 - share) + profile[:, low + 1] * share
    strength = blur(white(rng, (slices,)), [10 / spacing[0]]).abs()
    strength = strength / strength.max() * float(rng.uniform(8, 30))
    return hu + strength[:, None, None] * pattern * (hu > -400)


def gamma(hu: Tensor, rng: Generator) -> Tensor:
    """HU (D, H, W) on another curve."""
    return intensity.gamma(hu[None, None], hu.new_tensor([np.exp(rng.uniform(-0.2, 0.2))]))[0, 0]


def out_of_view(points: Tensor, size: Vector, rng: Generator) -> Tensor:
    """Where a smaller field of view shows air, outside a circle in the plane of the slices.

    points: (3, D, H, W) mm in a body of this size in mm.
    """
    centre = size[1:] / 2 + rng.normal(0, 12, 2)
    radius = float(rng.uniform(0.36, 0.52) * size[1:].max())
    r2 = (points[1] - centre[0]) ** 2 + (points[2] - centre[1]) ** 2
    outside: Tensor = r2 > radius**2
    return outside


def table(hu: Tensor, points: Tensor, back: float, width: float, rng: Generator) -> Tensor:
    """A table's two curved shells in the air below the back; points (3, D, H, W), back and width of the body: mm."""
    across = (points[2] - width / 2) / rng.uniform(400, 1200)
    depth = points[1] - back - rng.uniform(3, 12) + across * (points[2] - width / 2)
    apart, shell = rng.uniform(20, 60), rng.uniform(1.5, 3.0)
    wall = torch.exp(-((depth / shell) ** 2)) + torch.exp(-(((depth - apart) / shell) ** 2))
    filling = ((depth > 0) & (depth < apart)).float() * float(rng.uniform(20, 90))
    made = AIR + filling + wall.clamp(max=1) * float(rng.uniform(400, 1000))
    return torch.where((hu < -600) & (depth > -3), torch.maximum(hu, made), hu)
