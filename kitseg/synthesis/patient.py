"""A synthetic patient: a patch, or a whole scan, as a pure function of a body, shapes and a random generator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from kitseg.labels import BACKGROUND, KIDNEY
from kitseg.synthesis import fluid, habitus, lesions, neighbours, phases, scanners
from kitseg.synthesis.anatomies import GAS, SHARE, Graft, Transplant, any_transplants, graft
from kitseg.synthesis.bodies import KidneyBox, RealBody
from kitseg.synthesis.fields import Vector
from kitseg.synthesis.habitus import Frame
from kitseg.synthesis.lesions import PlannedLesion, Surroundings
from kitseg.synthesis.shapes import Shape, Shapes, ball_radius

LESIONS = (0.38, 0.41, 0.15, 0.06)  # probability of 0, 1, 2, 3 lesions
TUMORS, SEVERAL, STONES, LOOKALIKES, MASSES = 0.6, 0.12, 0.08, 0.18, 0.15  # of the lesions; of the patients
ROOM = 9.0  # mm: the radius from which a lesion may push
NEAR = 50.0  # mm around the kidneys, from which patches of a kidney stage are taken
JITTER, FEWEST = 0.22, 50  # of a patch's extent; places in view, below which no further lesion is put there


@dataclass(frozen=True)
class SynthesisParts:
    """The parts of the synthesis, each of which can be switched off.

    anatomies: kidneys of other patients with their tumors and cysts; tumors, cysts, stones; lookalikes: of tumors,
    small ones beside the kidney and large masses anywhere; fluid: in a wide renal pelvis, around a kidney, anywhere in
    fat, or in an organ such as a bladder; pushes: large lesions displace tissue; neighbours: tissue of other bodies and
    other contrast beside the kidneys, in patches; phases; habitus: rotation, scale, flip, displacement; kidneys:
    absent, small, low and malrotated ones; scanners.
    """

    anatomies: bool = True
    tumors: bool = True
    cysts: bool = True
    stones: bool = True
    lookalikes: bool = True
    fluid: bool = True
    pushes: bool = True
    neighbours: bool = True
    phases: bool = True
    habitus: bool = True
    kidneys: bool = True
    scanners: bool = True


@dataclass(frozen=True)
class View:
    """What a patient is made for: voxels and spacing (mm) of the patch, and what it shows.

    focus: probability of a lesion in its centre, if the patient has one; otherwise shares of a kidney and of any place;
    everywhere: "any place" is one of the whole body, not only within ``NEAR`` of the kidneys; radii: of lesions, in mm;
    whole: the patch is the body's whole scan.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    focus: tuple[float, float, float] = (0.5, 0.25, 0.25)
    everywhere: bool = False
    radii: tuple[float, float] = (4.0, 50.0)
    whole: bool = False

    @classmethod
    def on(cls, body: RealBody) -> View:
        """The whole scan of a body."""
        depth, height, width = body.hu.shape
        return cls((depth, height, width), body.spacing, whole=True)


@dataclass(frozen=True)
class SyntheticPatient:
    """HU (D, H, W) float32, labels (D, H, W) uint8, and what was made, in plain values."""

    hu: Tensor
    label: Tensor
    made: dict[str, Any]


