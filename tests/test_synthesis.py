"""Synthetic patients on a body that can be checked by hand: fat, two round kidneys of 150 HU, air around."""

from __future__ import annotations

import csv
import json
import pickle
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
import torchio as tio
from conftest import kitseg
from method_runs import untrained
from scipy import ndimage

from kitseg.labels import KITS23
from kitseg.links.input_transform import InputTransform
from kitseg.links.intensity import ClipScale
from kitseg.models.run_folder import Run, RunInfo, StageFolder
from kitseg.models.training_domain import training_facts
from kitseg.patches.bodies import shape_cases
from kitseg.patches.queue import AddressSampler
from kitseg.patches.synthetic import SyntheticQueue
from kitseg.synthesis import fluid, habitus, lesions, neighbours, phases, scanners, textures
from kitseg.synthesis.anatomies import SCALES, anatomies_of, any_transplants, graft
from kitseg.synthesis.bodies import CLEAR, FAR, RealBody, describe, kidney_distance, signed_distance
from kitseg.synthesis.fields import smooth_noise
from kitseg.synthesis.patient import SynthesisParts, SyntheticPatient, View, make
from kitseg.synthesis.shapes import Shapes, drawn_shape, shapes_of
from kitseg.training import stage_inputs
from kitseg.training.data_source import DataSettings
from kitseg.training.stage_inputs import read_places
from kitseg.training.synthesis import _Patients
from kitseg.types import Case, Grid
from kitseg.volumes.store import CaseFiles, open_case, store_case

MM = (3.0, 3.0, 3.0)
NONE = SynthesisParts(**dict.fromkeys(asdict(SynthesisParts()), False))


def ball(shape: tuple[int, ...], centre: tuple[float, ...], mm: float) -> np.ndarray:
    grid = np.meshgrid(*[np.arange(n) * 3.0 - c for n, c in zip(shape, centre, strict=True)], indexing="ij")
    return sum(g**2 for g in grid) <= mm**2


