"""Kidneys and lesions measured: analytic shapes in every orientation, and small label maps that a reader can check."""

from __future__ import annotations

import csv
import json
import tracemalloc
from pathlib import Path

import nibabel
import numpy as np
import pytest
from conftest import kitseg
from shapes import LEFT_KIDNEY, ORIENTATIONS, RIGHT_KIDNEY, Ellipsoid, ball, lattice, paint

from kitseg.labels import CYST, KIDNEY, TUMOR
from kitseg.measurement.diameters import axial_diameter, diameter
from kitseg.measurement.findings import Findings
from kitseg.measurement.lesions import size_class
from kitseg.measurement.measure import measure
from kitseg.types import Geometry
from kitseg.volumes.nifti import canonical_geometry, turn_to_canonical

SPACINGS = [(1.5, 0.9, 0.9), (3.0, 0.7, 0.7), (5.0, 0.8, 0.8)]
SOLE = ball((-88, -12, 12), 22)  # on the outside of the left kidney
BIT = ball((60, 0, -4), 13)  # within the right one
TILTS = [(0, 0, 0), (0, 0, 20), (15, -10, 5)]


def block(shape: tuple[int, int, int] = (20, 40, 100), spacing: float = 2.0) -> tuple[np.ndarray, Geometry]:
    """An empty label map in (I, P, L), the frame's middle at x = 0: column 0 is farthest to the right."""
    affine = np.array([[0, 0, -1, 0], [0, -1, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 1]]) * spacing
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    affine[3, 3] = 1
    return np.zeros(shape, np.uint8), Geometry(shape, affine)


def sides(findings: Findings) -> list[str]:
    return [kidney.side for kidney in findings.kidneys]


# --- analytic shapes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("degrees", TILTS)
def test_volumes_of_analytic_shapes(spacing: tuple[float, float, float], degrees: tuple[float, float, float]) -> None:
    far = ball((-20, 35, 10), 22)  # touches nothing
    geometry = lattice(spacing=spacing, degrees=degrees, size=(220, 160, 170))
    found = measure(paint(geometry, RIGHT_KIDNEY, LEFT_KIDNEY, far), geometry)
    assert sides(found) == ["right", "left"]
    right, left = found.kidneys
    assert right.volume_ml == right.parenchyma_ml == pytest.approx(RIGHT_KIDNEY.ml, rel=0.01)
    assert left.parenchyma_ml == pytest.approx(LEFT_KIDNEY.ml, rel=0.01)
    assert left.volume_ml == pytest.approx(LEFT_KIDNEY.ml + far.ml, rel=0.01)
    (lesion,) = found.lesions
    assert lesion.volume_ml == pytest.approx(far.ml, rel=0.01)
    assert (lesion.side, lesion.exophytic, lesion.contact_mm2) == ("left", 1, 0)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("radii", [(20, 20, 20), (30, 15, 12), (12, 30, 15), (15, 12, 30)])
@pytest.mark.parametrize("degrees", TILTS)
def test_diameters_within_a_voxel(
    spacing: tuple[float, float, float], radii: tuple[float, float, float], degrees: tuple[float, float, float]
) -> None:
    geometry = lattice(spacing=spacing, degrees=degrees, size=(80, 80, 80))
    mask = paint(geometry, Ellipsoid((0.4, -8.1, 6.5), radii, TUMOR)) > 0
    assert diameter(mask, geometry.spacing) == pytest.approx(2 * max(radii), abs=max(spacing))
    if degrees == (0, 0, 0):
        z = geometry.affine[2, 3] + geometry.affine[2, 0] * np.arange(geometry.shape[0])
        nearest = np.abs(z - 6.5).min() / radii[2]  # the slice that shows the largest part of the ellipsoid
        largest = 2 * max(radii[:2]) * np.sqrt(1 - nearest**2)
        assert axial_diameter(mask, geometry.spacing) == pytest.approx(largest, abs=spacing[1])


