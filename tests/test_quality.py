"""Quality flags: each rule on a label map where it can be checked by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kitseg.measurement.findings import LEFT, RIGHT, Findings, Kidney, Lesion
from kitseg.measurement.flags import Flag, Quality
from kitseg.measurement.measure import measure
from kitseg.measurement.model_flags import Outlined, TrainingDomain, tumor_size_flags
from kitseg.measurement.quality import assess, doubts
from kitseg.types import Box, Geometry
from kitseg.volumes.nifti import read_labels

SHAPE, SPACING = (40, 60, 80), (4.0, 2.5, 2.5)
GEOMETRY = Geometry(SHAPE, np.diag([*SPACING, 1.0]))  # a voxel has 0.025 ml
LYING = Geometry(SHAPE, np.array([[0, 0, -2.5, 100], [0, -2.5, 0, 0], [-4, 0, 0, 0], [0, 0, 0, 1]]))
TISSUE = np.full(SHAPE, 40, np.int16)
BOTH = Findings((Kidney(RIGHT, 150.0, 150.0), Kidney(LEFT, 150.0, 150.0)), ())
TRAINED = TrainingDomain(slice_mm=(1.0, 5.0), pixel_mm=(0.6, 2.5), kidney_hu=(120.0, 200.0), aorta_hu=(180.0, 320.0))


def two_kidneys() -> np.ndarray:
    """Two boxes of 6000 voxels, 150 ml each, well inside the scan."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[5:35, 20:40, 10:20] = 1
    labels[5:35, 20:40, 60:70] = 1
    return labels


def flags(
    labels: np.ndarray,
    findings: Findings = BOTH,
    hu: np.ndarray | None = None,
    agreement: dict[str, float] | None = None,
    training_domain: TrainingDomain | None = None,
) -> dict[str, Flag]:
    quality = assess(labels, hu, GEOMETRY, findings, agreement, training_domain)
    assert len({flag.name for flag in quality.flags}) == len(quality.flags)
    return {flag.name: flag for flag in quality.flags}


def test_two_kidneys_with_a_tumor_are_green() -> None:
    labels = two_kidneys()
    labels[10:14, 20:26, 20:24] = 2
    quality = assess(labels, None, GEOMETRY, BOTH, {"kidney": 0.97, "tumor": 0.85}, TRAINED)
    assert quality == Quality((), None)
    assert quality.level == "green"


def test_no_kidney_is_red() -> None:
    quality = assess(np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.int16), GEOMETRY, Findings((), ()), None, TRAINED)
    (flag,) = quality.flags
    assert (flag.name, flag.level, quality.level, quality.phase) == ("no-kidney", "red", "red", None)
    assert "no voxel is labelled kidney" in flag.reason


def test_a_crumb_is_no_kidney() -> None:
    labels = np.zeros(SHAPE, np.uint8)
    labels[10:14, 20:30, 20:30] = 1
    found = flags(labels, Findings((Kidney(RIGHT, 10.0, 10.0),), ()))
    assert list(found) == ["no-kidney"]
    assert "10.0 ml" in found["no-kidney"].reason


def test_a_single_kidney_is_amber_with_its_side() -> None:
    labels = two_kidneys()
    labels[..., 40:] = 0
    found = flags(labels, Findings((Kidney(RIGHT, 150.0, 150.0),), ()))
    assert found["single-kidney"].level == "amber"
    assert "right kidney" in found["single-kidney"].reason
    assert "150 ml" in found["single-kidney"].reason
    findings = measure(labels, LYING)
    (doubt,) = doubts(labels, LYING, findings, None)
    assert doubt.startswith("only a right kidney was found (150 ml)")
    assert "the only kidney's side is by the middle of the frame" in doubt
    assert doubts(labels, LYING, findings, TISSUE) == ()
    (other,) = doubts(labels, LYING, findings, TISSUE - 140)  # as in the scan of another patient
    assert other.startswith("the kidney outlines lie over fat or air (-100 HU)")