def scan(shift: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """HU and kidneys of radius 30 mm."""
    shape = (44, 60, 80)
    hu = np.full(shape, -1000, np.int16)
    hu[:, 5:55, 5:75] = -100
    kidneys = ball(shape, (66, 96, 66 + shift), 30) | ball(shape, (66, 96, 177), 30)
    hu[kidneys] = 150
    return hu, kidneys


@pytest.fixture(scope="module")
def body() -> RealBody:
    hu, kidneys = scan()
    arrays, facts = describe(hu, kidney_distance(kidneys, MM), MM)
    return RealBody(name="a", hu=hu, **arrays, spacing=MM, facts=facts)


def patient(body: RealBody, parts: SynthesisParts, *address: int, view: View | None = None) -> SyntheticPatient:
    return make(body, Shapes(), view or View((40, 40, 40), MM), parts, np.random.default_rng(address))


def test_without_any_part_a_body_is_unchanged(body: RealBody) -> None:
    found = patient(body, NONE, 0, view=View.on(body))
    assert (found.hu - torch.from_numpy(body.hu.astype(np.float32))).abs().max() < 0.5, "but for rounding"
    assert np.array_equal(found.label.numpy() > 0, np.asarray(body.distance) < 0)
    assert found.made["lesions"] == []


def test_facts_of_a_body(body: RealBody) -> None:
    assert body.facts.parenchyma == pytest.approx(150, abs=1)
    assert np.allclose([k.centre for k in body.facts.kidneys], [(66, 96, 66), (66, 96, 177)], atol=1.5)
    assert all(np.allclose(kidney.radii, 30, atol=1.5) for kidney in body.facts.kidneys)
    assert body.distance[22, 32, 22] == pytest.approx(-28, abs=2)
    assert body.distance[0, 0, 40] == FAR
    assert body.places[:, 3].min() < -20
    assert body.places[:, 3].max() > 15


def test_signed_distance_by_hand() -> None:
    line = np.zeros((1, 1, 6), np.bool_)
    line[..., 2:4] = True
    assert signed_distance(line, (9, 9, 2))[0, 0].tolist() == [3, 1, -1, -1, 1, 3]


def test_one_address_is_one_patient(body: RealBody) -> None:
    one, same, other = (patient(body, SynthesisParts(), *address) for address in ((1, 2, 3), (1, 2, 3), (1, 2, 4)))
    assert torch.equal(one.hu, same.hu)
    assert torch.equal(one.label, same.label)
    assert one.made == same.made
    assert not torch.equal(one.hu, other.hu)


def test_hu_levels_of_the_phases(body: RealBody) -> None:
    levels = {}
    for name in phases.SHARES:
        fields = [torch.from_numpy(np.asarray(a, np.float32)) for a in (body.hu, body.distance, body.tissue)]
        hu, phase = phases.show(name, phases.Tissues(*fields, np.array(MM)), body.facts, np.random.default_rng(0))
        deep = hu[torch.from_numpy(np.asarray(body.distance) < -14)]
        levels[name] = float(deep.mean())
        assert torch.allclose(hu[:, 8, 40], torch.tensor(-100.0)), "fat keeps its HU in every phase"
        if name not in (phases.CORTICAL, phases.EXCRETORY):
            assert levels[name] == pytest.approx(phase.parenchyma, abs=6)
    exact, deep = replace(body.facts, noise=0.0), torch.from_numpy(np.asarray(body.distance) < -14)
    for seed in range(6):
        hu, phase = phases.show(phases.PLAIN, phases.Tissues(*fields, np.array(MM)), exact, np.random.default_rng(seed))
        assert float(hu[deep].mean()) == pytest.approx(phase.parenchyma, abs=0.5), "lesions are relative to it"
    assert 90 < levels[phases.NEPHROGRAPHIC] < 220
    shell = (np.asarray(body.distance) < -2) & (np.asarray(body.distance) > -5)
    hu, _ = phases.show(phases.CORTICAL, phases.Tissues(*fields, np.array(MM)), body.facts, np.random.default_rng(0))
    assert float(hu[torch.from_numpy(shell)].mean()) > levels[phases.CORTICAL] + 20, "the cortex is brighter"


def test_tumors_without_contrast_lie_on_both_sides_of_the_parenchyma() -> None:
    phase = phases.Phase(phases.PLAIN, 30, 30)
    site = textures.Site(torch.zeros(3, 3, 3), 10.0, np.array(MM), phase)
    levels = [textures._levels("papillary", site, np.random.default_rng(seed))[0] for seed in range(200)]
    assert min(abs(level - 30) for level in levels) >= textures.NATIVE_CONTRAST
    assert 80 < sum(level > 30 for level in levels) < 160, "most have 30 to 48 HU, as solid tumors do"


def test_cysts_of_every_size_are_learned() -> None:
    shapes, rng = Shapes(cyst=[drawn_shape(np.random.default_rng(0), 5, True)]), np.random.default_rng(1)
    drawn = [lesions.choose("cyst", shapes, rng, (2.5, 50)) for _ in range(300)]
    radii = np.array([shape.radius * scale for shape, scale in drawn])
    assert 0.08 < (radii > 10).mean() < 0.2, "a third are drawn of all sizes, by the logarithm"
    assert radii.max() > 25


@pytest.mark.parametrize("name", [phases.PLAIN, phases.EXCRETORY])
def test_a_phase_with_less_contrast_leaves_no_bright_edge(body: RealBody, name: str) -> None:
    blurred = torch.from_numpy(ndimage.gaussian_filter(body.hu.astype(np.float32), 0.7))
    distance = torch.from_numpy(np.asarray(body.distance, np.float32))
    on = phases.Tissues(blurred, distance, torch.zeros_like(distance), np.array(MM))
    for seed in range(6):
        hu, phase = phases.show(name, on, replace(body.facts, noise=0.0), np.random.default_rng(seed))
        assert float(hu[(distance > -4) & (distance < 2)].max()) < phase.parenchyma + 8
    touching = phases.Tissues(torch.where(distance > 0, 160.0, blurred), distance, on.tissue, on.spacing)
    hu, phase = phases.show(phases.PLAIN, touching, replace(body.facts, noise=0.0), np.random.default_rng(0))
    assert float(hu[(distance > 1) & (distance < 4)].min()) > phase.parenchyma + 15, "an organ that touches it stays"
    rib = (distance > 1) & (distance < 4) & (torch.arange(distance.shape[2]) < 15)
    assert int(rib.sum()) > 30
    ribs = phases.Tissues(torch.where(rib, 500.0, blurred), distance, on.tissue, on.spacing)
    hu, _ = phases.show(name, ribs, replace(body.facts, noise=0.0), np.random.default_rng(0))
    assert float(hu[rib].min()) > 350, "a rib stays, but where the kidney covers its edge"


def test_organs_of_a_bright_scan_lose_their_contrast_too() -> None:
    hu = torch.tensor([-100.0, 40.0, 150.0, 190.0, 340.0])
    shown = phases._without_contrast(hu, torch.zeros(5), 205.0, 1.0).tolist()
    assert shown[:2] == [-100, 40]
    assert 60 < shown[2] < shown[3] < 95, "liver and spleen beside kidneys of 205 HU"
    assert shown[4] == 340, "bone"


def test_neighbours_of_a_kidney_are_from_another_body(body: RealBody) -> None:
    hu = np.where(body.hu == -100, 60, body.hu).astype(np.int16)
    soft, near = replace(body, name="b", hu=hu), torch.from_numpy(np.asarray(body.distance)) < 0
    fields = [torch.from_numpy(np.asarray(a, np.float32)) for a in (body.hu, body.distance, body.tissue)]
    mixed = [neighbours.borrow(soft, (*fields,), np.array(MM), np.random.default_rng(n)) for n in range(4)]
    for found, distance, _ in mixed:
        assert torch.equal(distance, fields[1])
        assert (found - fields[0])[near].abs().max() < 4, "the kidneys stay as they are"
    outside = torch.cat([found[(fields[0] == -100)] for found, _, _ in mixed])
    assert (outside > 50).float().mean() > 0.1, "soft tissue in the place of fat"
    assert outside.max() < 75, "but no kidney of the other body"
    native = replace(soft, facts=replace(soft.facts, parenchyma=30.0))
    assert neighbours.any_donor(body, [body, native], np.random.default_rng(0)) is None
    assert neighbours.any_donor(body, [body, native, soft], np.random.default_rng(0)) is soft
    assert patient(body, replace(NONE, neighbours=True), 0, view=View.on(body)).hu.equal(
        patient(body, NONE, 0, view=View.on(body)).hu
    ), "a whole scan keeps its own"


def test_contrast_beside_a_kidney_varies(body: RealBody) -> None:
    hu, distance = (torch.from_numpy(np.asarray(a, np.float32)) for a in (body.hu, body.distance))
    hu[hu == -100] = 60
    found = neighbours.shift(hu, distance, np.array(MM), np.random.default_rng(1))
    assert (found - hu)[distance < 0].abs().max() < 3
    assert (found - hu)[(distance > 6) & (hu == 60)].abs().median() > 2
    assert found[hu == -1000].max() < -990


def test_a_label_is_where_a_lesion_is_and_shows_its_hu(body: RealBody) -> None:
    rng = np.random.default_rng(5)
    fields = [torch.from_numpy(np.asarray(a, np.float32)) for a in (body.hu, body.distance, body.tissue)]
    label = (fields[1] < 0).to(torch.uint8)
    scene = lesions.Surroundings(*fields, label, np.array(MM), phases.Phase("as scanned", 150, 150), 0.0, 0 * label)
    middle = (np.array(body.hu.shape) - 1) / 2 * MM
    plan = lesions.PlannedLesion("cyst", drawn_shape(rng, 12, True), 1.0, np.eye(3), np.array([66, 96, 66]) - middle)
    lesions.insert(plan, scene, rng)
    (made,) = lesions.labelled(scene)
    cyst = label.numpy() == 3
    assert ndimage.label(cyst)[1] == 1
    assert np.allclose(ndimage.center_of_mass(cyst), [22, 32, 22], atol=0.6)
    assert cyst.sum() * 27 / 1000 == pytest.approx(made["ml"], abs=0.01)
    assert made["ml"] == pytest.approx(4 / 3 * np.pi * 12**3 / 1000, rel=0.35)  # its surface is warped
    core = ndimage.binary_erosion(cyst, iterations=2)
    assert -30 < float(scene.hu.numpy()[core].mean()) < 90
    away = ndimage.binary_dilation(cyst, iterations=5)
    assert np.allclose(scene.hu.numpy()[~away], body.hu[~away], atol=0.5)


def test_lesions_need_a_kidney(body: RealBody) -> None:
    fields = [torch.from_numpy(np.asarray(a, np.float32)) for a in (body.hu, body.distance, body.tissue)]
    label, numbers = torch.zeros(2, *body.hu.shape, dtype=torch.uint8)
    scene = lesions.Surroundings(*fields, label, np.array(MM), phases.Phase("", 150, 150), 0.0, numbers)
    rng = np.random.default_rng(0)
    far = lesions.PlannedLesion("tumor", drawn_shape(rng, 9, False), 1.0, np.eye(3), np.array([0.0, -60, 0]))
    lesions.insert(far, scene, rng)
    assert lesions.labelled(scene) == []
    assert not scene.label.any()


def test_a_lookalike_keeps_away_from_the_kidney(body: RealBody) -> None:
    """It has no label, so a kidney with a piece of it would be learned as healthy."""
    fields = [torch.from_numpy(np.asarray(a, np.float32)) for a in (body.hu, body.distance, body.tissue)]
    inside, beside = fields[1] < 0, fields[1] > 3
    for seed, side in ((0, 0), (1, 30), (2, 50), (3, 55)):  # mm from the kidney's centre; its surface is at 30
        hu = fields[0].clone()
        label, numbers = torch.zeros(2, *body.hu.shape, dtype=torch.uint8)
        phase = phases.Phase("", 150, 150)
        scene = lesions.Surroundings(hu, *fields[1:], label, np.array(MM), phase, 0.0, numbers)
        rng = np.random.default_rng(seed)
        middle = (np.array(body.hu.shape) - 1) / 2 * MM
        centre = np.array([66, 96, 66 + side]) - middle
        plan = lesions.PlannedLesion("lookalike", drawn_shape(rng, 24, False), 1.0, np.eye(3), centre)
        lesions.insert(plan, scene, rng)
        assert (hu - fields[0])[inside].abs().max() < 25, "but for the blurred edge"
        assert bool(scene.made) == (side > 0)
        if scene.made:
            assert (hu - fields[0])[beside].max() > 60


@pytest.mark.parametrize("zoom", [1.0, 0.78])  # of a small patient, in which distances are cut off earlier
def test_a_mass_is_outside_the_kidneys_and_has_no_label(body: RealBody, zoom: float) -> None:
    fields = [torch.from_numpy(np.asarray(a, np.float32)) for a in (body.hu, body.distance, body.tissue)]
    fields[1] = fields[1] * zoom
    phase, found, largest = phases.Phase("", 150, 150), 0, 0.0
    for seed in range(40):
        hu = fields[0].clone()
        label, numbers = torch.zeros(2, *body.hu.shape, dtype=torch.uint8)
        scene = lesions.Surroundings(hu, *fields[1:], label, np.array(MM), phase, 0.0, numbers)
        rng = np.random.default_rng(seed)
        plan = lesions.any_mass(scene, rng)
        assert plan is not None
        lesions.insert(plan, scene, rng)
        assert (hu - fields[0])[fields[1] < 0].abs().max() < 25, "but for the blurred edge"
        assert not label.any()
        found += scene.made != [] and scene.made[0]["ml"] > 20
        largest = max(largest, plan.radius)
    assert found >= 20
    assert largest > CLEAR, "where the distance is cut off, there is more room than it states"


def test_without_room_there_is_no_mass(body: RealBody) -> None:
    near = torch.zeros(body.hu.shape)
    label, numbers = torch.zeros(2, *body.hu.shape, dtype=torch.uint8)
    phase = phases.Phase("", 150, 150)
    scene = lesions.Surroundings(near, near, near, label, np.array(MM), phase, 0.0, numbers)
    assert lesions.any_mass(scene, np.random.default_rng(0)) is None


def test_a_kidney_that_a_tumor_replaces_can_be_transplanted(body: RealBody) -> None:
    labels = np.where(kidney_map() == 1, 2, 0).astype(np.uint8)
    labels[24, 32, 28] = 1
    first = anatomies_of(labels, MM, "case_1")
    assert first[0].parenchyma_ml == 0
    found = any_transplants(body.facts.kidneys, first, np.random.default_rng(0))
    assert [one.scale for one in found] == pytest.approx([SCALES[1]] * 2)


def test_a_scan_without_contrast_stays_one(body: RealBody) -> None:
    pale = replace(body.facts, parenchyma=55.0)
    fields = [torch.from_numpy(np.asarray(a, np.float32)) for a in (body.hu, body.distance, body.tissue)]
    tissues = phases.Tissues(*fields, np.array(MM))
    shown = [phases.show(phases.SCANNED, tissues, pale, np.random.default_rng(n))[1] for n in range(8)]
    assert all(phase.native for phase in shown), "whose lesions have the HU of one"
    assert max(phase.parenchyma for phase in shown) > 55


def test_validation_follows_its_label_maps(tmp_path: Path) -> None:
    """Other label maps of the same names give other patients."""
    case, names = Case("a", tmp_path / "a.nii.gz"), []
    case.image.touch()
    plan = SimpleNamespace(store=tmp_path, config={"seed": 0}, method=SimpleNamespace(labels=KITS23))
    settings = DataSettings("synthesis", "maps", 9, 2, ())
    for content in ("one", "other", "one"):
        (tmp_path / "shapes.json").write_text(content)
        names.append(_Patients(plan, case, settings, tmp_path, ("case_0",)).names)
    assert names[0] == names[2] != names[1]


def test_a_volume_is_that_of_the_final_label(body: RealBody) -> None:
    """Cysts lie in tumors, and a narrow field of view cuts both."""
    parts, view = replace(NONE, tumors=True, cysts=True, scanners=True), View.on(body)
    for number in (5, 10, 12, 13):
        found = patient(body, parts, number, view=view)
        label, rows = found.label.numpy(), found.made["lesions"]
        assert all(row["ml"] > 0 for row in rows)
        for kind, value in (("tumor", 2), ("cyst", 3)):
            stated = sum(row["ml"] for row in rows if row["kind"] == kind)
            assert stated == pytest.approx((label == value).sum() * 0.027, abs=0.01)


def test_threads_do_not_change_what_is_made() -> None:
    before, noise, organs = torch.get_num_threads(), [], []
    hu = 60 * smooth_noise(np.random.default_rng(0), (45, 47, 51), 3.0)
    on = phases.Tissues(hu, torch.full(hu.shape, FAR), torch.zeros(hu.shape), np.array(MM))
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            rngs = [np.random.default_rng(seed) for seed in range(6)]
            noise.append([smooth_noise(rng, (40, 40, 40), 6.0) for rng in rngs])
            noise[-1] += [scanners.dose_noise((40, 40, 40), np.array(MM), rng) for rng in rngs]
            organs.append([fluid.organ(hu, on, rng) for rng in rngs])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for made in (noise, organs) for one, other in zip(*made, strict=True))
    for one in noise[0]:
        assert float(one.mean()) == pytest.approx(0, abs=0.02)
        assert float(one.std()) == pytest.approx(1, abs=0.01)


