"""Fluid that is neither tumor nor cyst: in a wide renal pelvis, around a kidney, anywhere in fat, or in an organ."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from kitseg.synthesis.bodies import CLEAR, any_voxel
from kitseg.synthesis.fields import Vector, any_rotation, box_mean, smooth_noise, step
from kitseg.synthesis.phases import Tissues

PELVIS, AROUND, ASCITES, ORGAN = 0.15, 0.08, 0.08, 0.3  # of the patients
WATER = (-3.0, 22.0)  # HU
APART, REACH = 1.5, 40.0  # mm from the kidney's surface, between which fat may be replaced by fluid around it
CELL, ASCITES_CELL = 25.0, 50.0  # mm, of their shapes
RADIUS, AXES = (15.0, 60.0), (0.7, 1.4)  # mm, of an organ; times that, of its axes
WALL, MUSCLE = (1.0, 5.0), (25.0, 90.0)  # mm, about; HU, of an organ's wall
THICK, OPAQUE = (-5.0, 60.0), (80.0, 500.0)  # HU of an organ's fluid, from water to soft tissue; with contrast agent
LIKE_WATER, WITH_AGENT = 0.45, 0.1  # of the organs: fluid of ``WATER``, and of ``OPAQUE``; otherwise of ``THICK``


def add(hu: Tensor, on: Tissues, rng: Generator) -> Tensor:
    """HU (D, H, W), in some patients with fluid in the renal sinus, in fat near a kidney or anywhere, in an organ."""
    if rng.random() < PELVIS:
        sinus = (-on.tissue).clamp(0, 1)
        shape = step(smooth_noise(rng, hu.shape, 12 / on.spacing) + rng.uniform(-0.3, 1.5), 0.15)
        hu = _filled(hu, sinus * shape, rng)
    if rng.random() < AROUND:
        hu = _filled(hu, _in_fat(hu, on, CELL, rng) * step(REACH - on.distance, 3), rng)
    if rng.random() < ASCITES:
        hu = _filled(hu, _in_fat(hu, on, ASCITES_CELL, rng), rng)
    return organ(hu, on, rng) if rng.random() < ORGAN else hu


def organ(hu: Tensor, on: Tissues, rng: Generator) -> Tensor:
    """HU with a smooth organ full of fluid, such as a bladder or stomach, its centre away from the kidneys."""
    radius = float(np.exp(rng.uniform(*np.log(RADIUS))))
    centre = any_voxel(hu, on.distance, min(radius, CLEAR), rng)
    if centre is None:
        return hu
    depth = _bag(hu.shape, centre, radius, on.spacing, rng).minimum(on.distance - APART)
    mean = box_mean(hu, 3)
    free = step(200 - mean, 15) * step(mean + 250, 15) * (1 + on.tissue.clamp(-1, 0))
    wall = rng.uniform(*MUSCLE) + 5 * smooth_noise(rng, hu.shape, 1.2)
    hu = torch.lerp(hu, wall, step(depth, 0.8) * free)
    content, lumen = rng.random(), step(depth - rng.uniform(*WALL), 0.8) * free
    if content < WITH_AGENT:
        level = float(np.exp(rng.uniform(*np.log(OPAQUE))))
        return _filled(hu, lumen, rng, (level, level))
    return _filled(hu, lumen, rng, WATER if content < WITH_AGENT + LIKE_WATER else THICK)


def _bag(shape: Sequence[int], centre: Vector, radius: float, spacing: Vector, rng: Generator) -> Tensor:
    """Depth in mm, about, below the surface of a turned ellipsoid around a voxel, negative outside."""
    axes = [torch.arange(n) - float(c) for n, c in zip(shape, centre, strict=True)]
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    half = radius * rng.uniform(*AXES, 3)
    turned = (any_rotation(rng) * spacing / half[:, None]).tolist()
    reach = sum(((a * z + b * y + c * x).square() for a, b, c in turned), torch.zeros(())).sqrt()
    return radius * (1 - reach + 0.06 * smooth_noise(rng, shape, 0.7 * radius / spacing))


def _in_fat(hu: Tensor, on: Tissues, cell: float, rng: Generator) -> Tensor:
    """Regions of a size in mm in fat outside the kidneys, from 0 to 1."""
    mean = box_mean(hu, 3)
    fat = step(-20 - mean, 8) * step(mean + 200, 10) * step(on.distance - APART, 0.5)
    return fat * step(smooth_noise(rng, hu.shape, cell / on.spacing) + rng.uniform(-1, 0.5), 0.1)


def _filled(hu: Tensor, share: Tensor, rng: Generator, level: tuple[float, float] = WATER) -> Tensor:
    water = rng.uniform(*level) + 5 * smooth_noise(rng, hu.shape, 1.2)
    return torch.lerp(hu, water, share)