@pytest.mark.parametrize(("slices", "third"), [(8, True), (7, False)])
def test_a_third_kidney_has_20_ml(slices: int, third: bool) -> None:
    labels = two_kidneys()
    labels[10 : 10 + slices, 25:35, 35:45] = 1  # 2.5 ml a slice
    found = flags(labels)
    assert ("third-kidney" in found) == third
    if third:
        assert found["third-kidney"].level == "red"
        assert "3 separate parts" in found["third-kidney"].reason
        assert "150, 150, 20 ml" in found["third-kidney"].reason


def test_two_kidneys_on_one_side_are_not_measured_as_one_in_silence() -> None:
    labels = np.zeros(SHAPE, np.uint8)
    labels[5:35, 20:40, 10:20] = labels[5:35, 20:40, 26:36] = 1  # 40 mm apart, both right of the midline
    findings = measure(labels, LYING)
    assert [(kidney.side, round(kidney.volume_ml)) for kidney in findings.kidneys] == [(RIGHT, 300)]
    found = flags(labels, findings)
    assert "2 separate parts are as large as a kidney (150, 150 ml)" in found["third-kidney"].reason
    assert doubts(labels, LYING, findings, TISSUE)[0].startswith("2 separate parts are as large as a kidney")


def test_a_third_kidney_beside_a_horseshoe_kidney() -> None:
    labels = two_kidneys()
    labels[20:22, 38:40, 20:60] = 1
    labels[28:36, 45:55, 5:15] = 1
    findings = measure(labels, LYING)
    assert [round(kidney.volume_ml) for kidney in findings.kidneys] == [172, 152]
    assert list(flags(labels, findings)) == ["third-kidney", "joined-kidneys"]


def test_a_part_that_was_cut_into_both_kidneys_is_amber() -> None:
    labels = two_kidneys()
    labels[20:22, 38:40, 20:60] = 1  # 4 ml between them
    labels[18:24, 36:40, 40:60] = 1  # thin on the right alone: 12 ml
    findings = measure(labels, LYING)
    assert [round(kidney.volume_ml) for kidney in findings.kidneys] == [151, 163]
    found = flags(labels, findings)
    assert (list(found), found["joined-kidneys"].level) == (["joined-kidneys"], "amber")
    assert "One part of 314 ml reaches to both sides" in found["joined-kidneys"].reason
    assert doubts(labels, LYING, findings, TISSUE)[0].startswith("one part of 314 ml reaches to both sides")
    assert doubts(two_kidneys(), LYING, measure(two_kidneys(), LYING), None) == ()


def test_a_third_kidney_is_a_doubt_of_measurements() -> None:
    labels = two_kidneys()
    labels[10:20, 25:35, 35:45] = 1
    (doubt,) = doubts(labels, LYING, measure(labels, LYING), TISSUE)
    assert doubt == "3 separate parts are as large as a kidney (150, 150, 25 ml): a side's figures are of two"


@pytest.mark.parametrize(("column", "gap", "level"), [(23, 10, "amber"), (24, 12, "red"), (35, 40, "red")])
def test_a_tumor_apart_from_the_kidneys(column: int, gap: int, level: str) -> None:
    labels = two_kidneys()
    labels[10:14, 20:24, column : column + 4] = 2  # 64 voxels; the kidney ends at column 19
    (flag,) = flags(labels).values()
    assert (flag.name, flag.level) == ("tumor-far", level)
    assert "1.6 ml of tumor" in flag.reason
    assert re.search(rf"\b{gap} mm", flag.reason)


def test_a_tumor_that_touches_a_kidney_or_is_a_speck_is_no_doubt() -> None:
    labels = two_kidneys()
    labels[10:14, 18:20, 20:24] = 2  # touches by an edge
    labels[20, 50, 40:43] = 2  # 0.075 ml
    assert not flags(labels)


