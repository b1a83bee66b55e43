"""A PNG plot of two methods' paired differences: every case, the mean of each group and its interval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from kitseg.report.pictures import save_picture
from kitseg.scoring.compare import LEVEL, Paired, PairedGroup

_BETTER_A, _SAME, _BETTER_B = "#c8641e", "#8a8a8a", "#1f6fb4"
_GOLDEN = 0.6180339887  # multiples modulo 1 fill the interval evenly
_SPREAD = 0.5  # of a row's height, used for its cases
_BULK = 95  # percent of the cases that the axis covers; the others are drawn at its edge

_COLUMNS = (0.0, 0.2, 0.66, 0.9)  # x positions of the numbers next to a panel
_TOP = -0.9  # of the panels, in row heights
_NARROWEST = 10.6  # inches, which the legend takes

_LEGEND = (
    "dot: a case or patient; triangle: one beyond the axis; diamond and bar: mean and its 95 % bootstrap interval; "
    "p: signed-rank test, for groups Holm-corrected"
)

_Row = tuple[str, str]  # kind and stratum


def comparison_picture(path: Path, groups: Sequence[PairedGroup], a: str, b: str) -> None:
    """Draws B - A of each case, one panel per class and one row per group, and writes a PNG file.

    Each row's cases are drawn below their mean difference (diamond) and its 95 % interval (bar). Cases beyond the axis
    are triangles at its edge. Next to the row: mean, interval, p (Holm-corrected for strata), number.
    """
    names = list(dict.fromkeys(group.name for group in groups))
    places = _places(list(dict.fromkeys((group.kind, group.stratum) for group in groups)))
    bottom = max(places.values()) + 0.6
    width = max(8.2 * len(names) + 1.2, _NARROWEST)
    figure = Figure(figsize=(width, 0.52 * bottom + 2.0), dpi=100, layout="constrained")
    grid = figure.subplots(1, 2 * len(names), squeeze=False, sharey=True, width_ratios=[1.0, 0.6] * len(names))[0]
    for panel, table, name in zip(grid[::2], grid[1::2], names, strict=True):
        of_class = [group for group in groups if group.name == name]
        _frame(panel, name, _reach([group.paired for group in of_class]), bottom)
        table.set_axis_off()
        _write_row(table, _TOP + 0.15, ("mean", "95 % CI", "p", "n"), color="#444444")
        for group in of_class:
            place = places[group.kind, group.stratum]
            _draw(panel, group.paired, place)
            _write_row(table, place, _cells(group))
    _label_rows(grid[0], places)
    figure.supxlabel(_LEGEND, fontsize=9, color="#444444")
    figure.suptitle(f"A: {a}\nB: {b}", fontsize=11, parse_math=False)
    save_picture(figure, path)


def _places(rows: Sequence[_Row]) -> dict[_Row, float]:
    """The vertical position of each row, downward from 0; each new kind has space for its heading."""
    places: dict[_Row, float] = {}
    at, last = -1.0, ""
    for kind, stratum in rows:
        at += 1.0 if kind == last else 1.8
        places[kind, stratum] = at if places else 0.0
        at, last = places[kind, stratum], kind
    return places


def _reach(found: Sequence[Paired]) -> float:
    """The limit of the axis on either side, which covers the means' intervals and most cases."""
    sizes = np.abs(np.concatenate([paired.differences for paired in found]))
    bounds = [abs(x) for paired in found for x in (paired.mean, paired.low, paired.high) if x is not None]
    reach = max(1.3 * float(np.percentile(sizes, _BULK)), 1.15 * max(bounds))
    largest = 1.05 * float(sizes.max())
    return (largest if largest < 1.5 * reach else reach) or 0.01


