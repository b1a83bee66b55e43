"""Lesions of real shapes in real kidneys: where they lie, what room they take, and how they look.

A shape is a signed distance field, turned, scaled and warped; it grows into fat rather than into organs, and never into
bone, air or vessels. Its edge is as sharp as the scanner shows it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn.functional import grid_sample

from kitseg.labels import BACKGROUND, CYST, TUMOR
from kitseg.synthesis import phases, textures
from kitseg.synthesis.bodies import CLEAR, any_voxel
from kitseg.synthesis.fields import Vector, any_rotation, box_mean, rotation, smooth_noise
from kitseg.synthesis.phases import Phase
from kitseg.synthesis.shapes import Shape, Shapes, drawn_shape
from kitseg.synthesis.textures import Site

#: Label ids in the order in which lesions are put, later ones over earlier ones; None: the label stays as it is.
IDS = {"mass": None, "lookalike": None, "tumor": TUMOR, "cyst": CYST, "stone": None}
RADII = {
    "mass": (20.0, 80.0), "tumor": (2.5, 55.0), "lookalike": (2.5, 25.0), "cyst": (2.5, 35.0), "stone": (1.0, 6.0),
}  # fmt: skip # mm
IN_KIDNEY = ("tumor", "cyst")
APART = 3.0  # mm between the kidney and a lookalike or mass
Box3 = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Part:
    """Voxels of a scene, and the label map that gives the shape of the lesion in them, empty for a drawn one."""

    box: Box3
    case: str


@dataclass(frozen=True)
class PlannedLesion:
    """A lesion to be put into a patch.

    kind: tumor, cyst, stone, or without a label lookalike, the image of a tumor beside the kidney, and mass, that of a
    large tumor anywhere but there; scale, turn: of the shape; centre: mm from the patch's centre.
    """

    kind: str
    shape: Shape
    scale: float
    turn: Vector
    centre: Vector

    @property
    def radius(self) -> float:
        """The radius of a ball of its volume, in mm."""
        return self.shape.radius * self.scale


@dataclass(frozen=True)
class Surroundings:
    """What lesions are put into, each (D, H, W) and changed in place: HU, distance to the kidneys, tissue, label.

    spacing: mm; noise: deviation of the body's fine noise in HU; numbers: (D, H, W) of the last lesion whose label each
    voxel got, counted from 1 by their order in ``made``, and 0; made: what each lesion is, in plain values.
    """

    hu: Tensor
    distance: Tensor
    tissue: Tensor
    label: Tensor
    spacing: Vector
    phase: Phase
    noise: float
    numbers: Tensor
    made: list[dict[str, Any]] = field(default_factory=list)


def choose(kind: str, shapes: Shapes, rng: Generator, radii: tuple[float, float]) -> tuple[Shape, float]:
    """A shape for a lesion, and its scale, so that small and large ones of ``radii`` (mm) are learned as well."""
    low, high = max(radii[0], RADII[kind][0]), min(radii[1], RADII[kind][1])
    if kind == "stone":
        return drawn_shape(rng, float(rng.uniform(*RADII[kind])), True), 1.0
    pool = shapes.cyst if kind == "cyst" else shapes.tumor
    if not pool:
        radius = float(np.exp(rng.uniform(np.log(low), np.log(max(low, min(high, 20) if kind == "cyst" else high)))))
        return drawn_shape(rng, radius, kind == "cyst"), 1.0
    shape = pool[int(rng.integers(len(pool)))]
    radius = shape.radius * rng.uniform(0.75, 1.3)
    if not low < radius < high or rng.random() < (0.3 if kind == "cyst" else 0.5):
        radius = float(np.exp(rng.uniform(np.log(low), np.log(high))))
    return shape, radius / shape.radius


def orientation(kind: str, rng: Generator) -> Vector:
    """A rotation or reflection for a shape: any for a cyst; about the body's axis above all for a tumor."""
    if kind in ("cyst", "stone"):
        return any_rotation(rng)
    turned: Vector = rotation(rng, (180, 30, 30)) @ np.diag(rng.choice([-1, 1], 3))
    return turned


