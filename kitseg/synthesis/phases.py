"""Contrast phases: native, corticomedullary, nephrographic, excretory, or as scanned with another level."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from kitseg.synthesis.bodies import NATIVE, Facts
from kitseg.synthesis.fields import Vector, box_mean, smooth_noise, step

SCANNED, PLAIN, CORTICAL, NEPHROGRAPHIC, EXCRETORY = (
    "as scanned", "native", "corticomedullary", "nephrographic", "excretory",
)  # fmt: skip
SHARES = {SCANNED: 0.38, PLAIN: 0.2, CORTICAL: 0.17, NEPHROGRAPHIC: 0.15, EXCRETORY: 0.1}
CORTEX = (5.0, 8.0)  # mm, its thickness
GRAIN = (0.35, 0.85)  # of a scan's fine noise: interpolation has smoothed what is around
BLOOD, TISSUE = 42.0, 45.0  # HU without contrast
BLUR = 2.0  # mm around the kidneys
ORGANS, BONE = (120.0, 210.0), 130.0  # HU up to which organs may have contrast; HU more, from which it is bone


@dataclass(frozen=True)
class Phase:
    """The contrast of a patient: the phase's name, HU of parenchyma (its mean) and, for lesions, of cortex."""

    name: str
    parenchyma: float
    cortex: float

    @property
    def native(self) -> bool:
        """Whether there is no contrast agent."""
        return self.parenchyma < NATIVE


@dataclass(frozen=True)
class Tissues:
    """What a phase works on, (D, H, W): HU, distance to the kidneys in mm (negative inside), tissue; spacing in mm."""

    hu: Tensor
    distance: Tensor
    tissue: Tensor
    spacing: Vector

    @property
    def inside(self) -> Tensor:
        """How far a voxel belongs to the kidney, from 0 to 1."""
        mm = float(self.spacing.mean())
        return step(-(self.distance + 0.3 * mm), 0.45 * mm)


def any_phase(rng: Generator, facts: Facts, drawn: bool = False) -> str:
    """A random phase that a body can be shown in: one without contrast stays native; drawn kidneys were not scanned."""
    if facts.parenchyma < NATIVE:
        return SCANNED
    names = [name for name in SHARES if not (drawn and name == SCANNED)]
    shares = np.array([SHARES[name] for name in names])
    return str(rng.choice(names, p=shares / shares.sum()))


def show(name: str, on: Tissues, facts: Facts, rng: Generator) -> tuple[Tensor, Phase]:
    """HU in a phase, and what it is like."""
    if name == SCANNED:
        return _scanned(on, facts, rng)
    if name == PLAIN:
        return _plain(on, facts, rng)
    hu, mean = on.hu, facts.parenchyma
    noise = smooth_noise(rng, hu.shape, 1.2) * facts.noise * rng.uniform(*GRAIN)
    left = _structure(hu, mean) * rng.uniform(0.15, 0.5)
    if name == CORTICAL:
        cortex, medulla = rng.uniform(140, 240), rng.uniform(60, 120)
        depth = -on.distance + smooth_noise(rng, hu.shape, 9 / on.spacing) * 2
        pattern = medulla + (cortex - medulla) * step(rng.uniform(*CORTEX) - depth, 0.9)
        hu = _no_brighter_edge(hu, on, mean, cortex)
        flat = pattern + 0.7 * left + noise
        return hu + on.inside * (flat - hu), Phase(name, 0.6 * cortex + 0.4 * medulla, cortex)
    level = rng.uniform(95, 210)
    if name == EXCRETORY:
        level = rng.uniform(80, 150)
        hu = _without_contrast(hu, on.tissue, mean, rng.uniform(0.3, 0.7))
    hu = _no_brighter_edge(hu, on, mean, level)
    hu = hu + on.inside * (level + left + noise - hu)
    if name == EXCRETORY:
        hu = _urine(hu, on, rng)
    return hu, Phase(name, level, level)


def _scanned(on: Tissues, facts: Facts, rng: Generator) -> tuple[Tensor, Phase]:
    """The body's own phase at another level."""
    hu, mean = on.hu, facts.parenchyma
    if mean < NATIVE:
        level, gain = min(mean + rng.uniform(-4, 12), NATIVE - 1), 1.0
    else:
        level, gain = max(NATIVE, mean + rng.uniform(-35, 45)), rng.uniform(0.7, 1.3)
    return hu + on.inside * ((hu - mean) * (gain - 1) + level - mean), Phase(SCANNED, level, level)