def _frame(axes: Axes, name: str, reach: float, bottom: float) -> None:
    axes.set_xlim(-reach, reach)
    axes.set_ylim(bottom, _TOP)
    axes.axvline(0, color="#444444", linewidth=1, zorder=1)
    axes.locator_params(axis="x", nbins=5)
    axes.grid(axis="x", alpha=0.25)
    axes.set_title(name, fontsize=12, fontweight="bold", parse_math=False)
    axes.set_xlabel("difference of Dice, B − A", fontsize=10)
    axes.tick_params(axis="y", length=0)
    axes.spines[["left", "right", "top"]].set_visible(False)
    edge: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "fontsize": 10, "va": "top", "y": 1.0}
    axes.text(x=-reach, s="◀ A better", ha="left", color=_BETTER_A, **edge)
    axes.text(x=reach, s="B better ▶", ha="right", color=_BETTER_B, **edge)


def _draw(axes: Axes, paired: Paired, place: float) -> None:
    _draw_cases(axes, np.sort(paired.differences), place, axes.get_xlim()[1])
    if paired.low is not None and paired.high is not None:
        axes.plot([paired.low, paired.high], [place - 0.36] * 2, color="black", linewidth=2.2, zorder=4)
    axes.plot(paired.mean, place - 0.36, "D", color="black", markersize=5.5, zorder=5)


def _draw_cases(axes: Axes, values: NDArray[np.float64], place: float, reach: float) -> None:
    heights = place + 0.1 + _SPREAD * (np.arange(len(values)) * _GOLDEN % 1 - 0.5)
    colours = np.select([values < 0, values > 0], [_BETTER_A, _BETTER_B], _SAME)
    inside = np.abs(values) <= reach
    edge = 0.985 * reach
    for marker, size, which in (("o", 20, inside), ("<", 36, values < -reach), (">", 36, values > reach)):
        x, y = np.clip(values[which], -edge, edge), heights[which]
        axes.scatter(x, y, s=size, c=colours[which], marker=marker, alpha=0.65, linewidths=0, zorder=3)


def _write_row(axes: Axes, place: float, texts: Sequence[str], **style: Any) -> None:
    for x, text in zip(_COLUMNS, texts, strict=True):
        axes.text(x, place, text, transform=axes.get_yaxis_transform(), fontsize=9, va="center", **style)


def _cells(group: PairedGroup) -> tuple[str, str, str, str]:
    paired = group.paired
    return signed(paired.mean), format_interval(paired), format_p(group.p).removeprefix("= "), str(paired.n)


def signed(value: float) -> str:
    """A difference, such as ``+0.012`` or ``−0.003``; with more decimals where it would look like none."""
    return ("+" if value > 0 else "−" if value < 0 else "") + unsigned(abs(value))


def unsigned(value: float) -> str:
    """A number, 0 or larger, with three decimals, or with as many as its first digit takes."""
    if 0 < value < 0.001:
        return np.format_float_positional(value, precision=1, fractional=False, trim="-")
    return f"{value:.3f}"


def format_interval(paired: Paired) -> str:
    """The 95 % interval, a dash where there is none."""
    return "–" if paired.low is None or paired.high is None else f"{signed(paired.low)} to {signed(paired.high)}"


def format_p(p: float | None) -> str:
    """A p value with its sign, such as ``= 0.012`` or ``< 0.001``; a dash where nothing was tested.

    With as many digits as it takes to see on which side of 0.05 it is.
    """
    if p is None:
        return "–"
    rounded = (f"{p:.{digits}g}" for digits in range(2, 18))
    return "< 0.001" if p < 0.001 else f"= {next(text for text in rounded if (float(text) < LEVEL) == (p < LEVEL))}"


def _label_rows(axes: Axes, places: dict[_Row, float]) -> None:
    """Label the groups, with a heading above the first of each kind."""
    headings = {kind: place - 0.75 for (kind, _), place in reversed(places.items()) if kind}
    rows = [(place, stratum or "all cases") for (_, stratum), place in places.items()]
    rows += [(place, kind) for kind, place in headings.items()]
    axes.set_yticks([place for place, _ in rows], [text for _, text in rows], parse_math=False)
    for label in axes.get_yticklabels()[len(places) :]:
        label.set_fontweight("bold")