@pytest.mark.parametrize(
    ("rows", "left", "column", "reason"),
    [
        (10, 0, 20, ": 5 ml (slice 12 from the head)."),  # beside the kidney
        (10, 0, 18, ": 5 ml (slice 12 from the head)."),  # half of it in the kidney
        (9, 0, 20, ""),  # 4.6 ml
        (10, 1, 20, ""),  # a voxel of it is left
        (10, 0, 25, ""),  # no kidney touches it
        (41, 0, 25, ": 21 ml (slice 12 from the head)."),  # nor this one, but it may have been a kidney
    ],
)
def test_a_tumor_that_post_processing_removed(rows: int, left: int, column: int, reason: str) -> None:
    outlined, labels = np.zeros(SHAPE, np.bool_), two_kidneys()
    outlined[9:14, 18 : 18 + rows, column : column + 4] = True
    outlined[11, 17, column : column + 4] = True  # the largest slice
    outlined[20, 45:55, 30:40] = True  # 2.5 ml, too little by itself
    labels[9, 20, column : column + left] = 2
    region = Box((8, 10, 5), (30, 60, 75))
    quality = assess(
        labels, None, GEOMETRY, BOTH, None, None, Outlined(outlined[region.slices], Box(region.start, region.stop))
    )
    flags = [flag for flag in quality.flags if flag.name != "region-border"]
    assert [(flag.name, flag.level) for flag in flags] == [("removed-tumor", "amber")] * bool(reason)
    assert all(flag.reason.endswith(f"{reason} Look at it.") for flag in flags)


def test_of_many_removed_parts_the_largest_are_named() -> None:
    outlined = np.zeros(SHAPE, np.bool_)
    for n, row in enumerate((2, 17, 32, 47)):
        outlined[2 + 9 * n : 10 + 9 * n, row : row + 10 + n % 2, 30:40] = True  # 20 and 22 ml
    (flag,) = assess(two_kidneys(), None, GEOMETRY, BOTH, None, None, Outlined(outlined, Box((0, 0, 0), SHAPE))).flags
    places = "22 ml (slice 12 from the head), 22 ml (slice 30 from the head), 20 ml (slice 3 from the head)"
    assert flag.reason == f"Post-processing removed what may be a tumor: {places}, and 1 more. Look at it."


@pytest.mark.parametrize(
    ("region", "sides"),
    [
        (Box((0, 0, 0), SHAPE), ""),
        (Box((4, 19, 9), (36, 41, 71)), ""),
        (Box((5, 19, 9), (36, 41, 70)), "top, left"),
        (Box((4, 20, 10), (35, 40, 71)), "bottom, front, back, right"),
    ],
)
def test_a_kidney_at_the_border_of_the_region(region: Box, sides: str) -> None:
    quality = assess(two_kidneys(), None, GEOMETRY, BOTH, None, None, Outlined(np.zeros(SHAPE, np.bool_), region))
    assert [(flag.name, flag.level) for flag in quality.flags] == [("region-border", "amber")] * bool(sides)
    assert all(f"border ({sides})" in flag.reason for flag in quality.flags)


def test_the_edge_of_the_scan_is_no_border_of_the_region() -> None:
    labels = two_kidneys()
    labels[0:5, 30, 12:14] = 1
    nothing = Outlined(np.zeros(SHAPE, np.bool_), Box((0, 19, 9), (36, 41, 71)))
    assert [flag.name for flag in assess(labels, None, GEOMETRY, BOTH, None, None, nothing).flags] == ["cut-off"]


def test_a_crumb_of_kidney_on_a_tumor_does_not_make_it_a_kidneys() -> None:
    labels = two_kidneys()
    labels[10:14, 20:24, 35:39] = 2
    labels[10, 20:24, 39] = 1
    assert flags(labels)["tumor-far"].level == "red"


