"""HU inside tumors, cysts and stones, relative to the parenchyma of a contrast phase."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from kitseg.synthesis.fields import Vector, smooth_noise, step
from kitseg.synthesis.phases import CORTICAL, Phase


@dataclass(frozen=True)
class Look:
    """A kind of tumor.

    share: of all tumors; level: relative to the parenchyma's HU with contrast; rough: HU of its texture with contrast;
    necrosis: probability of a necrotic core; native: HU without contrast.
    """

    share: float
    level: tuple[float, float]
    rough: tuple[float, float]
    necrosis: float
    native: tuple[float, float] = (18, 48)


LOOKS = {
    "clear cell": Look(0.42, (0.4, 0.9), (8, 28), 0.55),
    "papillary": Look(0.16, (0.28, 0.5), (2, 9), 0.12),
    "chromophobe": Look(0.13, (0.4, 0.75), (2, 9), 0.12),
    "hypodense": Look(0.09, (0.2, 0.35), (2, 9), 0.5),
    "bright": Look(0.07, (0.9, 1.2), (8, 28), 0.12, (48, 70)),
    "cystic": Look(0.10, (0.4, 0.8), (4, 12), 0.0),
    "fatty": Look(0.03, (0.35, 0.8), (10, 25), 0.0),
}
CONTRAST, NATIVE_CONTRAST = 25.0, 10.0  # HU: the least difference from the parenchyma of a lesion of VISIBLE
VISIBLE, MORE = 10.0, (0.6, 1.6)  # mm, a radius; a smaller lesion needs more to be seen in noise, a larger one less
WATER = (-5.0, 25.0)


@dataclass(frozen=True)
class Site:
    """Where a texture is needed.

    distance: (D, H, W) to the lesion's surface in mm, negative inside; radius: its; spacing: of the grid, mm.
    """

    distance: Tensor
    radius: float
    spacing: Vector
    phase: Phase

    def noise(self, rng: Generator, mm: float) -> Tensor:
        """Noise with a correlation length in mm."""
        return smooth_noise(rng, self.distance.shape, np.maximum(mm / self.spacing, 1.2))

    def shell(self, depth: float, width: float) -> Tensor:
        """1 at a depth in mm below the surface, falling to 0 within about ``width`` mm."""
        return torch.exp(-(((self.distance + depth) / width) ** 2))


def tumor(site: Site, rng: Generator) -> tuple[str, Tensor]:
    """A kind of tumor, and its HU (D, H, W)."""
    kind = str(rng.choice(list(LOOKS), p=[look.share for look in LOOKS.values()]))
    look, cell = LOOKS[kind], float(np.clip(site.radius * rng.uniform(0.3, 0.7), 3, 18))
    level, core = _levels(kind, site, rng)
    rough = rng.uniform(1, 5) if site.phase.native else rng.uniform(*look.rough)
    field = site.noise(rng, cell)
    hu = level + rough * field + 0.5 * rough * site.noise(rng, 3.5)
    if kind == "cystic":
        hu = _chambers(hu, core, site, rng)
    if kind == "fatty":
        hu = hu + step(site.noise(rng, cell) - rng.uniform(0.2, 1.0), 0.2) * (rng.uniform(-95, -30) - hu)
    if rng.random() < look.necrosis * (1 if site.radius > 15 else 0.4):
        depth = (-site.distance / site.radius).clamp(0, 1)
        dead = step(0.5 * site.noise(rng, cell) + 2.2 * depth - rng.uniform(0.7, 1.5), 0.12)
        hu = hu + dead * (core + 0.2 * rough * field - hu)
    if kind == "chromophobe" and site.radius > 15 and rng.random() < 0.3:  # a central scar
        hu = hu + step(-site.distance / site.radius - 0.7, 0.05) * (0.6 * level - hu)
    if rng.random() < 0.25:  # a pseudocapsule
        hu = hu + site.shell(1.5, 1.3) * float(rng.uniform(-0.35, 0.2)) * level
    if rng.random() < 0.06:  # calcifications
        hu = torch.where(field < -2.3, torch.tensor(float(rng.uniform(180, 500))), hu)
    return kind, hu


def cyst(site: Site, rng: Generator) -> tuple[str, Tensor]:
    """A kind of cyst, and its HU (D, H, W), which contrast agent doesn't change."""
    kind = str(rng.choice(["simple", "hyperdense", "walled", "septate"], p=[0.76, 0.08, 0.08, 0.08]))
    level = rng.uniform(45, 85) if kind == "hyperdense" else rng.uniform(*WATER)
    level = _apart(level, site, brighter=kind == "hyperdense" and site.phase.native)
    hu = level + site.noise(rng, 6) * float(rng.uniform(0, 2))
    if kind == "walled":
        hu = hu + site.shell(1, 1) * float(rng.uniform(10, 60))
    if kind == "septate":
        hu = hu + _walls(site, rng) * float(rng.uniform(15, 60))
    return kind, hu


def stone(site: Site, rng: Generator) -> Tensor:
    """HU of a stone."""
    return float(np.exp(rng.uniform(np.log(250), np.log(1500)))) * (1 + 0.1 * site.noise(rng, 2))


def _levels(kind: str, site: Site, rng: Generator) -> tuple[float, float]:
    """HU of a tumor's solid part, and of what is dead or liquid in it."""
    look, phase = LOOKS[kind], site.phase
    if phase.native:
        level = rng.uniform(*look.native)
    else:
        strong = phase.name == CORTICAL and kind in (
            "clear cell",
            "bright",
        )  # it takes up contrast as early as the cortex
        level = max(30.0, (phase.cortex if strong else phase.parenchyma) * rng.uniform(*look.level))
    above = phase.native and level > phase.parenchyma
    level = _apart(level, site, brighter=kind == "bright" or above)
    return level, min(rng.uniform(8, 32), level - 5)


def _apart(level: float, site: Site, brighter: bool) -> float:
    """The HU of a lesion, moved away from the parenchyma's where contrast times diameter (Rose) is too small to see."""
    phase = site.phase
    least = (NATIVE_CONTRAST if phase.native else CONTRAST) * float(np.clip(VISIBLE / site.radius, *MORE))
    if abs(level - phase.parenchyma) >= least:
        return level
    return phase.parenchyma + (least if brighter else -least)


def _chambers(solid: Tensor, core: float, site: Site, rng: Generator) -> Tensor:
    """A cystic tumor: fluid within a thick wall, septa and nodules."""
    wall = step(site.distance + rng.uniform(1.5, 0.25 * site.radius + 1.6), 0.6)
    nodules = step(site.noise(rng, 0.5 * site.radius + 2) - rng.uniform(1.0, 1.8), 0.15)
    share = torch.maximum(torch.maximum(wall, nodules), _walls(site, rng))
    return core + share * (solid - core)


def _walls(site: Site, rng: Generator) -> Tensor:
    """Thin sheets through a lesion: where a smooth field is near 0."""
    cell = max(5.0, 0.8 * site.radius)
    field = site.noise(rng, cell)
    return torch.exp(-((field * cell / 2 / max(0.8, float(site.spacing.mean()))) ** 2))