def _plain(on: Tissues, facts: Facts, rng: Generator) -> tuple[Tensor, Phase]:
    """No contrast: soft tissue and vessels lose theirs, parenchyma becomes homogeneous."""
    level, mean = rng.uniform(24, 42), facts.parenchyma
    hu = _no_brighter_edge(_without_contrast(on.hu, on.tissue, mean, 1.0), on, mean, level)
    noise = smooth_noise(rng, hu.shape, 1.2) * facts.noise * rng.uniform(*GRAIN)
    flat = level + _structure(on.hu, mean) * rng.uniform(0.1, 0.25) + noise
    return hu + on.inside * (flat - hu), Phase(PLAIN, level, level)


def _structure(hu: Tensor, mean: float) -> Tensor:
    """What was scanned in the parenchyma, around 0 HU."""
    return (hu - mean).clamp(-90, 90)


def _no_brighter_edge(hu: Tensor, on: Tissues, mean: float, level: float) -> Tensor:
    """HU around the kidneys' surface, where the scan shows their contrast blurred: of ``level`` or what lies beside.

    mean: HU of the parenchyma in the scan; what is far brighter, such as a rib, stays.
    """
    voxels = 2 * max(1, round(2 * BLUR / float(on.spacing.mean()))) + 1
    beside = step(on.distance - BLUR, 0.4)
    around = box_mean(hu * beside, voxels) / box_mean(beside, voxels).clamp(min=0.02)
    blurred = (1 - beside) * step(_organs(mean) + BONE - hu, 10)
    return hu + blurred * (around.clamp(min=level) - hu).clamp(max=0)


def _without_contrast(hu: Tensor, tissue: Tensor, mean: float, share: float) -> Tensor:
    """Soft tissue and vessels with a share of their contrast agent taken away; fat and bone stay.

    mean: HU of the parenchyma, which limits how bright other organs may be.
    """
    dull = _dulled(hu, _organs(mean))
    blood = BLOOD + 0.15 * (hu - 150)
    dull = dull + (2 * tissue.abs()).clamp(max=1) * (blood - dull).clamp(max=0)  # vessels, in the sinus too
    return hu + share * (dull - hu)


def _organs(mean: float) -> float:
    """HU up to which organs may have contrast beside parenchyma of ``mean`` HU."""
    return min(max(ORGANS[0], mean), ORGANS[1])


def _dulled(hu: Tensor, organs: float) -> Tensor:
    """Contrast-enhanced HU of soft tissue, up to ``organs``, as without contrast; continuous, and bone stays."""
    low, bone = TISSUE + (hu - TISSUE) * 0.3, organs + BONE
    top = TISSUE + (organs - TISSUE) * 0.3
    high = top + (hu - organs) * (bone - top) / BONE
    return torch.where(hu < TISSUE, hu, torch.where(hu < organs, low, torch.where(hu < bone, high, hu)))


def _urine(hu: Tensor, on: Tissues, rng: Generator) -> Tensor:
    """Excreted contrast agent in the renal pelvis and in calyces, which open into the sinus."""
    sinus = -on.tissue.clamp(max=0)
    if not bool((sinus > 0.5).any()):
        return hu
    near = box_mean(sinus, int(2 * round(7 / float(on.spacing.mean())) + 1))
    pelvis = (
        sinus * step(on.hu + 25, 12) * step(smooth_noise(rng, hu.shape, 10 / on.spacing) + rng.uniform(0, 0.8), 0.15)
    )
    bumps = smooth_noise(rng, hu.shape, 5.5 / on.spacing)
    calyces = step(bumps + 5 * near - rng.uniform(1.9, 2.3), 0.12) * step(on.distance + rng.uniform(7, 10), -0.8)
    calyces = calyces * step(near - 0.04, 0.01) * on.inside
    level = float(np.exp(rng.uniform(np.log(220), np.log(1100))))
    return hu + torch.maximum(pelvis, calyces) * (level * (1 + 0.05 * bumps) - hu)