def test_diameters_by_hand() -> None:
    mask = np.zeros((3, 4, 6), np.bool_)
    assert axial_diameter(mask, (5, 1, 1)) == diameter(mask, (5, 1, 1)) == 0
    mask[1, 2, :] = True  # six voxels in a row: five steps, and a quarter of a voxel at both ends
    assert axial_diameter(mask, (5, 1, 1)) == diameter(mask, (1, 1, 1)) == pytest.approx(5.5)
    mask[:, 2, 0] = True
    assert axial_diameter(mask, (5, 1, 1)) == pytest.approx(5.5)
    assert diameter(mask, (5, 1, 1)) == pytest.approx(10 + 2.5)


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_sides_in_every_orientation(codes: str) -> None:
    native = lattice(codes, spacing=(5, 3, 3))
    labels = paint(native, RIGHT_KIDNEY, LEFT_KIDNEY, SOLE, BIT)
    found = measure(np.ascontiguousarray(turn_to_canonical(labels, native)), canonical_geometry(native))
    right, left = found.kidneys
    assert (right.side, left.side) == ("right", "left")
    assert right.volume_ml == pytest.approx(RIGHT_KIDNEY.ml, rel=0.02)
    assert [lesion.side for lesion in found.lesions] == ["left", "right"]
    assert [lesion.volume_ml for lesion in found.lesions] == pytest.approx([SOLE.ml, BIT.ml], rel=0.03)
    assert sides(measure(labels, native)) == ["right", "left"]  # also with the array's axes in any other order


@pytest.mark.parametrize("degrees", [(0, 0, 40), (25, 30, -40)])
def test_sides_follow_the_affine_where_the_scan_is_tilted(degrees: tuple[float, float, float]) -> None:
    geometry = lattice(spacing=(4, 3, 3), size=(220, 200, 220), degrees=degrees)
    one = measure(paint(geometry, LEFT_KIDNEY, SOLE), geometry)
    assert (sides(one), one.lesions[0].side) == (["left"], "left")
    both = measure(paint(geometry, LEFT_KIDNEY, RIGHT_KIDNEY, BIT), geometry)
    assert (sides(both), both.lesions[0].side) == (["right", "left"], "right")


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 0.7, 0.7), (5.0, 0.8, 0.8)])
@pytest.mark.parametrize("radius", [15, 20])
def test_a_ball_half_buried(spacing: tuple[float, float, float], radius: float) -> None:
    """In the flat side of a block: half of it is outside, and half of its surface touches."""
    geometry = lattice(spacing=spacing, size=(100, 80, 90), centre=(0, 0, 0))
    x = (geometry.affine[0, :3] @ np.moveaxis(np.indices(geometry.shape), 0, -2)) + geometry.affine[0, 3]
    labels = np.where(x < 0, KIDNEY, 0).astype(np.uint8)
    labels[paint(geometry, ball((0, 0, 0), radius)) > 0] = TUMOR
    (lesion,) = measure(labels, geometry).lesions
    assert lesion.exophytic == pytest.approx(0.5, abs=0.03)
    assert lesion.contact_mm2 == pytest.approx(2 * np.pi * radius**2, rel=0.05)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (5.0, 0.8, 0.8)])
def test_a_ball_all_inside(spacing: tuple[float, float, float]) -> None:
    geometry = lattice(spacing=spacing, size=(120, 120, 120), centre=(-70, 0, 0))
    whole, within = Ellipsoid((-70, 0, 0), (40, 40, 50), KIDNEY), ball((-70, 0, 0), 20)
    (lesion,) = measure(paint(geometry, whole, within), geometry).lesions
    assert lesion.exophytic == 0
    assert lesion.contact_mm2 == pytest.approx(4 * np.pi * 20**2, rel=0.05)


# --- sides of what isn't two plain kidneys ----------------------------------------------------------------------------


def test_a_single_kidney_is_on_its_side_of_the_frame_or_of_the_body() -> None:
    """Where a CT shows that the body fills the left half of the frame, its middle is column 75."""
    for columns, side in ((slice(10, 35), "right"), (slice(65, 90), "left")):
        labels, geometry = block()
        labels[5:15, 10:25, columns] = KIDNEY
        assert sides(measure(labels, geometry)) == [side]
    labels, geometry = block()
    labels[5:15, 10:25, 54:70] = KIDNEY
    hu = np.full(labels.shape, -1000, np.int16)
    hu[:, :, 50:] = 40
    assert sides(measure(labels, geometry)) == ["left"]
    assert sides(measure(labels, geometry, hu)) == ["right"]


def test_a_fragment_belongs_to_the_nearer_kidney() -> None:
    labels, geometry = block()
    labels[5:15, 10:25, 10:35] = KIDNEY
    labels[5:15, 10:25, 65:90] = KIDNEY
    labels[10, 18, 47] = KIDNEY  # 12 voxels from the right kidney, 17 from the left one
    labels[10, 18, 53] = KIDNEY
    right, left = measure(labels, geometry).kidneys
    assert right.volume_ml == pytest.approx((3750 + 1) * 0.008)
    assert left.volume_ml == pytest.approx((3750 + 1) * 0.008)