def test_shapes_of_a_label_map() -> None:
    shape = (30, 30, 30)
    mask = ball(shape, (30, 30, 30), 18) | ball(shape, (75, 75, 75), 9)
    mask[0, 0, 0] = True  # a speck
    found = shapes_of(mask, MM, "case_1")
    assert [one.radius for one in found] == pytest.approx([18, 9], abs=1)
    middle = tuple(n // 2 for n in found[0].distance.shape)
    assert found[0].distance[middle] == found[0].distance.min() == pytest.approx(-14.5, abs=1.5), "smoothed"


def kidney_map() -> np.ndarray:
    """Two kidneys of radius 24 mm; a tumor of 15 mm at the top of the one at lower columns, a cyst in the other."""
    shape = (44, 60, 80)
    labels = np.where(ball(shape, (72, 96, 60), 24) | ball(shape, (72, 96, 170), 24), 1, 0).astype(np.uint8)
    labels[ball(shape, (51, 96, 60), 15)] = 2
    labels[ball(shape, (72, 90, 170), 15)] = 3
    return labels


def test_kidneys_of_a_label_map() -> None:
    right, left = anatomies_of(kidney_map(), MM, "case_1")
    assert (right.right, left.right, right.case) == (True, False, "case_1")
    found = np.array([(one.fields[:3] < 0).sum((1, 2, 3)) * 8 / 1000 for one in (right, left)])  # ml
    tumor, cyst = 4 / 3 * np.pi * np.array([15, 15]) ** 3 / 1000
    assert found[0, 1:] == pytest.approx([tumor, 0], rel=0.2)
    assert found[1, 1:] == pytest.approx([0, cyst], rel=0.2), "smoothed on voxels of 3 mm"
    whole = 4 / 3 * np.pi * 24**3 / 1000
    assert (left.fields[0][left.fields[2] < 0] < 0).all(), "under the cyst there is parenchyma, without a gap of fat"
    assert left.parenchyma_ml == pytest.approx(whole - cyst, rel=0.13)
    cut = kidney_map()[18:]
    assert [one.right for one in anatomies_of(cut, MM, "b")] == [], "of cut kidneys the shape is not known"


def test_a_transplant_replaces_the_kidneys(body: RealBody) -> None:
    shapes = Shapes(anatomies=anatomies_of(kidney_map(), MM, "case_1"))
    parts = SynthesisParts(**{**asdict(NONE), "anatomies": True, "tumors": True, "cysts": True})
    made = (make(body, shapes, View.on(body), parts, np.random.default_rng(n)) for n in range(60))
    found = next(one for one in made if one.made["kidneys_from"] and {1, 2, 3} <= set(one.label.unique().tolist()))
    assert found.made["kidneys_from"] == ["case_1", "case_1"]
    assert {row["kind"] for row in found.made["lesions"]} == {"tumor", "cyst"}
    label, hu = found.label.numpy(), found.hu.numpy()
    assert ndimage.label(label > 0)[1] == 2
    centres = ndimage.center_of_mass(label > 0, ndimage.label(label > 0)[0], [1, 2])
    assert np.allclose(sorted(np.array(centres)[:, 2] * 3), [66, 177], atol=9), "where the body's own were"
    deep = ndimage.binary_erosion(label == 1, iterations=2)
    assert float(hu[deep].mean()) == pytest.approx(150, abs=6)
    old = (np.asarray(body.distance) < -2) & ~ndimage.binary_dilation(label > 0)
    assert old.any()
    assert np.median(hu[old]) < -70, "fat where the body's own were larger"


def test_the_old_sinus_is_not_in_a_transplant(body: RealBody) -> None:
    one = any_transplants(body.facts.kidneys, anatomies_of(kidney_map(), MM, "a"), np.random.default_rng(0))[0]
    points = habitus.Frame(np.eye(3), np.array([66.0, 96.0, 66.0])).grid((30, 30, 30), MM)
    fields = (torch.full((30, 30, 30), -100.0), torch.full((30, 30, 30), 10.0), torch.full((30, 30, 30), -1.0))
    assert graft(one, fields, points, 150, np.random.default_rng(0)) is not None
    assert bool((fields[1] < -3).any())
    assert float(fields[2][fields[1] < -3].min()) == 0, "where it would be filled with urine or fluid"


def test_fluid_replaces_fat_near_kidneys_or_anywhere_and_no_label(body: RealBody) -> None:
    parts = SynthesisParts(**{**asdict(NONE), "fluid": True})
    kidney, farthest = np.asarray(body.distance) < 0, list[float]()
    for number in range(40):
        one = patient(body, parts, 9, number, view=View.on(body))
        assert np.array_equal(one.label.numpy() > 0, kidney)
        changed = (one.hu.numpy() > -30) & (body.hu == -100)
        farthest += [float(np.asarray(body.distance)[changed].max())] if changed.any() else []
        assert abs(one.hu.numpy()[ndimage.binary_erosion(kidney)] - 150).max() < 1, "parenchyma stays"
    assert min(farthest) < 45
    assert max(farthest) == FAR, "ascites"


@pytest.mark.parametrize("zoom", [1.0, 0.78])  # of a small patient, in which distances are cut off earlier
def test_an_organ_full_of_fluid_spares_kidneys_and_air(body: RealBody, zoom: float) -> None:
    hu, distance, tissue = (torch.from_numpy(np.asarray(a, np.float32)) for a in (body.hu, body.distance, body.tissue))
    on, largest = phases.Tissues(hu, distance * zoom, tissue, np.array(MM)), 0.0
    for seed in range(20):
        made = fluid.organ(hu, on, np.random.default_rng(seed))
        assert (made - hu)[distance < 0].abs().max() < 20, "but for the blurred edge"
        assert (made - hu)[hu < -250].abs().max() < 20, "air stays"
        parts, count = ndimage.label(((made > -50) & (distance > 0)).numpy())
        sizes = np.sort(np.bincount(parts[parts > 0]))[::-1]
        assert sizes[0] > 100
        assert count == 1 or sizes[1] < 30, "one bag"
        largest = max(largest, sizes[0] * 0.027)
    assert largest > 200, "ml, a full bladder"


@pytest.mark.parametrize(
    ("water", "agent", "level"), [(1.0, 0.0, fluid.WATER), (0.0, 0.0, fluid.THICK), (0.0, 1.0, fluid.OPAQUE)]
)
def test_fluid_of_an_organ(
    monkeypatch: pytest.MonkeyPatch, water: float, agent: float, level: tuple[float, float]
) -> None:
    monkeypatch.setattr(fluid, "LIKE_WATER", water)
    monkeypatch.setattr(fluid, "WITH_AGENT", agent)
    monkeypatch.setattr(fluid, "RADIUS", (40.0, 40.0))
    hu, far = torch.full((50, 50, 50), -100.0), torch.full((50, 50, 50), FAR)
    found = []
    for seed in range(20):
        made = fluid.organ(hu, phases.Tissues(hu, far, 0 * far, np.array(MM)), np.random.default_rng(seed))
        lumen = ndimage.binary_erosion(made.numpy() > -50, iterations=4)
        found += [float(made[lumen].mean())] if lumen.any() else []
        assert made[lumen].std() > 2, "texture"
    assert level[0] - 5 < min(found) < level[0] + 0.3 * (level[1] - level[0])
    assert level[1] + 5 > max(found) > level[1] - 0.3 * (level[1] - level[0])


def test_a_bag_has_its_radius_in_mm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fluid, "AXES", (1.0, 1.0))
    spacing = np.array([5.0, 2.0, 1.0])
    depth = fluid._bag((24, 50, 90), np.array([10.0, 20.0, 50.0]), 30, spacing, np.random.default_rng(0)).numpy()
    inside = np.argwhere(depth > 0) * spacing
    np.testing.assert_allclose(inside.mean(0), [50, 40, 50], atol=4)
    np.testing.assert_allclose(np.ptp(inside, axis=0), 60, atol=12)
    assert 27 < depth.max() < 36