@pytest.mark.parametrize(
    ("axis", "index", "edge"),
    [(0, 0, "top"), (0, -1, "bottom"), (1, 0, "front"), (1, -1, "back"), (2, 0, "right"), (2, -1, "left")],
)
def test_a_kidney_at_the_edge_of_the_scan(axis: int, index: int, edge: str) -> None:
    labels = two_kidneys()
    beam = [slice(15, 25), slice(25, 35), slice(12, 18)]
    beam[axis] = slice(0, 25) if index == 0 else slice(12, SHAPE[axis])
    labels[tuple(beam)] = 1
    found = flags(labels)
    assert found["cut-off"].level == "amber"
    assert re.findall("top|bottom|front|back|right|left", found["cut-off"].reason) == [edge]


def test_every_edge_is_named_but_a_speck_cuts_nothing() -> None:
    labels = two_kidneys()
    labels[0, 5, 5:8] = 1
    assert not flags(labels)
    labels[:, 20:40, 10:20] = 1
    assert "edge of the scan (top, bottom)" in flags(labels)["cut-off"].reason


@pytest.mark.parametrize(
    ("parenchyma", "level"), [(49, "amber"), (51, ""), (449, ""), (451, "amber"), (799, "amber"), (1000, "red")]
)
def test_parenchyma_outside_what_kidneys_have(parenchyma: float, level: str) -> None:
    findings = Findings((BOTH.kidneys[0], Kidney(LEFT, 500.0, parenchyma)), ())
    found = flags(two_kidneys(), findings)
    assert ("kidney-volume" in found) == bool(level)
    if level:
        assert found["kidney-volume"].level == level
        assert "left" in found["kidney-volume"].reason
        assert f"{parenchyma} ml" in found["kidney-volume"].reason


@pytest.mark.parametrize(("hu", "failed"), [(-34, True), (16, False)])
def test_outlines_over_fat_are_a_failed_segmentation_and_no_contrast_phase(hu: int, failed: bool) -> None:
    labels, domain = two_kidneys(), TrainingDomain((3, 3), (1, 1), (100, 180), None)
    found = assess(labels, np.full(labels.shape, hu, np.int16), GEOMETRY, BOTH, None, domain)
    names = {flag.name: flag.level for flag in found.flags if flag.name in ("kidney-hu", "phase")}
    assert names == ({"kidney-hu": "red"} if failed else {"phase": "red"})
    assert (found.phase is None) == failed


def test_both_kidneys_get_a_flag_of_their_own() -> None:
    findings = Findings((Kidney(RIGHT, 150.0, 20.0), Kidney(LEFT, 150.0, 500.0)), ())
    reasons = [flag.reason for flag in assess(two_kidneys(), None, GEOMETRY, findings, None, None).flags]
    assert [reason.split()[1] for reason in reasons] == ["right", "left"]


def test_tumors_are_summed_and_cysts_left_out() -> None:
    nowhere = Box((0, 0, 0), (1, 1, 1))
    lesion = Lesion(1, "tumor", LEFT, 1100.0, 90, 100, "T2a", None, None, None, None, (0, 0, 0), nowhere)
    one_is_a_cyst = (lesion, replace(lesion, number=2, kind="cyst"))
    assert not flags(two_kidneys(), replace(BOTH, lesions=one_is_a_cyst))
    found = flags(two_kidneys(), replace(BOTH, lesions=(lesion, lesion)))
    assert "2200 ml" in found["tumor-volume"].reason


@pytest.mark.parametrize(
    ("agreement", "levels"),
    [
        ({"kidney": 0.91, "tumor": 0.71}, {}),
        ({"kidney": 0.89, "tumor": 0.71}, {"kidney-agreement": "amber"}),
        ({"kidney": 0.79, "tumor": 0.69}, {"kidney-agreement": "red", "tumor-agreement": "amber"}),
        ({"kidney": 0.95, "tumor": 0.0}, {"tumor-agreement": "red"}),
        ({"kidney": 0.95, "tumor": float("nan")}, {}),
        ({}, {}),
    ],
)
def test_members_that_disagree(agreement: dict[str, float], levels: dict[str, str]) -> None:
    assert {name: flag.level for name, flag in flags(two_kidneys(), agreement=agreement).items()} == levels