def test_a_tumor_that_joins_both_kidneys_belongs_to_the_one_that_it_touches_more() -> None:
    labels, geometry = block()
    labels[5:15, 10:25, 10:35] = KIDNEY
    labels[5:15, 10:25, 65:90] = KIDNEY
    labels[5:15, 10:25, 36:64] = TUMOR
    labels[9:11, 15:17, 64] = TUMOR
    labels[5:15, 10:25, 35] = TUMOR
    found = measure(labels, geometry)
    right, left = found.kidneys
    assert [lesion.side for lesion in found.lesions] == ["right"]
    assert (right.parenchyma_ml, left.parenchyma_ml) == (pytest.approx(30), pytest.approx(30))
    assert left.volume_ml == left.parenchyma_ml


def test_a_horseshoe_kidney_is_cut_at_its_isthmus() -> None:
    labels, geometry = block()
    labels[5:15, 10:25, 10:35] = KIDNEY
    labels[5:15, 10:25, 65:90] = KIDNEY
    labels[13:15, 22:25, 35:65] = KIDNEY
    right, left = measure(labels, geometry).kidneys
    assert right.volume_ml == pytest.approx(left.volume_ml, rel=0.02)
    assert right.volume_ml + left.volume_ml == pytest.approx((7500 + 180) * 0.008)


def test_pieces_on_one_side_are_one_kidney() -> None:
    labels, geometry = block()
    labels[5:15, 10:30, 52:99] = KIDNEY
    labels[5:15, 10:30, 55:96] = TUMOR  # leaves a piece on either side
    found = measure(labels, geometry)
    assert sides(found) == ["left"]
    assert found.lesions[0].side == "left"
    labels, geometry = block()
    labels[2:9, 10:30, 60:90] = KIDNEY
    labels[11:18, 10:30, 60:90] = KIDNEY
    (kidney,) = measure(labels, geometry).kidneys
    assert (kidney.side, kidney.volume_ml) == ("left", pytest.approx(2 * 4200 * 0.008))


# --- lesions ----------------------------------------------------------------------------------------------------------


def test_lesions_in_their_order() -> None:
    labels, geometry = block()
    labels[2:18, 5:30, 60:95] = KIDNEY
    labels[3:7, 10:14, 65:69] = CYST  # 64 voxels
    labels[10:13, 10:13, 65:68] = TUMOR  # 27
    labels[10:14, 20:24, 80:83] = TUMOR  # 48
    labels[15, 7, 90:96] = TUMOR  # 6: a speck of 0.048 ml
    found = measure(labels, geometry)
    listed = [(lesion.number, lesion.kind, round(lesion.volume_ml / 0.008)) for lesion in found.lesions]
    assert listed == [(1, "tumor", 48), (2, "tumor", 27), (3, "cyst", 64)]
    assert [lesion.size_class for lesion in found.lesions] == ["T1a", "T1a", None]
    assert (found.lesions[0].box.start, found.lesions[0].box.stop) == ((10, 20, 80), (14, 24, 83))
    (kidney,) = found.kidneys
    assert kidney.volume_ml == pytest.approx((16 * 25 * 35 + 1) * 0.008)
    assert kidney.parenchyma_ml == pytest.approx((16 * 25 * 35 - 64 - 27 - 48 - 5) * 0.008)


def test_the_centre_is_a_voxel_of_the_lesion() -> None:
    labels, geometry = block()
    labels[5:15, 10:30, 60:90] = TUMOR
    labels[5:15, 14:26, 60:86] = 0  # what is left is open on one side
    (lesion,) = measure(labels, geometry).lesions
    assert labels[lesion.centre] == TUMOR
    assert (lesion.exophytic, lesion.contact_mm2) == (None, None)


def test_hu_of_a_lesion() -> None:
    labels, geometry = block()
    labels[5:15, 10:30, 60:90] = KIDNEY
    labels[8:12, 15:19, 70:74] = TUMOR
    hu = np.full(labels.shape, 150, np.int16)
    hu[8:10, 15:19, 70:74], hu[10:12, 15:19, 70:74] = 30, 50
    (lesion,) = measure(labels, geometry, hu).lesions
    assert (lesion.hu_mean, lesion.hu_sd) == (pytest.approx(40), pytest.approx(10))
    (blind,) = measure(labels, geometry).lesions
    assert (blind.hu_mean, blind.hu_sd) == (None, None)


