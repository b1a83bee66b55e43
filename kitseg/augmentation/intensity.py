"""Changes of the HU of patches (N, 1, D, H, W), each with one parameter a patch: (N,)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

NATIVE = 30.0  # HU of a kidney without contrast agent
SOFT_TISSUE = 50.0  # HU that a change of contrast leaves as they are
LOW, HIGH = -200.0, 350.0  # HU between which gamma changes them
BYTES_DEVIATION = 147.8  # standard deviation of the sum of four random bytes


def noise(hu: Tensor, deviation: Tensor, key: Tensor) -> Tensor:
    """Add nearly Gaussian noise that is a function of each patch's ``key`` (int32), the same on every device.

    It is the sum of the four bytes of a hash of the voxel's number.
    """
    hashed, key = torch.arange(hu[0].numel(), device=hu.device, dtype=torch.int32), key[:, None].to(torch.int32)
    for shift, factor in ((16, 0x7FEB352D), (15, -0x7B935975), (16, 1)):
        hashed = (hashed ^ key ^ (hashed >> shift) & (1 << (32 - shift)) - 1) * factor
    drawn = hashed.view(torch.uint8).view(*hashed.shape, 4).sum(2, dtype=torch.int32) - 510
    return hu + (drawn / BYTES_DEVIATION).view(hu.shape) * _each(deviation)


def blur(hu: Tensor, deviation: Tensor) -> Tensor:
    """Gaussian blur with a standard deviation of up to about a voxel."""
    away = torch.arange(-2, 3, device=hu.device)
    weights = (-(away.square()) / (2 * deviation[:, None].square())).exp()
    weights = weights / weights.sum(1, keepdim=True)
    for axis in (2, 3, 4):
        n, padding = hu.shape[axis], [2 if place // 2 == 4 - axis else 0 for place in range(6)]
        padded = functional.pad(hu, padding, mode="replicate")
        hu = sum((_each(weights[:, k]) * padded.narrow(axis, k, n) for k in range(5)), torch.zeros_like(hu))
    return hu


def coarser(hu: Tensor, factor: Tensor) -> Tensor:
    """As if acquired with voxels that are larger by the factors (N, 3) of each axis."""
    found = []
    for patch, by in zip(hu, factor.tolist(), strict=True):
        size = [max(1, round(n / f)) for n, f in zip(hu.shape[2:], by, strict=True)]
        small = functional.interpolate(patch[None], size=size, mode="area")
        found.append(functional.interpolate(small, size=hu.shape[2:], mode="trilinear"))
    return torch.cat(found)


def contrast(hu: Tensor, factor: Tensor) -> Tensor:
    """Multiply the distance from soft tissue."""
    return (hu - SOFT_TISSUE) * _each(factor) + SOFT_TISSUE


def brightness(hu: Tensor, shift: Tensor) -> Tensor:
    """Add HU."""
    return hu + _each(shift)


def gamma(hu: Tensor, exponent: Tensor) -> Tensor:
    """Raise the HU between -200 and 350, scaled to 0 to 1, to a power; others stay."""
    scaled = ((hu - LOW) / (HIGH - LOW)).clamp(0, 1)
    return hu + (HIGH - LOW) * (scaled ** _each(exponent) - scaled)


def phase(hu: Tensor, label: Tensor, factor: Tensor) -> Tensor:
    """Multiply the enhancement of kidneys and masses, their HU above 30, as another contrast phase would.

    What doesn't enhance (cysts, necrosis, a native scan) stays. The order of brighter and darker tissue stays, too.
    """
    width = [3 if n > 2 else 1 for n in hu.shape[2:]]
    inside = functional.avg_pool3d((label > 0).float(), width, 1, [n // 2 for n in width], count_include_pad=False)
    return hu + inside * _each(factor - 1) * (hu - NATIVE).clamp(min=0)


def _each(parameter: Tensor) -> Tensor:
    return parameter.view(-1, 1, 1, 1, 1)
