"""Shapes of lesions: those of a label map's tumors and cysts, and drawn ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage

from kitseg.components import Components
from kitseg.synthesis.anatomies import Anatomy
from kitseg.synthesis.bodies import signed_distance
from kitseg.synthesis.fields import smooth_noise


@dataclass(frozen=True)
class Shape:
    """A lesion's shape.

    distance: (d, h, w) in mm to its surface, negative inside, on a grid of ``mm``; radius: of a ball as large, in mm;
    case: of the label map that it is from; empty for a drawn one.
    """

    distance: NDArray[Any]
    mm: float
    radius: float
    case: str = ""


@dataclass(frozen=True)
class Shapes:
    """Shapes of tumors and of cysts, and whole kidneys; where there are no shapes, rounded ones are drawn."""

    tumor: Sequence[Shape] = ()
    cyst: Sequence[Shape] = ()
    anatomies: Sequence[Anatomy] = ()


def shapes_of(mask: NDArray[np.bool_], spacing: Sequence[float], case: str, least_ml: float = 0.1) -> list[Shape]:
    """The shapes of a mask's components of ``least_ml`` or more, on isotropic grids with 5 mm around them."""
    numbers, found = Components.of(mask).numbers, []
    for number, box in enumerate(ndimage.find_objects(numbers) if numbers.size else (), 1):
        part = numbers[box] == number
        if part.sum() * np.prod(spacing) / 1000 < least_ml:
            continue
        extent = max(n * mm for n, mm in zip(part.shape, spacing, strict=True))
        mm = float(np.clip(extent / 36, 0.8, 4.0))
        padded = np.pad(part, [(2 + int(np.ceil(5 / s)),) * 2 for s in spacing])
        blurred = ndimage.gaussian_filter(
            signed_distance(padded, spacing), [0.6 * spacing[0] / max(s, spacing[0]) for s in spacing]
        )
        iso = ndimage.zoom(blurred, np.array(spacing) / mm, order=1, grid_mode=True, mode="nearest").astype(np.float16)
        if volume := float((iso < 0).sum()) * mm**3:
            found.append(Shape(iso, mm, ball_radius(volume), case))
    return found


def drawn_shape(rng: Generator, radius: float, round_: bool) -> Shape:
    """An ellipsoid, nearly a ball if ``round_``; otherwise with a bumpy surface."""
    mm = max(0.5, radius / 8)
    n = int(np.ceil(1.7 * radius / mm)) + int(np.ceil(4 / mm))
    axes = rng.uniform(0.88, 1.12, 3) if round_ else rng.uniform(0.75, 1.3, 3)
    grid = np.meshgrid(*[np.arange(-n, n + 1) * mm / a for a in axes / np.prod(axes) ** (1 / 3)], indexing="ij")
    distance = np.sqrt(sum(g**2 for g in grid)) - radius
    if not round_:
        distance = distance + 0.12 * radius * smooth_noise(rng, distance.shape, 0.7 * radius / mm).numpy()
    return Shape(distance.astype(np.float16), mm, radius)


def ball_radius(volume: float) -> float:
    """The radius in mm of a ball of a volume in mm³."""
    return float((0.75 * volume / np.pi) ** (1 / 3))