def test_no_organ_without_room() -> None:
    hu = torch.zeros(12, 12, 12)
    assert fluid.organ(hu, phases.Tissues(hu, hu, hu, np.array(MM)), np.random.default_rng(0)) is hu


def test_some_scanners_are_far_off_in_hu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scanners, "gamma", lambda hu, rng: hu)
    water = torch.zeros(8, 8, 8)
    offsets = [float(scanners.scan(water, np.array(MM), np.random.default_rng(seed)).mean()) for seed in range(300)]
    assert 0.07 < np.mean(np.abs(offsets) > 9) < 0.2
    assert min(offsets) < -20
    assert max(offsets) > 12


def test_no_label_out_of_view() -> None:
    hu, kidneys = scan(shift=-30)
    arrays, facts = describe(hu, kidney_distance(kidneys, MM), MM)
    body = RealBody(name="a", hu=hu, **arrays, spacing=MM, facts=facts)
    parts = SynthesisParts(**{**asdict(NONE), "scanners": True})
    views = [patient(body, parts, 7, number, view=View.on(body)) for number in range(20)]
    cut = [one for one in views if (one.label > 0).sum() < 0.98 * kidneys.sum()]
    assert cut
    assert all(one.hu[ndimage.binary_erosion(one.label.numpy() > 0)].min() > -500 for one in cut)


