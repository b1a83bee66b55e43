"""Strip plots of distributions: the layout in an SVG picture, one dot per case or lesion."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEFT, RIGHT, ROW = 170.0, 880.0, 46.0  # edges of the plot area, and the height of a row
_GOLDEN = 0.6180339887  # multiples modulo 1 fill the interval evenly
_SPREAD = 24.0  # of a row's height, used for its dots


@dataclass(frozen=True)
class Dot:
    """A value to draw; level: quality level of its case; href: page of its case."""

    value: float
    text: str
    level: str
    href: str


@dataclass(frozen=True)
class Placed:
    """A dot's position in the picture."""

    x: float
    y: float
    dot: Dot


@dataclass(frozen=True)
class StripRow:
    """A row of dots with the positions of their quartiles."""

    name: str
    y: float
    dots: tuple[Placed, ...]
    quartiles: tuple[float, float, float]


@dataclass(frozen=True)
class Strip:
    """A plot: rows of dots above one axis; ticks: positions and texts."""

    title: str
    rows: tuple[StripRow, ...]
    ticks: tuple[tuple[float, str], ...]
    left: float = LEFT
    right: float = RIGHT

    @property
    def height(self) -> float:
        """Height of all rows."""
        return ROW * len(self.rows)


def strip(title: str, groups: Mapping[str, Sequence[Dot]], top: float | None = None) -> Strip | None:
    """Lay out groups of dots on an axis from 0 to ``top``, by default the largest value; None without dots."""
    filled = {name: dots for name, dots in groups.items() if dots}
    if not filled:
        return None
    ticks = _ticks(top or max(dot.value for dots in filled.values() for dot in dots))
    scale = (RIGHT - LEFT) / ticks[-1]
    rows = []
    for number, (name, dots) in enumerate(filled.items()):
        y = ROW * (number + 0.5)
        q1, q2, q3 = (LEFT + scale * float(q) for q in np.percentile([dot.value for dot in dots], (25, 50, 75)))
        rows.append(StripRow(f"{name} ({len(dots)})", y, _placed(dots, y, scale), (q1, q2, q3)))
    return Strip(title, tuple(rows), tuple((LEFT + scale * tick, f"{tick:g}") for tick in ticks))


def _placed(dots: Sequence[Dot], y: float, scale: float) -> tuple[Placed, ...]:
    ordered = sorted(dots, key=lambda dot: dot.value)
    return tuple(
        Placed(LEFT + scale * dot.value, y + _SPREAD * (n * _GOLDEN % 1 - 0.5), dot) for n, dot in enumerate(ordered)
    )


def _ticks(top: float) -> list[float]:
    """Round numbers from 0 to at least ``top``, four to ten steps apart."""
    if top <= 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(top))
    step = next(s for s in (power / 5, power / 2, power, 2 * power) if top / s <= 6)
    return [round(step * n, 10) for n in range(math.ceil(top / step - 1e-9) + 1)]