def place(kind: str, radius: float, places: NDArray[np.float32], zoom: float, rng: Generator) -> Vector:
    """The voxel of a body (slice, row, column) for a lesion's centre, from rows of ``RealBody.places``."""
    if kind == "stone" or (kind == "cyst" and rng.random() < 0.1):  # in the collecting system; a parapelvic cyst
        inner = places[(places[:, 4] > 0) if kind == "cyst" or rng.random() < 0.5 else (places[:, 3] < -4)]
        places = inner if len(inner) else places
        chosen: Vector = places[int(rng.integers(len(places))), :3].astype(float)
        return chosen
    if kind == "lookalike":
        want = rng.uniform(radius + 4, radius + 16)
    else:  # from deep inside to half outside
        want = rng.uniform(-min(0.7 * radius + 3, 14), 0.5 * radius)
    off = np.abs(places[:, 3] * zoom - want)
    count = min(60, len(off) - 1)
    near = np.flatnonzero(off <= max(1.5, float(np.partition(off, count)[count])))
    found: Vector = places[near[int(rng.integers(len(near)))], :3].astype(float)
    return found


def any_mass(scene: Surroundings, rng: Generator) -> PlannedLesion | None:
    """A large mass in the patient, its centre away from the kidneys; None where there is no place for one."""
    smallest, largest = RADII["mass"]
    voxel = any_voxel(scene.hu, scene.distance, smallest, rng)
    if voxel is None:
        return None
    room = float(scene.distance[tuple(voxel.astype(int))])
    radius = float(np.exp(rng.uniform(np.log(smallest), np.log(largest if room > CLEAR else min(room, largest)))))
    centre = (voxel - (np.array(scene.hu.shape) - 1) / 2) * scene.spacing
    return PlannedLesion("mass", drawn_shape(rng, radius, False), 1.0, any_rotation(rng), centre)


def insert(plan: PlannedLesion, scene: Surroundings, rng: Generator) -> None:
    """Put a lesion into a scene, unless nothing of it is in the patch, or in the kidney (of a lookalike: beside it)."""
    if (box := _box(plan, scene)) is not None:
        lesion = lesion_distance(plan, box, scene, rng)
        put(plan.kind, lesion, plan.radius, Part(box, plan.shape.case), scene, rng)


def put(kind: str, lesion: Tensor, radius: float, part: Part, scene: Surroundings, rng: Generator) -> None:
    """Put what is within a surface into a part of a scene; see ``insert``. lesion: distance in mm, negative inside."""
    box = part.box
    hu, distance, label = scene.hu[box], scene.distance[box], scene.label[box]
    if kind != "stone":
        around = box_mean(hu, _edge(scene))
        if kind != "mass":
            lesion = _into_fat(lesion, around, distance, rng)
        lesion = _kept_apart(lesion, radius, around, scene, box)
    if kind in ("lookalike", "mass"):
        lesion = torch.maximum(lesion, APART - distance)
    inside = lesion < 0
    if kind != "stone" and not inside.any():
        return
    if kind in IN_KIDNEY and (inside & (distance < 0)).sum() < 0.06 * inside.sum():
        return
    site = Site(lesion, radius, scene.spacing, scene.phase)
    if kind == "stone":
        look, made = "stone", textures.stone(site, rng)
    else:
        look, made = textures.cyst(site, rng) if kind == "cyst" else textures.tumor(site, rng)
    made = made + smooth_noise(rng, hu.shape, 1.2) * scene.noise * float(rng.uniform(*phases.GRAIN))
    width = float(rng.uniform(0.35, 0.6)) * max(float(scene.spacing.mean()), 1.2)
    hu += torch.sigmoid(-lesion / width) * (made - hu)
    ml = float(inside.sum()) * float(np.prod(scene.spacing)) / 1000
    scene.made.append({"kind": kind, "look": look, "ml": round(ml, 3), "shape_from": part.case or "drawn"})
    if (number := IDS[kind]) is not None:
        label[inside] = number
        scene.numbers[box][inside] = len(scene.made)