def test_a_field_of_view_is_around_the_middle_of_a_body_that_is_not_square() -> None:
    points = habitus.Frame(np.eye(3), np.array([0.0, 100.0, 200.0])).grid((1, 100, 100), (4.0, 4.0, 4.0))
    rng, middles = np.random.default_rng(0), []
    for _ in range(30):
        seen = points[:, ~scanners.out_of_view(points, np.array([90.0, 200.0, 400.0]), rng)]
        middles.append(seen.mean(1).tolist()[1:])
    assert np.mean(middles, 0) == pytest.approx([100, 200], abs=8)


def test_no_label_in_air_where_a_scan_ends() -> None:
    hu, kidneys = (array[:24] for array in scan())
    arrays, facts = describe(hu, kidney_distance(kidneys, MM), MM)
    body = RealBody(name="a", hu=hu, **arrays, spacing=MM, facts=facts)
    parts = SynthesisParts(**{**asdict(NONE), "scanners": True})
    for number in range(20):
        one = patient(body, parts, 3, number)
        assert float(one.hu[one.label > 0].min()) > -260, "slices may be averaged with air"


def test_moves_and_pushes(body: RealBody) -> None:
    kidney = body.facts.kidneys[0]
    middle = (np.array(body.hu.shape) - 1) / 2 * MM
    shift = habitus.Move(np.array(kidney.centre), np.full(3, 60.0), np.zeros((3, 3)), np.array([-12.0, 0, 0]), True)
    frame = habitus.Frame(np.eye(3), middle, unusual=(habitus.Unusual("low", kidney, shift),))
    low = frame.find(np.array(kidney.centre)) + middle
    assert low == pytest.approx(np.add(kidney.centre, [12, 0, 0]), abs=0.3)
    push = habitus.push(np.zeros(3), 10, 0.5)
    assert push(torch.tensor([4.0, 0, 0])).tolist() == pytest.approx([4 - 4 * 0.5 * np.exp(-16 / 225), 0, 0], abs=1e-5)
    hu, distance, _ = habitus.sample(body, habitus.Frame(np.eye(3), middle + 1e4).grid((8, 8, 8), MM))
    assert float(hu.max()) == habitus.AIR
    assert float(distance.min()) == FAR


