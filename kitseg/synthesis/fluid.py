"""Fluid that is neither tumor nor cyst: a wide renal pelvis, fluid around a kidney, ascites and oedema."""

from __future__ import annotations

import torch
from numpy.random import Generator
from torch import Tensor

from kitseg.synthesis.fields import box_mean, smooth_noise, step
from kitseg.synthesis.phases import Tissues

PELVIS, AROUND, ASCITES = 0.15, 0.08, 0.08  # of the patients
WATER = (-3.0, 22.0)  # HU
APART, REACH = 1.5, 40.0  # mm from the kidney's surface, between which fat may be replaced by fluid around it
CELL, ASCITES_CELL = 25.0, 50.0  # mm, of their shapes


def add(hu: Tensor, on: Tissues, rng: Generator) -> Tensor:
    """HU (D, H, W), in some patients with fluid in the renal sinus, or instead of fat near a kidney or anywhere."""
    if rng.random() < PELVIS:
        sinus = (-on.tissue).clamp(0, 1)
        shape = step(smooth_noise(rng, hu.shape, 12 / on.spacing) + rng.uniform(-0.3, 1.5), 0.15)
        hu = _filled(hu, sinus * shape, rng)
    if rng.random() < AROUND:
        hu = _filled(hu, _in_fat(hu, on, CELL, rng) * step(REACH - on.distance, 3), rng)
    if rng.random() < ASCITES:
        hu = _filled(hu, _in_fat(hu, on, ASCITES_CELL, rng), rng)
    return hu


def _in_fat(hu: Tensor, on: Tissues, cell: float, rng: Generator) -> Tensor:
    """Regions of a size in mm in fat outside the kidneys, from 0 to 1."""
    mean = box_mean(hu, 3)
    fat = step(-20 - mean, 8) * step(mean + 200, 10) * step(on.distance - APART, 0.5)
    return fat * step(smooth_noise(rng, hu.shape, cell / on.spacing) + rng.uniform(-1, 0.5), 0.1)


def _filled(hu: Tensor, share: Tensor, rng: Generator) -> Tensor:
    water = rng.uniform(*WATER) + 5 * smooth_noise(rng, hu.shape, 1.2)
    return torch.lerp(hu, water, share)
