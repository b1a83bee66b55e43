"""Random fields and rotations that the parts of the synthesis share. Grids are (D, H, W); a spacing is in mm."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.nn.functional import avg_pool3d, interpolate

Vector = NDArray[np.float64]


def white(rng: Generator, shape: Sequence[int]) -> Tensor:
    """Independent normal values."""
    return torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32))


def smooth_noise(rng: Generator, shape: Sequence[int], voxels: float | Vector) -> Tensor:
    """Noise of mean 0, deviation 1 and a correlation length of about ``voxels`` (one number, or per axis)."""
    each = np.broadcast_to(voxels, 3)
    noise = white(rng, (1, 1, *(max(3, int(np.ceil(n / v)) + 2) for n, v in zip(shape, each, strict=True))))
    if each.min() >= 3:  # at half the resolution, to round off the edges of trilinear interpolation
        noise = upsampled(noise, [max(4, int(np.ceil(n / 2))) for n in shape])
        noise = avg_pool3d(noise, 3, 1, 1, count_include_pad=False)
    field = upsampled(noise, shape)[0, 0]
    field = field - float(field.numpy().mean())
    return field / (deviation(field) + 1e-6)


def deviation(x: Tensor) -> float:
    """The standard deviation of values of mean 0, by NumPy: a sum by PyTorch depends on the number of threads."""
    return float(np.sqrt(np.square(x.numpy()).mean()))


def upsampled(x: Tensor, shape: Sequence[int], corners: bool = False) -> Tensor:
    """(N, C, D, H, W) interpolated trilinearly to another shape over the same extent; corners: of voxel centres."""
    return interpolate(x, size=list(shape), mode="trilinear", align_corners=corners)


def blur(x: Tensor, sigma: float | Sequence[float] | Vector) -> Tensor:
    """A Gaussian blur; sigma in voxels, one number or per axis."""
    return torch.from_numpy(ndimage.gaussian_filter(x.numpy(), sigma, truncate=2.5))


def box_mean(x: Tensor, voxels: int) -> Tensor:
    """The mean over a cube of an odd number of voxels."""
    return torch.from_numpy(ndimage.uniform_filter(x.numpy(), voxels, mode="nearest"))


def step(x: Tensor, width: float) -> Tensor:
    """A smooth step from 0 (x far below 0) to 1; ``width`` in the units of x."""
    return torch.sigmoid(x / width)


def rotation(rng: Generator, degrees: Sequence[float]) -> Vector:
    """A random rotation (3, 3) about slice, row and column axis, each by at most so many degrees."""
    turned: Vector = Rotation.from_euler("xyz", rng.uniform(-1, 1, 3) * degrees, degrees=True).as_matrix()
    return turned


def any_rotation(rng: Generator) -> Vector:
    """A random rotation or reflection (3, 3), all of them equally likely."""
    q, r = np.linalg.qr(rng.standard_normal((3, 3)))
    turned: Vector = q * np.sign(np.diag(r))
    return turned