def test_a_removed_kidney_leaves_fat(body: RealBody) -> None:
    kidney, middle = body.facts.kidneys[0], (np.array(body.hu.shape) - 1) / 2 * MM
    points = habitus.Frame(np.eye(3), middle).grid(body.hu.shape, MM)
    hu, distance, _ = habitus.remove(kidney, habitus.sample(body, points), points, np.random.default_rng(0))
    z, y, x = (round(c / 3) for c in kidney.centre)
    assert -150 < float(hu[z, y, x]) < -50
    assert float(distance[z, y, x]) == FAR
    assert ndimage.label(distance.numpy() < 0)[1] == 1


def test_thick_slices_keep_the_mean_and_lose_detail() -> None:
    stripes = torch.zeros(24, 4, 4)
    stripes[::2] = 100
    thick = scanners.thick_slices(stripes, 4)
    assert float(thick.mean()) == pytest.approx(50, abs=2)
    assert float(thick[6:18].std()) < 10
    assert scanners.thick_slices(stripes, 1.0) is stripes


def test_each_part_can_be_switched_off(body: RealBody) -> None:
    kinds = {"tumors": "tumor", "cysts": "cyst", "stones": "stone", "lookalikes": "lookalike"}
    view = View((14, 14, 14), MM)
    for part, kind in kinds.items():
        parts = SynthesisParts(**{**asdict(NONE), part: True})
        made = [row["kind"] for n in range(20) for row in patient(body, parts, n, view=view).made["lesions"]]
        assert set(made) - {"mass"} == {kind}, part
        assert kind == "lookalike" or "mass" not in made, part


def test_what_has_a_label_is_put_over_what_has_none(body: RealBody) -> None:
    """Otherwise a lookalike beside the kidney would be seen where the label says cyst."""
    parts, view = replace(NONE, tumors=True, cysts=True, lookalikes=True), View.on(body)
    found = [[row["kind"] for row in patient(body, parts, n, view=view).made["lesions"]] for n in range(14)]
    assert any({"lookalike"} < set(kinds) for kinds in found)
    assert any({"mass"} < set(kinds) for kinds in found)
    assert all(kinds == sorted(kinds, key=["mass", "lookalike", "tumor", "cyst"].index) for kinds in found)