@pytest.mark.parametrize(("hu", "level"), [(150, None), (101, None), (99, "amber"), (61, "amber"), (59, "red")])
def test_contrast_outside_training_makes_the_tumor_unreliable(hu: int, level: str | None) -> None:
    labels = two_kidneys()
    scan = np.where(labels == 1, hu, -90).astype(np.int16)
    found = flags(labels, hu=scan, training_domain=TRAINED)
    assert [flag.level for flag in found.values()] == ([level] if level else [])
    if level:
        assert "the tumor labels are unreliable" in found["phase"].reason
        assert f"kidney at {hu} HU, 120 to 200 HU in training" in found["phase"].reason
    assert not flags(labels, hu=scan)


def test_an_unenhanced_scan_is_called_so() -> None:
    labels = two_kidneys()
    scan = np.where(labels == 1, 32, -90).astype(np.int16)
    quality = assess(labels, scan, GEOMETRY, BOTH, None, TRAINED)
    assert (quality.phase, quality.level) == ("unenhanced", "red")
    assert "unenhanced" in quality.flags[0].reason


@pytest.mark.parametrize(
    ("slices", "pixels", "facts"),
    [
        ((1.0, 3.0), (0.6, 1.0), ["slices are 4.00 mm", "pixels are 2.50 mm"]),
        ((1.0, 3.7), (0.6, 2.3), []),  # within a tenth
        ((4.3, 5.0), (0.6, 2.5), []),
        ((4.5, 5.0), (0.6, 2.5), ["slices are 4.00 mm"]),
    ],
)
def test_spacing_outside_training(slices: tuple[float, float], pixels: tuple[float, float], facts: list[str]) -> None:
    training_domain = replace(TRAINED, slice_mm=slices, pixel_mm=pixels)
    found = assess(two_kidneys(), None, GEOMETRY, BOTH, None, training_domain).flags
    assert [(flag.name, flag.level) for flag in found] == [("spacing", "amber")] * len(facts)
    assert all(text in flag.reason for text, flag in zip(facts, found, strict=True))


@pytest.mark.parametrize(("seen", "names"), [(None, []), ((5.0, 30.0), []), ((5.0, 10.0), ["tumor-size"])])
def test_tumors_larger_than_in_training(seen: tuple[float, float] | None, names: list[str]) -> None:
    """A tumor of 4.19 ml has the volume of a sphere of 20 mm."""
    lesion = Lesion(1, "tumor", "left", 4.19, 20, 20, "T1a", 0, None, None, None, (0, 0, 0), Box((0, 0, 0), (1, 1, 1)))
    flags = list(tumor_size_flags(Findings((), (lesion,)), replace(TRAINED, tumor_mm=seen)))
    assert [flag.name for flag in flags] == names
    assert all("20 mm; in training they had 5 to 10 mm" in flag.reason for flag in flags)


@pytest.mark.parametrize(
    ("case", "names"),
    [("case_00000", []), ("case_00005", ["single-kidney"]), ("case_00010", ["cut-off"])],
)
def test_real_label_maps(shared: Path, case: str, names: list[str]) -> None:
    volume = read_labels(shared / "kits19" / case / "segmentation.nii.gz", case)
    middle = volume.array.shape[2] // 2
    sides = ((RIGHT, volume.array[..., :middle]), (LEFT, volume.array[..., middle:]))
    kidneys = [
        Kidney(side, *(np.count_nonzero(mask) * volume.geometry.voxel_ml for mask in (half > 0, half == 1)))
        for side, half in sides
    ]
    findings = Findings(tuple(kidney for kidney in kidneys if kidney.volume_ml > 20), ())
    quality = assess(volume.array, None, volume.geometry, findings, None, None)
    assert [flag.name for flag in quality.flags] == names
