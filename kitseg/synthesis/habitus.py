"""Another habitus: rotation, scale, flip, displacement, and kidneys that are absent, small, low or malrotated.

Everything that moves is put into one sampling grid, so that a body is interpolated once. Points are in mm: in a patch
from its centre, in a body from the centre of its voxel 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from torch.nn.functional import grid_sample

from kitseg.synthesis.bodies import FAR, KidneyBox, RealBody
from kitseg.synthesis.fields import Vector, rotation, smooth_noise, step, upsampled, white

AIR = -1000.0
EVERY = 4  # voxels between the points where the grid is computed; between them it is interpolated
EDGE = 12.0  # mm by which the first and the last slice of a body are continued
FAT = (-112.0, -88.0)  # HU
KINDS = {"absent": 0.05, "small": 0.05, "low": 0.04, "malrotated": 0.04}  # of all kidneys


@dataclass(frozen=True)
class Move:
    """A local change: points p near ``centre`` become p + w (matrix (p - centre) + shift), w falling from 1 to 0.

    radii: mm along each axis at which w is 1/e; flat: w is nearly constant well inside the radii.
    """

    centre: Vector
    radii: Vector
    matrix: Vector
    shift: Vector
    flat: bool = False

    def __call__(self, points: Tensor) -> Tensor:
        """(3, ...) points, moved."""
        away = points - _column(self.centre, points)
        r2 = ((away / _column(self.radii, points)) ** 2).sum(0)
        weight = torch.exp(-(r2**2 if self.flat else r2))
        change = (torch.tensor(self.matrix, dtype=torch.float32) @ away.reshape(3, -1)).reshape(away.shape)
        return points + weight * (change + _column(self.shift, points))


@dataclass(frozen=True)
class Unusual:
    """A kidney that is absent, small, low or malrotated (``kind``), and the move that makes it so, in the body."""

    kind: str
    kidney: KidneyBox
    move: Move


@dataclass(frozen=True)
class Frame:
    """The map from a patch to a body: pushes in the patch, then ``matrix`` and ``centre``, then unusual kidneys.

    elastic: (3, a, b, c) displacements in mm over the patch.
    """

    matrix: Vector
    centre: Vector
    elastic: Tensor | None = None
    pushes: tuple[Move, ...] = ()
    unusual: tuple[Unusual, ...] = ()

    @property
    def removed(self) -> list[KidneyBox]:
        """The kidneys that are filled with fat."""
        return [one.kidney for one in self.unusual if one.kind == "absent"]

    @property
    def zoom(self) -> float:
        """Millimetres in the patch per millimetre in the body."""
        return float(abs(np.linalg.det(self.matrix)) ** (-1 / 3))

    def find(self, point: Vector) -> Vector:
        """The point of the patch that shows a point of the body, without the displacements within the patch."""
        found: Vector = np.linalg.inv(self.matrix) @ (self.source(point) - self.centre)
        return found

    def source(self, point: Vector) -> Vector:
        """The point that the moves bring to a point of the body."""
        wanted = torch.tensor(point, dtype=torch.float32)
        there = wanted.clone()
        for _ in range(25 if self.unusual else 0):  # a fixed point: moves change more slowly than points
            there = there + (wanted - self._moved(there))
        return there.numpy().astype(np.float64)

    def grid(self, shape: Sequence[int], spacing: Sequence[float]) -> Tensor:
        """(3, D, H, W) points of the body for each voxel of a patch."""
        axes = [
            torch.linspace(-(n - 1) / 2, (n - 1) / 2, max(2, n // EVERY + 1)) * mm for n, mm in _pairs(shape, spacing)
        ]
        points = torch.stack(torch.meshgrid(*axes, indexing="ij"))
        if self.elastic is not None:
            points = points + upsampled(self.elastic[None], points.shape[1:], corners=True)[0]
        for push in self.pushes:
            points = push(points)
        there = (torch.tensor(self.matrix, dtype=torch.float32) @ points.reshape(3, -1)).reshape(points.shape)
        there = self._moved(there + _column(self.centre, points))
        return upsampled(there[None], shape, corners=True)[0]

    def _moved(self, points: Tensor) -> Tensor:
        for one in self.unusual:
            points = one.move(points)
        return points


def any_matrix(rng: Generator, whole: bool = False) -> Vector:
    """A random matrix from patch to body: rotation, scale, flip of left and right; milder for a whole scan."""
    low, high, angles = (0.92, 1.12, (6, 4, 4)) if whole else (0.8, 1.25, (15, 8, 8))
    scale = rng.uniform(low, high) * rng.uniform(0.95, 1.05, 3)
    matrix: Vector = rotation(rng, angles) @ np.diag([1, 1, rng.choice([-1, 1])]) @ np.diag(1 / scale)
    return matrix


def any_elastic(rng: Generator) -> Tensor | None:
    """Random smooth displacements of up to a few mm, in 60 % of the patches."""
    return white(rng, (3, 4, 4, 4)) * float(rng.uniform(0.5, 3.5)) if rng.random() < 0.6 else None


def push(centre: Vector, radius: float, strength: float) -> Move:
    """Tissue around a lesion of this radius (mm, patch) makes room: what lay in its centre moves outwards."""
    return Move(centre, np.full(3, 1.5 * radius), -strength * np.eye(3), np.zeros(3))


def unusual_kidneys(rng: Generator, kidneys: Sequence[KidneyBox]) -> tuple[Unusual, ...]:
    """Each kidney may be absent (one of two), small, low or malrotated; most are usual."""
    kinds = rng.choice(["usual", *KINDS], len(kidneys), p=[1 - sum(KINDS.values()), *KINDS.values()]).tolist()
    if len(kidneys) == 1 or kinds == ["absent"] * len(kidneys):
        kinds[0] = "usual" if kinds[0] == "absent" else kinds[0]
    chosen = zip(kinds, kidneys, strict=True)
    return tuple(Unusual(kind, kidney, _moved(kind, kidney, rng)) for kind, kidney in chosen if kind != "usual")


def _moved(kind: str, kidney: KidneyBox, rng: Generator) -> Move:
    """The move that makes a kidney unusual; what was around an absent one comes closer."""
    centre, radii, still = np.array(kidney.centre), np.array(kidney.radii), np.zeros(3)
    if kind == "absent":
        return Move(centre, radii * 1.2, 0.5 * np.eye(3), still)
    if kind == "small":
        return Move(centre, radii * 1.5, rng.uniform(0.15, 0.5) * np.eye(3), still)
    if kind == "low":  # what is shown comes from further up: slices run from head to feet
        shift = np.array([-rng.uniform(10, 28), 0, 0])
        return Move(centre - shift / 2, np.add(radii * 1.55, [28, 8, 8]), np.zeros((3, 3)), shift, flat=True)
    angle = np.deg2rad(rng.uniform(15, 38) * rng.choice([-1, 1]))
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    return Move(centre, radii * 1.35 + 6, turn - np.eye(3), still, flat=True)


def sample(body: RealBody, grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """HU, distance to the kidneys in the body's mm and tissue (1 vessel, -1 sinus), (D, H, W), at (3, D, H, W) points.

    Outside the body's scan there is air; only its first and last slice are continued by ``EDGE`` mm.
    """
    shape, size = grid.shape[1:], np.array(body.hu.shape)
    z, last = grid[0], float(size[0] - 1) * body.spacing[0]
    z = torch.where(z < 0, (z + EDGE).clamp(max=0), torch.where(z > last, (z - EDGE).clamp(min=last), z))
    points = (z, grid[1], grid[2])
    ends = np.array([(float(p.min()), float(p.max())) for p in points]).T / body.spacing
    low, high = np.maximum(np.floor(ends[0]).astype(int) - 1, 0), np.minimum(np.ceil(ends[1]).astype(int) + 2, size)
    if (high - low < 2).any():
        return torch.full(shape, AIR), torch.full(shape, FAR), torch.zeros(shape)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    outside = torch.tensor([AIR, FAR, 0.0])[:, None, None, None]
    part = torch.stack([torch.from_numpy(a[box].astype(np.float32)) for a in (body.hu, body.distance, body.tissue)])
    rows = zip(points, body.spacing, low, high - low, strict=True)
    relative = torch.stack([p * (2 / (mm * n)) + float((1 - 2 * first) / n - 1) for p, mm, first, n in rows][::-1], -1)
    found = grid_sample((part - outside)[None], relative[None], align_corners=False)[0]
    return found[0] + AIR, found[1] + FAR, found[2]


def remove(
    kidney: KidneyBox, fields: tuple[Tensor, Tensor, Tensor], grid: Tensor, rng: Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """HU, distance and tissue with fat where the kidney was."""
    hu, distance, tissue = fields
    away = ((grid - _column(np.array(kidney.centre), grid)) / _column(np.array(kidney.radii) + 12, grid)).abs().amax(0)
    here = (away < 1) & (distance < 4)
    weight = torch.where(away < 1, step(1.5 - distance, 0.8), torch.zeros(()))
    fat = rng.uniform(*FAT) + 9 * smooth_noise(rng, hu.shape, 5) + 8 * white(rng, hu.shape)
    hu = hu + weight * (fat - hu)
    return hu, torch.where(here, torch.tensor(FAR), distance), torch.where(here, torch.zeros(()), tissue)


def _column(values: Vector, like: Tensor) -> Tensor:
    """Three numbers that broadcast along points (3, ...)."""
    return torch.tensor(np.asarray(values, np.float32)).reshape(3, *[1] * (like.ndim - 1))


def _pairs(shape: Sequence[int], spacing: Sequence[float]) -> list[tuple[int, float]]:
    return list(zip(shape, spacing, strict=True))