def bodies_folder(folder: Path, count: int = 2) -> Path:
    """Bodies with their masks beside them."""
    affine = np.array([[0, 0, -3, 0], [0, -3, 0, 0], [-3, 0, 0, 0], [0, 0, 0, 1.0]])
    for number in range(count):
        case = folder / f"body_{number}"
        case.mkdir(parents=True)
        hu, kidneys = scan(3 * number)
        noisy = hu + np.random.default_rng(number).normal(0, 5, hu.shape)
        noisy[:, -14:-6, 36:44] = 250  # a spine, without which a scan without contrast has no bright end
        nib.save(nib.Nifti1Image(noisy.astype(np.int16), affine), case / "imaging.nii.gz")
        nib.save(nib.Nifti1Image(kidneys.astype(np.uint8), affine), case / "segmentation.nii.gz")
    return folder


@pytest.fixture(scope="module")
def patients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three bodies, and nine patients made from them."""
    folder = tmp_path_factory.mktemp("synthesis")
    bodies_folder(folder / "bodies", 3)
    made = kitseg(folder, "synthesize", "patients", "--bodies=bodies", "-n", "9", "--jobs=1", "--without=stones")
    assert made.code == 0, made.text
    return folder


def test_synthesize_writes_cases_with_records(patients: Path) -> None:
    out = patients / "patients"
    checked = kitseg(patients, "check", "patients", "--convention=kits23", "--jobs=1")
    assert checked.code == 0, checked.text
    shown = {row["case"]: row["patient"] for row in csv.DictReader((out / "patients.csv").open())}
    assert shown == {f"case_{number:05d}": f"body_{number % 3}" for number in range(9)}
    for case in shown:
        labels = nib.load(out / case / "segmentation.nii.gz")
        assert labels.shape == (44, 60, 80)
        record = json.loads((out / case / "synthesis.json").read_text())
        assert record["parts"]["stones"] is False
        masses = {"tumor": 2, "cyst": 3}
        held = {masses[row["kind"]] for row in record["patient"]["lesions"] if row["kind"] in masses}
        assert set(np.unique(labels.get_fdata()).astype(int)) - {0, 1} <= held  # a cyst may cover a small tumor
    before = (out / "case_00001" / "imaging.nii.gz").stat().st_mtime_ns
    options = ("--bodies=bodies", "-n", "9", "--jobs=1", "--without=stones")
    assert kitseg(patients, "synthesize", "patients", *options).text.count("unchanged") == 9
    assert (out / "case_00001" / "imaging.nii.gz").stat().st_mtime_ns == before


def test_another_table_and_other_cases_stay(patients: Path, tmp_path: Path) -> None:
    command = ("synthesize", str(tmp_path / "out"), f"--bodies={patients / 'bodies'}", "--jobs=1")
    table = tmp_path / "out" / "patients.csv"
    table.parent.mkdir()
    for mine in ("case,patient\nmine,Ann\n", "case,patient\ncase_00000,Ann\n", "case,patient\n"):
        table.write_text(mine)
        refused = kitseg(tmp_path, *command)
        assert (refused.code, table.read_text(), [*table.parent.iterdir()]) == (2, mine, [table]), refused.text
        assert "was not written by this command" in refused.text
    table.unlink()
    (table.parent / "case_00001").mkdir()
    assert kitseg(tmp_path, *command, "-n", "2").code == 2
    assert [path.name for path in table.parent.iterdir()] == ["case_00001"]


def test_fewer_patients_keep_the_table_of_all(patients: Path) -> None:
    table = patients / "patients" / "patients.csv"
    before = table.read_text()
    made = kitseg(patients, "synthesize", "patients", "--bodies=bodies", "-n", "2", "--jobs=1", "--without=stones")
    assert (made.code, table.read_text()) == (0, before), made.text


def test_shapes_come_from_label_maps_and_bodies_are_healthy(patients: Path) -> None:
    ill = kitseg(patients, "synthesize", "two", "--bodies=patients", "--jobs=1", "-n", "9", "--lesions=patients")
    assert ill.code == 1
    assert "holds tumors or cysts" in ill.text
    again = kitseg(patients, "synthesize", "three", "--bodies=bodies", "--jobs=1", "--lesions=patients", "-n", "3")
    assert again.code == 0, again.text
    records = [json.loads(path.read_text())["patient"] for path in sorted(patients.glob("three/*/synthesis.json"))]
    tumors = [row for record in records for row in record["lesions"] if row["kind"] == "tumor"]
    assert tumors
    assert {row["shape_from"][:5] for row in tumors} == {"case_"}
    wrong = kitseg(patients, "synthesize", "four", "--bodies=bodies", "--without=colour")
    assert wrong.code == 2
    assert "no part 'colour'" in wrong.text


SYNTHETIC = (
    "--data=bodies", "--jobs=1", "--epochs=1", "--set=data.source=synthesis", "--set=data.lesions=patients",
    "--set=data.patients=3", "--set=data.validation=1", "--set=folds=3", "--set=stages.*.validate_every=1",
)  # fmt: skip
SMALL = [
    f"--set=size.{name}.{key}"
    for name in ("kidneys", "masses")
    for key in ("patch=[16,16,16]", "grid={slices:6,inplane:6}")
]


def test_training_on_synthetic_patients(patients: Path) -> None:
    done = kitseg(patients, "train", "--method=resenc", "--size=tiny", *SYNTHETIC, *SMALL)
    assert done.code == 0, done.text
    run = patients / "runs" / "resenc-tiny"
    fold = json.loads((run / "splits.json").read_text())["folds"][0]
    store = patients / "preprocessed" / "6mm-6mm"
    cases = read_places(StageFolder(run / "fold_0" / "masses"), store)
    assert {path.name for path in cases.train} == set(fold["train"])
    assert {path.name.partition("-")[0] for path in cases.val} == set(fold["val"]), "patients of validation bodies"
    assert cases.synthesis is not None
    everything = shape_cases(patients / "preprocessed" / cases.synthesis.shapes.name)
    assert set(cases.synthesis.label_maps) == set(everything) - set(everything[0::3]), "shapes of a fold are its own"
    queue = SyntheticQueue(cases.synthesis, (16, 16, 16), InputTransform(ClipScale(-79, 304, 76.9, 101), None), 0)
    one = queue[0, 2]
    other = pickle.loads(pickle.dumps(queue))
    same = next(iter(tio.SubjectsLoader(other, sampler=AddressSampler(other, 3, 2, 3), num_workers=1)))
    assert torch.equal(one["image"]["data"], same["image"]["data"][0]), "whatever the rank and worker"
    assert torch.equal(one["label"]["data"], same["label"]["data"][0])
    assert not torch.equal(one["image"]["data"], queue[1, 2]["image"]["data"])
    assert "trained already" in kitseg(patients, "train", "--method=resenc", "--size=tiny", *SYNTHETIC, *SMALL).text
    assert json.loads((run / "run.json").read_text())["synthetic"]


def test_who_learns_from_written_patients_learns_from_synthetic_ones(patients: Path) -> None:
    stored = ("--method=resenc", "--size=tiny", "--labels=kits23", "--jobs=1", "--to=stored", *SMALL)
    every = []
    for folder, made_up in (("patients", "synthetic patients"), ("bodies", "")):
        done = kitseg(patients, "preprocess", folder, *stored)
        assert done.code == 0, done.text
        cases = [open_case(patients / "stored" / "6mm-6mm" / path.name) for path in (patients / folder).glob("*_*")]
        info = RunInfo("0", **training_facts(cases))
        assert (info.made_up, info.trained_on) == (made_up, made_up and f"{made_up}, not on patients")
        every += cases
    partly = RunInfo("0", **training_facts(every))
    assert (partly.made_up, partly.trained_on) == ("", "patients and synthetic patients")


def test_what_initial_weights_learned_from_is_stated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run on patients that began with a network of synthetic ones, also when its facts are written again."""
    hu, kidneys = scan()
    affine = np.array([[0, 0, -3, 0], [0, -3, 0, 0], [-3, 0, 0, 0], [0, 0, 0, 1.0]])
    for name, array in (("image", hu), ("label", kidneys.astype(np.uint8))):
        nib.save(nib.Nifti1Image(array, affine), tmp_path / f"{name}.nii.gz")
    store_case(
        CaseFiles(Case("a", tmp_path / "image.nii.gz", tmp_path / "label.nii.gz"), KITS23), tmp_path / "a", Grid()
    )
    monkeypatch.setattr(stage_inputs, "open_stored", lambda *_: open_case(tmp_path / "a"))
    initial = Run(untrained(tmp_path / "initial"))
    facts = json.loads(initial.info.read_text())
    initial.info.write_text(json.dumps({**facts, "synthetic": True}))
    (tmp_path / "run").mkdir()
    split = SimpleNamespace(cases={"a"}, test=(), folds=())
    plan = SimpleNamespace(split=split, config={}, initial=str(initial.path), run=Run(tmp_path / "run"))
    for _ in range(2):
        stage_inputs._record_facts(plan, None)
        assert plan.run.read_info().trained_on == "patients and synthetic patients"
    plan.initial = None
    initial.info.write_text(json.dumps({**facts, "phantom": True}))
    plan.run = initial
    stage_inputs._record_facts(plan, None)
    assert plan.run.read_info().also == ("phantoms",), "a run whose phantoms gave way to patients"


