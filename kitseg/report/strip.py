"""Strip plots of distributions: the layout in an SVG picture, one dot per case or lesion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.ticker import MaxNLocator

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
class StripRow:
    """A row of dots, each with its position (x, y), and the positions of their quartiles."""

    name: str
    y: float
    dots: tuple[tuple[float, float, Dot], ...]
    quartiles: tuple[float, ...]


@dataclass(frozen=True)
class Strip:
    """A plot: rows of dots above one axis; ticks: positions and texts."""

    title: str
    rows: tuple[StripRow, ...]
    ticks: tuple[tuple[float, str], ...]
    left: float = LEFT

    @property
    def height(self) -> float:
        """Height of all rows."""
        return ROW * len(self.rows)


def strip(title: str, groups: Mapping[str, Sequence[Dot]], top: float | None = None) -> Strip | None:
    """Lay out groups of dots on an axis from 0 to ``top``, by default the largest value; None without dots."""
    filled = {name: sorted(dots, key=lambda dot: dot.value) for name, dots in groups.items() if dots}
    if not filled:
        return None
    largest = top or max(dots[-1].value for dots in filled.values())
    ticks = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(0, largest or 1)
    scale = (RIGHT - LEFT) / ticks[-1]
    rows = []
    for number, (name, dots) in enumerate(filled.items()):
        y = ROW * (number + 0.5)
        placed = ((LEFT + scale * d.value, y + _SPREAD * (n * _GOLDEN % 1 - 0.5), d) for n, d in enumerate(dots))
        quartiles = LEFT + scale * np.percentile([dot.value for dot in dots], (25, 50, 75))
        rows.append(StripRow(f"{name} ({len(dots)})", y, tuple(placed), tuple(quartiles.tolist())))
    return Strip(title, tuple(rows), tuple((LEFT + scale * tick, f"{tick:g}") for tick in ticks))
