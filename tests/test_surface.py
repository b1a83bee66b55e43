"""Surface distances against DeepMind's own code and against values worked out by hand."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import surface_distance as oracle
from scipy import ndimage
from scipy.spatial.distance import cdist
from surface_distance.lookup_tables import create_table_neighbour_code_to_surface_area

from kitseg.labels import KITS23
from kitseg.scoring.case import score
from kitseg.scoring.protocols import PROTOCOLS
from kitseg.scoring.surface import surfaces, surfel_areas
from kitseg.volumes.nifti import read_labels

pytestmark = pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning")  # the organizers' code

CLASSES = {"kidney_and_mass": ((1, 2, 3), 1.0330772532390826), "mass": ((2, 3), 1.1328796488598762)}
CLASSES["tumor"] = ((2,), 1.1498198361434828)


def voxel(*places: tuple[int, int, int]) -> np.ndarray:
    mask = np.zeros((12, 5, 6), bool)
    for place in places:
        mask[place] = True
    return mask


@pytest.mark.parametrize("spacing", [(1, 1, 1), (3.1, 0.7, 1.3), (0.5, 0.9, 5)])
def test_areas_are_those_of_the_organizers(spacing: tuple[float, float, float]) -> None:
    np.testing.assert_allclose(surfel_areas(spacing), create_table_neighbour_code_to_surface_area(spacing), atol=1e-12)


def test_the_corners_of_a_voxel_by_hand() -> None:
    # each of its eight cells holds a triangle between three middles of edges
    triangle = 0.5 * math.sqrt((0.5 * 0.5) ** 2 * 3)
    assert surfaces(voxel((4, 2, 3)), voxel((4, 2, 3)), (1, 1, 1)).ref.areas.sum() == pytest.approx(8 * triangle)
    assert surfel_areas((2, 3, 5))[0b11110000] == pytest.approx(3 * 5)  # a face across the slices
    assert surfel_areas((2, 3, 5))[0b11001100] == pytest.approx(2 * 5)
    assert surfel_areas((2, 3, 5))[0b10101010] == pytest.approx(2 * 3)


def test_two_voxels_three_slices_apart_by_hand() -> None:
    # cells above and below each voxel: from the nearer ones 2 slices to the other voxel's, from the others 3
    between = surfaces(voxel((2, 2, 2)), voxel((5, 2, 2)), (2.0, 0.7, 0.9))
    assert between.hausdorff_mm(95) == 6
    assert between.hausdorff_mm(50) == 4
    assert between.average_mm() == pytest.approx(5)
    assert between.dice(3.99) == 0
    assert between.dice(4) == pytest.approx(0.5)
    assert between.dice(6) == 1


def test_distances_far_beyond_the_nearest_ones() -> None:
    rng = np.random.default_rng(0)
    pred, ref = np.zeros((2, 60, 40, 12), bool)
    pred[2:20, 3:30, 2:8] = rng.random((18, 27, 6)) > 0.4
    ref[50:57, 20:38, 5:11] = rng.random((7, 18, 6)) > 0.4
    ref[20, 3, 3] = True
    spacing = (1.5, 2.0, 0.8)
    between = surfaces(pred, ref, spacing)
    edges = [
        ndimage.binary_dilation(m, np.ones((2, 2, 2))) & ndimage.binary_dilation(~m, np.ones((2, 2, 2)))
        for m in (pred, ref)
    ]
    distances = cdist(*(np.argwhere(edge) * spacing for edge in edges))
    np.testing.assert_allclose(between.pred.distances, np.sort(distances.min(1)), atol=1e-9)
    np.testing.assert_allclose(between.ref.distances, np.sort(distances.min(0)), atol=1e-9)
    assert between.ref.distances.max() > 40


def test_nothing_against_nothing_and_something() -> None:
    nothing, something = voxel(), voxel((1, 1, 1))
    both, one = surfaces(nothing, nothing, (1, 1, 1)), surfaces(nothing, something, (1, 1, 1))
    assert (both.dice(1), both.hausdorff_mm(95), both.average_mm()) == (1, None, None)
    assert (one.dice(1), one.hausdorff_mm(95), one.average_mm()) == (0, None, None)
    assert surfaces(something, nothing, (1, 1, 1)).dice(1) == 0


def test_masks_at_the_border_and_over_the_whole_volume() -> None:
    full = np.ones((3, 4, 5), bool)
    half = full.copy()
    half[:, 2:] = False
    agree_with_the_organizers(full, half, (1.0, 2.0, 3.0), 2.5)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"\(1, 2, 2\).*\(1, 2, 3\)"):
        surfaces(np.ones((1, 2, 2), bool), np.ones((1, 2, 3), bool), (1, 1, 1))


@cache
def real_labels(folder: Path, case: str) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Every second row and column of a real label map, with a cyst in a kidney."""
    volume = read_labels(folder / "kits19" / case / "segmentation.nii.gz", case)
    labels, (z, y, x) = volume.array[:, ::2, ::2].copy(), volume.geometry.spacing
    spacing = (z, 2 * y, 2 * x)
    kidney = np.argwhere(labels == 1)
    ball = np.linalg.norm((np.indices(labels.shape).T - kidney[len(kidney) // 3]) * spacing, axis=-1).T < 12
    labels[ball & (labels == 1)] = 3
    return labels, spacing


def shifted(labels: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    return np.roll(labels, [(0, 1, -1), (1, 0, 2), (-1, 3, 1), (4, 0, 0)][number], (0, 1, 2)), labels


def eroded(labels: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    inside = ndimage.binary_erosion(labels > 0, iterations=1 + number % 2)
    tumor = ndimage.binary_erosion(labels == 2)
    return np.where(inside, np.where((labels == 2) & ~tumor, 1, labels), 0), labels


def without_lesion(labels: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    return np.where(labels == (2, 3)[number % 2], (0, 1)[number // 2], labels), labels


def with_blob(labels: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    pred = labels.copy()
    place = [(2, 5, 5), (10, 100, 128), (0, 0, 0), (15, 200, 30)][number]
    pred[tuple(slice(start, start + 4 + 3 * axis) for axis, start in enumerate(place))] = (2, 3, 1, 2)[number]
    return pred, labels


def emptied(labels: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    nothing, no_mass, no_tumor = np.zeros_like(labels), labels > 0, np.where(labels == 2, 1, labels)
    return [(nothing, labels), (labels, no_mass), (no_tumor, no_tumor), (nothing, nothing)][number]


def agree_with_the_organizers(
    pred: np.ndarray, ref: np.ndarray, spacing: tuple[float, float, float], tolerance: float
) -> dict[str, float | None]:
    """The four figures by the organizers' code, which ours must equal; None where it has no number."""
    found = oracle.compute_surface_distances(ref, pred, spacing)
    with np.errstate(invalid="ignore"):
        figures = {
            "dice": oracle.compute_dice_coefficient(ref, pred),
            "surface_dice": oracle.compute_surface_dice_at_tolerance(found, tolerance),
            "hd95_mm": oracle.compute_robust_hausdorff(found, 95),
            "assd_mm": np.mean(oracle.compute_average_surface_distance(found)),
        }
    between = surfaces(pred, ref, spacing)
    ours = {
        "surface_dice": between.dice(tolerance),
        "hd95_mm": between.hausdorff_mm(95),
        "assd_mm": between.average_mm(),
    }
    known = {name: float(value) for name, value in figures.items() if np.isfinite(value)}
    if pred.any() and ref.any():
        assert ours == pytest.approx({name: known[name] for name in ours}, abs=1e-6)
    return {name: known.get(name) for name in figures}


@pytest.mark.parametrize("case", ["case_00061", "case_00038", "case_00110", "case_00148"])
@pytest.mark.parametrize("change", [shifted, eroded, without_lesion, with_blob, emptied])
def test_scores_equal_the_organizers_code_on_real_labels(
    change, case: str, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("Inf", np.inf), ("NaN", np.nan)):  # their released code uses these, numpy 2 has them no more
        monkeypatch.setattr(np, name, value, raising=False)
    labels, spacing = real_labels(shared, case)
    number = ("case_00061", "case_00038", "case_00110", "case_00148").index(case)
    pred, ref = (np.asarray(array, np.uint8) for array in change(labels, number))
    scored = score(pred, ref, spacing, PROTOCOLS["kits23"], KITS23).metrics
    assert list(scored) == [*CLASSES, "cyst"]
    for name, (ids, tolerance) in CLASSES.items():
        found, truth = np.isin(pred, ids), np.isin(ref, ids)
        expected = agree_with_the_organizers(found, truth, spacing, tolerance)
        if not found.any() and not truth.any():
            expected |= {"dice": 1, "surface_dice": 1}  # by the challenge's rule; the code has no answer
        assert {key: scored[name][key] for key in expected} == pytest.approx(expected, abs=1e-6)
