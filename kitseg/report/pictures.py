"""PNG pictures: a case in three planes, and training curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from kitseg import __version__
from kitseg.components import keep_kidneys
from kitseg.labels import BACKGROUND, CLASSES, CYST, KITS19, TUMOR, Scheme
from kitseg.report import RESEARCH_USE
from kitseg.runtime.files import atomic_write
from kitseg.runtime.overwrite import MARK
from kitseg.types import Triple, Volume

_WINDOW = (-160, 240)  # level 40, width 400
_FILL = 0.3
_INCHES = 12.0  # width of a case's picture


@dataclass(frozen=True)
class _Plane:
    """A plane through a scan: the array axis normal to it, and the orientation letters at the left and top edge."""

    name: str
    axis: int
    left: str
    top: str

    def cut(self, array: NDArray[Any], at: Triple) -> NDArray[Any]:
        """The 2D image; in orientation (I, P, L) every plane is displayed upright without flips."""
        cut: NDArray[Any] = array.take(at[self.axis], axis=self.axis)
        return cut

    def lengths(self, of_axes: Sequence[float]) -> tuple[float, float]:
        """From three values, one per array axis, those of the picture's rows and columns."""
        rows, columns = (v for axis, v in enumerate(of_axes) if axis != self.axis)
        return rows, columns


PLANES = (_Plane("Axial", 0, "R", "A"), _Plane("Coronal", 1, "R", "H"), _Plane("Sagittal", 2, "A", "H"))


def case_picture(
    path: Path,
    ct: Volume,
    labels: NDArray[np.uint8],
    reference: NDArray[np.uint8] | None = None,
    title: str = "",
    scheme: Scheme = KITS19,
) -> None:
    """Draws a case in three planes and writes a PNG file, complete or not at all.

    The planes go through the largest tumor (the reference's, else the prediction's), else through the largest cyst,
    else the largest kidney, else the centre. The patient's right, or anterior in the sagittal plane, is on the left of
    the picture; lengths are to scale; the window is level 40, width 400 HU. Rows: CT in HU, the reference if there is
    one, prediction; all of shape (D, H, W) in orientation (I, P, L). scheme: names and colours of the labels.
    """
    maps = {"Reference": reference, "Prediction": labels} if reference is not None else {"Prediction": labels}
    at = centre(list(maps.values()), ct.array.shape)
    figure, grid = _canvas(ct, 1 + len(maps), title, scheme)
    for row, overlay in zip(grid, [None, *maps.values()], strict=True):
        for axes, plane in zip(row, PLANES, strict=True):
            _draw_ct(axes, plane, ct, at)
            if overlay is not None:
                _draw_labels(axes, plane.cut(overlay, at), axes.get_aspect(), scheme)
    for axes, plane in zip(grid[0], PLANES, strict=True):
        axes.set_title(f"{plane.name} (slice {at[plane.axis] + 1})", fontsize=10)
    for row, name in zip(grid, ["CT", *maps], strict=True):
        row[0].set_ylabel(name, fontsize=10)
    save_picture(figure, path)


def draw_planes(row: Sequence[Axes], ct: Volume, labels: NDArray[np.uint8], at: Triple, scheme: Scheme) -> None:
    """Draws the three planes through a voxel, with labels; both arrays of shape (D, H, W)."""
    for axes, plane in zip(row, PLANES, strict=True):
        _draw_ct(axes, plane, ct, at)
        _draw_labels(axes, plane.cut(labels, at), axes.get_aspect(), scheme)