def test_noise_all_through_a_scan_takes_little_memory() -> None:
    shape = (80, 256, 256)
    drawn = np.random.default_rng(0).random(shape, np.float32)
    labels = np.select([drawn < 0.3, drawn < 0.6], [TUMOR, KIDNEY]).astype(np.uint8)
    tracemalloc.start()
    found = measure(labels, Geometry(shape, np.diag([-1.0, -1.0, -1.0, 1.0])[[2, 1, 0, 3]]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 24 * labels.size
    assert found.lesions[0].contact_mm2 is None, "a surface of so many faces isn't made"
    assert found.lesions[0].volume_ml == pytest.approx((labels == TUMOR).sum() / 1000, rel=1e-3)


@pytest.mark.parametrize(
    ("mm", "expected"),
    [(40, "T1a"), (40.1, "T1b"), (70, "T1b"), (70.1, "T2a"), (100, "T2a"), (100.1, "T2b"), (5, "T1a")],
)
def test_size_classes(mm: float, expected: str) -> None:
    assert size_class(mm) == expected


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same patient in five orientations, one of them oblique, with a CT each."""
    folder = tmp_path_factory.mktemp("maps")
    grids = {codes: lattice(codes, spacing=(5, 0.9, 0.9)) for codes in ("IPL", "LPS", "RAS", "SAR")}
    grids["tilted"] = lattice("LPS", spacing=(5, 0.9, 0.9), degrees=(8, -5, 12), size=(250, 150, 180))
    for name, geometry in grids.items():
        labels = paint(geometry, RIGHT_KIDNEY, LEFT_KIDNEY, SOLE, BIT)
        hu = np.where(labels == TUMOR, 80, np.where(labels == KIDNEY, 160, 20)).astype(np.int16)
        for kind, array in (("labels", labels), ("ct", hu)):
            (folder / kind).mkdir(exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(array, geometry.affine), folder / kind / f"{name}.nii.gz")
    return folder


def test_measure_on_files_of_any_orientation(maps: Path, tmp_path: Path) -> None:
    options = ("--ct", str(maps / "ct"), "--jobs=1", "--csv=out.csv", "--json=out.json")
    done = kitseg(tmp_path, "measure", str(maps / "labels"), *options)
    assert done.code == 0, done.text
    assert done.text.count("tumor 1") == 5
    cases = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert sorted(cases) == ["IPL", "LPS", "RAS", "SAR", "tilted"]
    for found in cases.values():
        right, left = found["kidneys"]
        assert (right["side"], left["side"]) == ("right", "left")
        assert right["volume_ml"] == pytest.approx(RIGHT_KIDNEY.ml, rel=0.01)
        first, second = found["lesions"]
        assert (first["side"], second["side"]) == ("left", "right")
        for lesion, shape in ((first, SOLE), (second, BIT)):
            assert lesion["volume_ml"] == pytest.approx(shape.ml, rel=0.01 if shape is SOLE else 0.02)
            assert lesion["diameter_mm"] == pytest.approx(2 * shape.radii[0], abs=5)
            assert lesion["axial_mm"] == pytest.approx(2 * shape.radii[0], abs=0.9)
            assert (lesion["hu_mean"], lesion["hu_sd"]) == (80, 0)
        assert second["exophytic"] < 0.01 < 0.5 < first["exophytic"]
        assert (first["size_class"], second["size_class"]) == ("T1b", "T1a")
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["kind"] for row in rows] == ["kidney", "kidney", "tumor", "tumor"] * 5
    assert rows[2]["volume_ml"] == str(cases["IPL"]["lesions"][0]["volume_ml"])


def test_a_broken_file_does_not_stop_the_others(maps: Path, tmp_path: Path) -> None:
    good = (maps / "labels" / "IPL.nii.gz").read_bytes()
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "a.nii.gz").write_bytes(good[:1000])
    (tmp_path / "maps" / "b.nii.gz").write_bytes(good)
    done = kitseg(tmp_path, "measure", "maps", "--jobs=1", "--json=out.json")
    assert done.code == 1
    written = json.loads((tmp_path / "out.json").read_text())
    assert (list(written["cases"]), list(written["failed"])) == (["b"], ["a"])
    assert "a.nii.gz" in written["failed"]["a"]
    files = str(maps / "labels" / "IPL.nii.gz"), "--ct", str(maps / "ct" / "tilted.nii.gz")
    other = kitseg(tmp_path, "measure", *files, "--jobs=1")
    assert other.code == 1
    assert "another grid" in other.text


def test_cysts_need_their_scheme(tmp_path: Path) -> None:
    geometry = lattice(spacing=(5, 3, 3))
    labels = paint(geometry, LEFT_KIDNEY, ball((-80, 0, 0), 15, CYST))
    nibabel.save(nibabel.Nifti1Image(labels, geometry.affine), tmp_path / "one.nii.gz")
    assert "kits23" in kitseg(tmp_path, "measure", "one.nii.gz", "--jobs=1").text
    done = kitseg(tmp_path, "measure", "one.nii.gz", "--labels=kits23", "--jobs=1")
    assert done.code == 0
    assert "cyst 1" in done.text


#: Boxes over the same rows: label, slices, columns; and the kidneys' ml by side, the lesions' sides.
BOXES = {
    "a large false tumor beside the only kidney": (
        [(KIDNEY, slice(5, 35), slice(80, 92)), (TUMOR, slice(5, 25), slice(112, 118))], {"left": 172.8}, ["left"]
    ),
    "a small kidney across the body": (
        [(KIDNEY, slice(5, 35), slice(25, 37)), (KIDNEY, slice(5, 10), slice(85, 90))], {"right": 129.6, "left": 9}, []
    ),
    "a kidney in two pieces and the other one": (
        [*((KIDNEY, slice(z, z + 12), slice(25, 37)) for z in (5, 20)), (KIDNEY, slice(5, 20), slice(85, 91))],
        {"right": 103.7, "left": 32.4}, [],
    ),
    "a tumor alone in the bed of the other kidney": (
        [(KIDNEY, slice(5, 35), slice(25, 37)), (TUMOR, slice(5, 11), slice(85, 92))], {"right": 129.6}, ["left"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BOXES)
def test_sides_of_boxes(name: str) -> None:
    boxes, kidneys, lesions = BOXES[name]
    geometry = Geometry((40, 40, 120), np.array([[0, 0, -2.0, 119], [0, -2, 0, 40], [-3, 0, 0, 0], [0, 0, 0, 1]]))
    labels = np.zeros(geometry.shape, np.uint8)
    for label, slices, columns in boxes:
        labels[slices, 5:35, columns] = label
    found = measure(labels, geometry)
    assert {kidney.side: round(kidney.volume_ml, 1) for kidney in found.kidneys} == kidneys
    assert [lesion.side for lesion in found.lesions] == lesions


def test_an_empty_case_has_a_row(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)), tmp_path / "case_00000.nii.gz")
    done = kitseg(tmp_path, "measure", "case_00000.nii.gz", "--csv=f.csv")
    assert done.code == 0, done.text
    assert "nothing found" in done.text
    (row,) = csv.DictReader((tmp_path / "f.csv").open())
    assert (row["case"], row["kind"], row["note"]) == ("case_00000", "", "nothing found")


def test_doubts_about_the_labels(tmp_path: Path) -> None:
    geometry = lattice(spacing=(5, 2, 2))
    labels = paint(geometry, RIGHT_KIDNEY, LEFT_KIDNEY)
    far = paint(geometry, RIGHT_KIDNEY, LEFT_KIDNEY, ball((62, 30, 5), 5))
    for name, array in (("whole", labels), ("cut", labels[:20]), ("far", far)):
        nibabel.save(nibabel.Nifti1Image(array, geometry.affine), tmp_path / f"{name}.nii.gz")
    done = kitseg(tmp_path, "measure", ".", "--csv=f.csv", "--json=f.json", "--jobs=1")
    assert done.code == 0, done.text
    said = "kidney or tumor reaches the edge of the scan (bottom) and may be cut off: sizes are lower bounds, and what "
    said += "follows from them (size class, scores, function after surgery) may be wrong"
    assert f"cut: {said}" in " ".join(done.text.split())
    cases = json.loads((tmp_path / "f.json").read_text())["cases"]
    apart = ["0.5 ml of tumor are separate from the kidneys, up to 12 mm from them"]
    assert {name: case.get("doubts", []) for name, case in cases.items()} == {"cut": [said], "far": apart, "whole": []}
    with (tmp_path / "f.csv").open() as file:
        assert {row["case"]: row["note"] for row in csv.DictReader(file)} == {"cut": said, "far": apart[0], "whole": ""}