def labelled(scene: Surroundings) -> list[dict[str, Any]]:
    """What the lesions are, those with a label with the ml that it has in the end, and only if it has any."""
    counts = np.bincount(scene.numbers[scene.label != BACKGROUND].numpy(), minlength=len(scene.made) + 1)[1:]
    voxel_ml, found = float(np.prod(scene.spacing)) / 1000, []
    for row, count in zip(scene.made, counts.tolist(), strict=True):
        if IDS[row["kind"]] is None:
            found.append(row)
        elif count:
            found.append({**row, "ml": round(count * voxel_ml, 3)})
    return found


def lesion_distance(plan: PlannedLesion, box: Box3, scene: Surroundings, rng: Generator) -> Tensor:
    """Distance in mm of the voxels in a box to the lesion's warped surface, negative inside."""
    axes = [
        (torch.arange(s.start, s.stop, dtype=torch.float32) - (n - 1) / 2) * float(mm) - float(c)
        for s, n, mm, c in zip(box, scene.hu.shape, scene.spacing, plan.centre, strict=True)
    ]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    back = torch.tensor(plan.turn.T / (plan.scale * plan.shape.mm), dtype=torch.float32)
    voxels = (back @ points.reshape(3, -1)).reshape(points.shape)
    size = torch.tensor(plan.shape.distance.shape, dtype=torch.float32)[:, None, None, None]
    relative = (2 * voxels / size).flip(0).permute(1, 2, 3, 0)[None]
    field = torch.from_numpy(plan.shape.distance.astype(np.float32))[None, None]
    found = grid_sample(field, relative, padding_mode="border", align_corners=False)[0, 0] * plan.scale
    beyond = ((voxels.abs() - size / 2).clamp(min=0) ** 2).sum(0).sqrt() * plan.shape.mm * plan.scale
    bumps = smooth_noise(rng, found.shape, np.maximum(2.5, 0.7 * plan.radius / scene.spacing))
    return found + beyond + bumps * float(min(0.12 * plan.radius, 3.0) * rng.uniform(0, 1))


def _into_fat(lesion: Tensor, around: Tensor, distance: Tensor, rng: Generator) -> Tensor:
    """The distance to a lesion that grows into fat rather than into organs; around: HU, a mean over some mm."""
    soft = ((around + 50) / 50).clamp(0, 1)
    return lesion + float(rng.uniform(0.3, 0.9)) * (distance - 1).clamp(0, 40) * soft


def _edge(scene: Surroundings) -> int:
    """Voxels of a cube of about 6 mm."""
    return max(3, 2 * round(3 / float(scene.spacing.mean())) + 1)


def _kept_apart(lesion: Tensor, radius: float, around: Tensor, scene: Surroundings, box: Box3) -> Tensor:
    """The distance to a lesion that stops at bone, vessels, air and ribs; around: HU, a mean over some mm."""
    distance, vessel = scene.distance[box], box_mean(scene.tissue[box].clamp(min=0), _edge(scene))
    barred = ((around > 190) | (vessel > 0.5)) & (distance > 6) | (around < -250)
    out = torch.tensor(float(scene.spacing.mean()))
    lesion = box_mean(torch.where(barred, torch.maximum(lesion, out), lesion), 3)
    if radius > 10 and bool(barred.any()):  # nothing of it beyond the ribs
        parts, count = ndimage.label((lesion < 0).numpy())
        if count > 1:
            largest = np.bincount(parts[parts > 0]).argmax()
            lesion = torch.where(torch.from_numpy((parts > 0) & (parts != largest)), out, lesion)
    return lesion


def _box(plan: PlannedLesion, scene: Surroundings) -> Box3 | None:
    """The voxels that a lesion and its edge may reach; None if these are too few."""
    middle = (np.array(scene.hu.shape) - 1) / 2 + plan.centre / scene.spacing
    reach = (max(plan.shape.distance.shape) * plan.shape.mm * plan.scale / 2 * 1.25 + 4) / scene.spacing
    low = np.maximum(np.floor(middle - reach), 0).astype(int)
    high = np.minimum(np.ceil(middle + reach) + 1, scene.hu.shape).astype(int)
    if (high - low < 3).any():
        return None
    z, y, x = (slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    return z, y, x