def learning_curve(path: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Draws training loss and validation scores over the epochs and writes a PNG file, complete or not at all.

    Each row of ``history`` has ``epoch`` and any of ``train/loss`` and ``val/<score>``; epochs without validation have
    no point. The loss axis is logarithmic if all losses are positive.
    """
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    loss, scores = figure.subplots(1, 2)
    _curve(loss, history, "train/loss", "training", "#1f4e79")
    colours = {"val/score": "#444444", "val/dice_tumor": "#d62222", "val/recall": "#1f4e79"}
    for key in dict.fromkeys(key for row in history for key in row if key.startswith("val/")):
        name = "mean" if key == "val/score" else key.removeprefix("val/").replace("_", " ")
        _curve(scores, history, key, name, colours.get(key, "#1a9632"))
    losses = [row["train/loss"] for row in history if "train/loss" in row]
    if losses and min(losses) > 0:
        loss.set_yscale("log")
    scores.set_ylim(0, 1.02)
    for axes, name in ((loss, "Loss"), (scores, "Validation")):
        axes.set_title(name, fontsize=11)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(frameon=False)
    save_picture(figure, path)


def centre(maps: Sequence[NDArray[np.uint8]], shape: Sequence[int]) -> Triple:
    """The centre voxel of the largest tumor, else cyst, else kidney, in label maps of ``shape``."""
    lesions = (labels == value for value in (TUMOR, CYST) for labels in maps)
    for mask in (*lesions, *(labels != BACKGROUND for labels in maps)):
        if mask.any():
            where = np.argwhere(keep_kidneys(mask, voxel_ml=1.0, most=1))
            nearest = where[np.argmin(((where - where.mean(0)) ** 2).sum(1))]
            return int(nearest[0]), int(nearest[1]), int(nearest[2])
    z, y, x = (n // 2 for n in shape)
    return z, y, x


def _canvas(ct: Volume, rows: int, title: str, scheme: Scheme) -> tuple[Figure, NDArray[Any]]:
    """A figure with (rows, 3) axes, each scaled to its plane in millimetres, and a legend."""
    extent = [n * mm for n, mm in zip(ct.array.shape, ct.geometry.spacing, strict=True)]
    sizes = [plane.lengths(extent) for plane in PLANES]
    widths, height = [width for _, width in sizes], max(height for height, _ in sizes)
    inches = rows * height * _INCHES / sum(widths) + 0.9
    figure = Figure(figsize=(_INCHES, min(max(inches, 3.0), 40.0)), dpi=100, layout="constrained")
    grid = figure.subplots(rows, 3, squeeze=False, width_ratios=widths)
    if title:
        figure.suptitle(title, fontsize=12, parse_math=False)
    handles = [Patch(fc=to_rgba(one.colour, _FILL), ec=one.colour, label=one.name) for one in scheme.classes.values()]
    handles.append(Patch(fc="none", ec="none", label=RESEARCH_USE))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    return figure, grid


def _draw_ct(axes: Axes, plane: _Plane, ct: Volume, at: Triple) -> None:
    rows, columns = plane.lengths(ct.geometry.spacing)
    low, high = _WINDOW
    axes.imshow(plane.cut(ct.array, at), cmap="gray", vmin=low, vmax=high, aspect=rows / columns)
    axes.set_xticks([])
    axes.set_yticks([])
    halo = [withStroke(linewidth=2, foreground="black")]
    edge: dict[str, Any] = {"color": "#ffd75e", "fontsize": 9, "path_effects": halo}
    axes.text(0.02, 0.5, plane.left, transform=axes.transAxes, ha="left", va="center", **edge)
    axes.text(0.5, 0.98, plane.top, transform=axes.transAxes, ha="center", va="top", **edge)


def _draw_labels(axes: Axes, labels: NDArray[np.uint8], aspect: Any, scheme: Scheme) -> None:
    """Draw each label as a transparent area with an outline."""
    for name, colour in scheme.colours.items():
        mask = labels == CLASSES[name]
        if not mask.any():
            continue
        fill = np.zeros((*mask.shape, 4))
        fill[mask] = to_rgba(colour, _FILL)
        axes.imshow(fill, interpolation="nearest", aspect=aspect)
        if min(mask.shape) > 1:  # a contour needs an area
            axes.contour(mask, levels=[0.5], colors=[colour], linewidths=1.0)


def _curve(axes: Axes, history: Sequence[Mapping[str, float]], key: str, name: str, colour: str) -> None:
    points = [(row["epoch"], row[key]) for row in history if key in row]
    if points:
        axes.plot(*zip(*points, strict=True), marker=".", markersize=4, linewidth=1.4, color=colour, label=name)


def save_picture(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    FigureCanvasAgg(figure)  # becomes the figure's canvas, without pyplot's global state
    if layout := figure.get_layout_engine():
        layout.execute(figure)
        figure.set_layout_engine("none")
    for axes in figure.axes:  # a layout differs in its last digits from one process to the next
        axes.set_position(Bbox(np.round(axes.get_position().get_points(), 5)))
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", metadata={"Software": f"{MARK} {__version__}"})