def test_masks_with_ids_of_their_own(patients: Path, tmp_path: Path) -> None:
    mask = nib.load(patients / "bodies" / "body_0" / "segmentation.nii.gz")
    case = tmp_path / "bodies" / "one"
    case.mkdir(parents=True)
    (case / "imaging.nii.gz").symlink_to(patients / "bodies" / "body_0" / "imaging.nii.gz")
    nib.save(nib.Nifti1Image(7 * np.asarray(mask.dataobj).astype(np.uint8), mask.affine), case / "segmentation.nii.gz")
    options = ("synthesize", "made", "--bodies=bodies", "-n", "1", "--jobs=1")
    assert "the label values 7" in " ".join(kitseg(tmp_path, *options).text.split())
    done = kitseg(tmp_path, *options, "--labels=kidney=7,tumor=8,cyst=9")
    assert done.code == 0, done.text
    written = np.unique(np.asarray(nib.load(tmp_path / "made/case_00000/segmentation.nii.gz").dataobj))
    assert set(written) <= {0, 1, 2, 3}, "those of kits23"


def test_methods_that_need_real_cases_refuse(patients: Path) -> None:
    for method, reason in {"two-phase": "of a fixed size", "dual-unet": "fixed spacing"}.items():
        refused = kitseg(patients, "train", f"--method={method}", "--size=tiny", *SYNTHETIC)
        assert refused.code == 2
        assert "data.source=synthesis: not for" in refused.text
        assert reason in refused.text
    wrong = kitseg(patients, "train", "--method=resenc", "--size=tiny", "--set=data.source=dreams")
    assert wrong.code == 2
    assert "data: Invalid enum value 'dreams'" in wrong.text
