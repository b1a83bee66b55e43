"""Rotation, scaling and elastic deformation of patches in one resampling of image and label."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from kitseg.types import Triple

CONTROL_POINTS = 6  # of an elastic deformation along each axis
CLASSES = 4  # label ids 0 to 3, which are sampled as one channel each


def rotation(degrees: Sequence[float]) -> Tensor:
    """The matrix (3, 3) that rotates about the axes of slices, rows and columns, in this order."""
    matrix = torch.eye(3)
    for axis, angle in enumerate(torch.deg2rad(torch.tensor(degrees, dtype=torch.float32))):
        one, other = (axis + 1) % 3, (axis + 2) % 3
        turn = torch.eye(3)
        turn[one, one] = turn[other, other] = angle.cos()
        turn[one, other], turn[other, one] = -angle.sin(), angle.sin()
        matrix = turn @ matrix
    return matrix


def sampling_grid(size: Triple, source: Triple, spacing: Tensor, matrix: Tensor, bend: Tensor) -> Tensor:
    """Where each voxel of a patch is found in a larger one with the same centre, for ``functional.grid_sample``.

    Args:
        size: voxels of the patch.
        source: voxels of the larger one.
        spacing: (N, 3) mm.
        matrix: (N, 3, 3), from the patch's millimetres to the source's, about the centre.
        bend: (N, 3, C, C, C), displacements in mm of the control points of a cubic B-spline.

    Returns:
        (N, D, H, W, 3), columns first, from -1 to 1.
    """
    unit = 2 / (spacing * torch.tensor(source, device=spacing.device))  # of grid_sample's coordinate per mm
    matrix = unit[:, :, None] * matrix * spacing[:, None]
    bases = [_basis(n).to(spacing.device) for n in size]
    grid = torch.einsum("ncijk,zi,yj,xk->nczyx", unit[..., None, None, None] * bend, *bases)
    for axis, n in enumerate(size):
        place = torch.arange(n, device=spacing.device) - (n - 1) / 2
        shape = [1, 1, *(n if other == axis else 1 for other in range(3))]
        grid = grid + matrix[:, :, axis, None, None, None] * place.view(shape)
    return grid.flip(1).permute(0, 2, 3, 4, 1)


def resample(values: Tensor, label: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Values (N, C, ...) interpolated linearly, and the label (N, 1, ...) that is then most probable, at ``grid``.

    Outside they continue as at the border.
    """
    classes = torch.arange(1, CLASSES, device=label.device).view(1, -1, 1, 1, 1)
    together = torch.cat([values, (label == classes).to(values.dtype)], dim=1)
    if together.shape[2] == 1:  # slices: half the work in two dimensions
        found = functional.grid_sample(
            together[:, :, 0], grid[:, 0, ..., :2], padding_mode="border", align_corners=False
        )[:, :, None]
    else:
        found = functional.grid_sample(together, grid, padding_mode="border", align_corners=False)
    values, hot = found[:, : values.shape[1]], found[:, values.shape[1] :]
    most, which = hot.max(1, keepdim=True)  # argmax of all four takes six times as long on a CPU
    return values, torch.where(most > 1 - hot.sum(1, keepdim=True), which + 1, 0).to(label.dtype)


def _basis(n: int) -> Tensor:
    """(n, CONTROL_POINTS): the weight of each control point's cubic B-spline at each of n voxels."""
    ends = torch.linspace(1, CONTROL_POINTS - 2, n) if n > 1 else torch.tensor([(CONTROL_POINTS - 1) / 2])
    away = (ends[:, None] - torch.arange(CONTROL_POINTS)).abs()
    near = 2 / 3 - away.square() + away**3 / 2
    return torch.where(away < 1, near, (2 - away).clamp(min=0) ** 3 / 6)