def make(
    body: RealBody,
    shapes: Shapes,
    view: View,
    parts: SynthesisParts,
    rng: Generator,
    others: Sequence[RealBody] = (),
) -> SyntheticPatient:
    """A synthetic patient on the body's anatomy, in a patch with pieces of ``others`` away from the kidneys."""
    frame, plans, transplants = _arranged(body, shapes, view, parts, rng)
    points = frame.grid(view.shape, view.spacing)
    fields = habitus.sample(body, points)
    for kidney in frame.removed:
        fields = habitus.remove(kidney, fields, points, rng)
    grafts = [graft(one, fields, points, body.facts.parenchyma, rng) for one in transplants]
    spacing = np.array(view.spacing)
    if parts.neighbours and not view.whole:
        fields = neighbours.change(body, others, fields, spacing, rng)
    on = phases.Tissues(fields[0], fields[1] * frame.zoom, fields[2], spacing)
    name = phases.any_phase(rng, body.facts, bool(transplants)) if parts.phases else phases.SCANNED
    level = body.facts.parenchyma
    hu, phase = phases.show(name, on, body.facts, rng) if parts.phases else (on.hu, phases.Phase(name, level, level))
    hu = fluid.add(hu, on, rng) if parts.fluid else hu
    label = (on.distance < 0).to(torch.uint8) * KIDNEY
    numbers = torch.zeros_like(label)
    scene = Surroundings(hu, on.distance, on.tissue, label, spacing, phase, body.facts.noise, numbers)
    if parts.lookalikes and rng.random() < MASSES and (mass := lesions.any_mass(scene, rng)) is not None:
        lesions.insert(mass, scene, rng)
    for plan in sorted(plans, key=lambda plan: list(lesions.IDS).index(plan.kind)):
        lesions.insert(plan, scene, rng)
    for one in grafts:
        if one is not None:
            _grow(one, parts, frame.zoom, scene, rng)
    hu = _scanned(scene, points, body, rng) if parts.scanners else hu
    made = {
        "body": body.name,
        "phase": phase.name,
        "parenchyma_hu": round(phase.parenchyma, 1),
        "lesions": lesions.labelled(scene),
        "kidneys": [one.kind for one in frame.unusual],
        "kidneys_from": [one.anatomy.case for one in transplants],
    }
    return SyntheticPatient(hu, label, made)


def _grow(one: Graft, parts: SynthesisParts, zoom: float, scene: Surroundings, rng: Generator) -> None:
    """Put the tumors and cysts of a transplant into a scene."""
    for kind, on in (("tumor", parts.tumors), ("cyst", parts.cysts)):
        lesion = one.lesions[kind] * zoom
        volume = float((lesion < 0).sum()) * float(np.prod(scene.spacing))
        if on and volume > 0:
            part = lesions.Part(one.box, one.case)
            lesions.put(kind, lesion, ball_radius(volume), part, scene, rng)


@dataclass(frozen=True)
class _Chosen:
    """A lesion, and the voxel of the body where it lies."""

    kind: str
    shape: Shape
    scale: float
    voxel: Vector


def _arranged(
    body: RealBody, shapes: Shapes, view: View, parts: SynthesisParts, rng: Generator
) -> tuple[Frame, list[PlannedLesion], list[Transplant]]:
    """Where the patch lies in the body, and the lesions and transplanted kidneys in it."""
    frame = _frame(body, view, parts, rng)
    if parts.anatomies and shapes.anatomies and rng.random() < SHARE:
        kept = [kidney for kidney in body.facts.kidneys if kidney not in frame.removed]
        others = any_transplants(kept, shapes.anatomies, rng)
        return _focused(frame, others, body, view, rng), [], others
    kinds, places, chosen = _kinds(parts, view.whole, rng), _outside(body, frame.removed), list[_Chosen]()

    def choose(kind: str) -> _Chosen:
        shape, scale = lesions.choose(kind, shapes, rng, view.radii)
        voxel = lesions.place(kind, shape.radius * scale, places, frame.zoom, rng)
        return _Chosen(kind, shape, scale, voxel)

    if not view.whole:
        if kinds and rng.random() < view.focus[0]:
            chosen.append(choose(kinds[0]))
            centre = chosen[0].voxel
        elif rng.random() < view.focus[1] / sum(view.focus[1:]):
            centre = _any_place(places, rng)
        elif view.everywhere:
            centre = body.somewhere(rng) / body.spacing
        else:
            centre = _any_place(places, rng) + rng.uniform(-NEAR, NEAR, 3) / body.spacing
        frame = _around(frame, centre * body.spacing, view, rng)
        places = _in_view(places, body, frame, view)
    chosen += [choose(kind) for kind in kinds[len(chosen) :] if len(places) >= FEWEST]
    plans = [
        PlannedLesion(
            one.kind, one.shape, one.scale, lesions.orientation(one.kind, rng), frame.find(one.voxel * body.spacing)
        )
        for one in chosen
    ]
    large = [plan for plan in plans if plan.radius > ROOM and rng.random() < 0.8] if parts.pushes else []
    pushes = tuple(habitus.push(plan.centre, plan.radius, float(rng.uniform(0.2, 0.6))) for plan in large)
    return replace(frame, pushes=pushes), plans, []


