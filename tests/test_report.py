"""Pictures are decoded and looked at pixel by pixel."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from kitseg.report import RESEARCH_USE
from kitseg.report.pictures import case_picture, learning_curve
from kitseg.types import Geometry, Volume

SHAPE = (20, 40, 50)
SPACING = (5.0, 2.0, 2.0)


def scan(hu: NDArray[np.int16], spacing: tuple[float, float, float] = SPACING) -> Volume:
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = *(-mm for mm in spacing), 1
    geometry = Geometry(hu.shape, affine)
    return Volume(hu, geometry, geometry, "case_00000")


def air(shape: tuple[int, int, int] = SHAPE) -> NDArray[np.int16]:
    return np.full(shape, -1000, np.int16)


def pixels(path: Path) -> NDArray[np.int64]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.array(image.convert("RGB"), np.int64)


def panels(rgb: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The planes of a picture, row by row from the left."""
    found = ndimage.find_objects(ndimage.label(rgb.sum(2) < 740)[0])
    large = [s for s in found if min(s[0].stop - s[0].start, s[1].stop - s[1].start) > 60]
    large.sort(key=lambda s: s[0].start + s[0].stop)
    rows = [sorted(large[n : n + 3], key=lambda s: s[1].start) for n in range(0, len(large), 3)]
    return [rgb[s][2:-2, 2:-2] for row in rows for s in row]  # without the frame


def centre_of(panel: NDArray[np.int64], seen: NDArray[np.bool_]) -> tuple[float, float]:
    """Mean row and column of the seen pixels, as parts of the panel."""
    rows, columns = np.nonzero(seen)
    return float(rows.mean()) / panel.shape[0], float(columns.mean()) / panel.shape[1]


def red(panel: NDArray[np.int64]) -> NDArray[np.bool_]:
    return (panel[..., 0] > panel[..., 1] + 40) & (panel[..., 0] > panel[..., 2] + 40)


def green(panel: NDArray[np.int64]) -> NDArray[np.bool_]:
    return (panel[..., 1] > panel[..., 0] + 40) & (panel[..., 1] > panel[..., 2] + 40)


def blue(panel: NDArray[np.int64]) -> NDArray[np.bool_]:
    return panel[..., 2] > panel[..., 0] + 40


def test_labels_are_drawn_where_they_are(tmp_path: Path) -> None:
    reference = np.zeros(SHAPE, np.uint8)
    reference[4:12, 20:32, 5:20] = 1
    reference[6:9, 22:27, 8:13] = 2
    prediction = np.zeros(SHAPE, np.uint8)
    prediction[4:12, 20:32, 5:20] = 1
    path = tmp_path / "case.png"
    case_picture(path, scan(air()), prediction, reference, r"no $\formula$ in a_title")
    planes = panels(pixels(path))
    assert len(planes) == 9
    for ct, ref, pred in zip(planes[:3], planes[3:6], planes[6:], strict=True):
        assert not red(ct).sum() + green(ct).sum()
        assert red(ref).sum() > 50
        assert green(ref).sum() > 50
        assert not red(pred)[20:, 20:].any()
        assert green(pred).sum() > green(ref).sum()
    tumor = [(24.5, 10.5, 40, 50), (7.5, 10.5, 20, 50), (7.5, 24.5, 20, 40)]
    for plane, (row, column, rows, columns) in zip(planes[3:6], tumor, strict=True):
        assert centre_of(plane, red(plane)) == pytest.approx((row / rows, column / columns), abs=0.03)


@pytest.mark.parametrize(
    ("region", "plane"),
    [
        (np.s_[:, :8, :10], 0),  # anterior right
        (np.s_[:4, :, :10], 1),  # head, right
        (np.s_[:4, :8, :], 2),  # head, anterior
    ],
)
def test_a_corner_ends_at_the_upper_left(tmp_path: Path, region: tuple[slice, ...], plane: int) -> None:
    """Patient's right, anterior and head are at the planes' left and top."""
    hu = air()
    hu[region] = 100
    path = tmp_path / "corner.png"
    case_picture(path, scan(hu), np.zeros(SHAPE, np.uint8))
    panel = panels(pixels(path))[plane]
    grey = (panel.min(2) > 120) & (panel.max(2) - panel.min(2) < 5)
    assert centre_of(panel, grey) == pytest.approx((0.1, 0.1), abs=0.01)


def test_a_picture_states_its_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr("kitseg.report.pictures.save_picture", lambda figure, _: drawn.append(figure))
    case_picture(tmp_path / "case.png", scan(air()), np.zeros(SHAPE, np.uint8))
    assert RESEARCH_USE in [text.get_text() for text in drawn[0].findobj(Text)]


def test_lengths_are_true(tmp_path: Path) -> None:
    path = tmp_path / "lengths.png"
    case_picture(path, scan(air((12, 40, 60)), (7.5, 2.0, 2.0)), np.zeros((12, 40, 60), np.uint8))
    planes = panels(pixels(path))[:3]
    millimetres = [(80, 120), (90, 120), (90, 80)]
    scale = planes[0].shape[1] / 120
    for plane, (height, width) in zip(planes, millimetres, strict=True):
        assert plane.shape[:2] == pytest.approx((height * scale, width * scale), rel=0.03)


@pytest.mark.parametrize("label", [0, 1, 2])
@pytest.mark.parametrize("shape", [(1, 8, 8), (6, 1, 9), (3, 3, 3)])
def test_thin_and_full_label_maps_are_drawn_without_warning(
    tmp_path: Path, label: int, shape: tuple[int, int, int]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case_picture(tmp_path / "case.png", scan(air(shape)), np.full(shape, label, np.uint8))
    assert pixels(tmp_path / "case.png").shape[2] == 3


def test_learning_curve_shows_what_there_is(tmp_path: Path) -> None:
    falling = [{"epoch": e, "train/loss": 1.0 / (e + 1)} for e in range(5)]
    scored = [row | {"val/dice_kidney": 0.9, "val/dice_tumor": 0.5, "val/score": 0.7} for row in falling]
    slices = [row | {"val/recall": 0.99, "val/specificity": 0.8, "val/score": 0.9} for row in falling[::2]]
    negative = [{"epoch": row["epoch"], "train/loss": -row["train/loss"]} for row in falling]
    histories = {"empty": [], "loss": falling, "both": scored, "slices": slices, "negative": negative}
    for name, history in histories.items():
        learning_curve(tmp_path / f"{name}.png", history)
    both, loss = pixels(tmp_path / "both.png"), pixels(tmp_path / "loss.png")
    recall, middle = pixels(tmp_path / "slices.png"), both.shape[1] // 2
    assert red(both[:, middle:]).any()
    assert green(both[:, middle:]).any()
    assert not blue(both[:, middle:]).any()
    assert blue(recall[:, middle:]).sum() > 200
    assert green(recall[:, middle:]).any()
    assert not red(recall[:, middle:]).any()
    assert not red(loss[:, middle:]).any()
    assert not blue(pixels(tmp_path / "empty.png")).any()
    assert blue(loss).sum() > 400
    assert blue(pixels(tmp_path / "negative.png")).sum() > 400
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".png"] * 5