def _around(frame: Frame, point: Vector, view: View, rng: Generator) -> Frame:
    """The frame of a patch whose centre is near a point (mm) of the body."""
    offset = frame.matrix @ (rng.uniform(-1, 1, 3) * JITTER * view.shape * view.spacing)
    return replace(frame, centre=frame.source(point) + offset)


def _focused(frame: Frame, others: Sequence[Transplant], body: RealBody, view: View, rng: Generator) -> Frame:
    """The frame of a patch on a lesion or another point of transplanted kidneys, or on any place."""
    if view.whole:
        return frame
    diseased = [points for one in others if len(points := one.points(lesions=True))]
    if diseased and rng.random() < view.focus[0]:
        points = diseased[int(rng.integers(len(diseased)))]
    else:
        points = others[int(rng.integers(len(others)))].points(lesions=False)
    centre = points[int(rng.integers(len(points)))]
    if not diseased and rng.random() < view.focus[2] / sum(view.focus[1:]):
        near = centre + rng.uniform(-NEAR, NEAR, 3)
        centre = body.somewhere(rng) if view.everywhere else near
    return _around(frame, centre, view, rng)


def _frame(body: RealBody, view: View, parts: SynthesisParts, rng: Generator) -> Frame:
    """The map from a patch in the middle of the body, with the kidneys as they are in this patient."""
    frame = Frame(np.eye(3), (np.array(body.hu.shape) - 1) / 2 * body.spacing)
    if parts.habitus:
        frame = replace(frame, matrix=habitus.any_matrix(rng, view.whole), elastic=habitus.any_elastic(rng))
    if parts.kidneys:
        frame = replace(frame, unusual=habitus.unusual_kidneys(rng, body.facts.kidneys))
    return frame


def _kinds(parts: SynthesisParts, whole: bool, rng: Generator) -> list[str]:
    """The kinds of the lesions, those of the parts that are switched on; twice as many in a whole scan."""
    count = sum(int(rng.choice(len(LESIONS), p=LESIONS)) for _ in range(1 + whole))
    kinds = ["tumor" if rng.random() < TUMORS else "cyst" for _ in range(count)]
    if kinds and rng.random() < SEVERAL:
        kinds += ["cyst"] * int(rng.integers(1, 5))
    if rng.random() < STONES:
        kinds += ["stone"] * int(rng.integers(1, 4))
    if rng.random() < LOOKALIKES:
        kinds.append("lookalike")
    on = {"tumor": parts.tumors, "cyst": parts.cysts, "stone": parts.stones, "lookalike": parts.lookalikes}
    return [kind for kind in kinds if on[kind]]


def _outside(body: RealBody, removed: Sequence[KidneyBox]) -> NDArray[np.float32]:
    """The body's places, but for those in and around removed kidneys."""
    keep = np.ones(len(body.places), np.bool_)
    for kidney in removed:
        away = np.abs(body.places[:, :3] * body.spacing - kidney.centre) / (np.array(kidney.radii) + 20)
        keep &= away.max(1) > 1
    return body.places[keep] if keep.any() else body.places


def _in_view(places: NDArray[np.float32], body: RealBody, frame: Frame, view: View) -> NDArray[np.float32]:
    """The places that the patch shows."""
    points = (places[:, :3] * body.spacing - frame.centre) @ np.linalg.inv(frame.matrix).T
    return places[(np.abs(points) < np.array(view.shape) * view.spacing / 2 + 4).all(1)]


def _any_place(places: NDArray[np.float32], rng: Generator) -> Vector:
    voxel: Vector = places[int(rng.integers(len(places))), :3].astype(float)
    return voxel


def _scanned(scene: Surroundings, points: Tensor, body: RealBody, rng: Generator) -> Tensor:
    """HU from another scanner, on another table; what is out of its view, or has become air, loses its label."""
    size, hu = np.array(body.hu.shape) * body.spacing, scene.hu
    if rng.random() < 0.08:
        hu = hu.masked_fill(scanners.out_of_view(points, size, rng), habitus.AIR)
    if rng.random() < 0.3 and float(points[1].max()) > body.facts.back:
        hu = scanners.table(hu, points, body.facts.back, float(size[2]), rng)
    hu = scanners.scan(hu, scene.spacing, rng)
    scene.label[hu < GAS] = BACKGROUND
    return hu
