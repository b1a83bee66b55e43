"""Phantoms: procedural contrast CT of an abdomen with kidneys, kidney tumors and their labels, in the KiTS layout.

Phantoms contain no patient data. All lengths are in millimetres and random draws don't depend on the voxel grid, so
that a case has the same anatomy at any matrix size.
Axes are (z, y, x) = (caudal, posterior, to the patient's left); the origin is the centre of the abdomen at L2.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage

from kitseg.errors import InputError
from kitseg.labels import CYST, KIDNEY, KITS19, TUMOR, Scheme
from kitseg.runtime.files import atomic_write
from kitseg.types import Geometry
from kitseg.volumes.nifti import PHANTOM_MARK, mark_of, write_image, write_labels
from kitseg.volumes.phantom_canvas import (
    FAT,
    Array,
    Canvas,
    Grid,
    Index,
    Point,
    SmoothField,
    Subject,
    ellipsoid,
)
from kitseg.volumes.phantom_organs import paint_body

THICKNESSES = (0.5, 0.75, 1.0, 1.25, 2.0, 2.5, 3.0, 4.0, 5.0)
THICKNESS_WEIGHTS = (0.04, 0.04, 0.08, 0.08, 0.08, 0.12, 0.26, 0.1, 0.2)
MOST_SLICES = 395
SINGLE_KIDNEY, CYSTIC = 0.08, 0.4
FLUID = 12.0  # HU


# --- the kidneys -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KidneyShape:
    """A kidney's shape: a bean in its own axes (long, lateral, dorsal); ``frame`` has them as rows in (z, y, x)."""

    center: Point
    frame: NDArray[np.float64]
    radii: Point
    bend: float
    surface: SmoothField
    side: int

    @classmethod
    def draw(cls, who: Subject, rng: Generator, side: int, growth: float) -> KidneyShape:
        """Draw a kidney of about 100-200 ml on the left (side 1) or right (-1)."""
        size = growth * rng.uniform(0.84, 1.04)
        radii = (56 * size * rng.uniform(0.93, 1.07), 30 * size, 25 * size * rng.uniform(0.93, 1.07))
        z, y, x = who.at(rng.uniform(-12, 16) - 7 * side, 14 + rng.uniform(-4, 6), rng.uniform(64, 74))
        lean, tip, turn = np.radians([rng.uniform(8, 24), rng.uniform(5, 22), rng.uniform(15, 45)])
        long_axis = np.array([np.cos(lean) * np.cos(tip), -np.sin(tip), side * np.sin(lean) * np.cos(tip)])
        lateral = np.array([0, np.sin(turn), side * np.cos(turn)])
        lateral -= (lateral @ long_axis) * long_axis
        lateral /= np.linalg.norm(lateral)
        frame = np.stack([long_axis, lateral, np.cross(long_axis, lateral) * -side])
        return cls((z, y, side * x), frame, radii, rng.uniform(6, 12), SmoothField(rng, 22), side)

    def local(self, grid: Grid) -> list[Array]:
        """Coordinates in the kidney's own axes, in which the bean is straight."""
        z, y, x = (axis - np.float32(c) for axis, c in zip(grid, self.center, strict=True))
        long, lateral, dorsal = (a * z + b * y + c * x for a, b, c in self.frame.tolist())
        return [long, lateral + self.bend * (long / self.radii[0]) ** 2, dorsal]

    def surface_point(self, direction: NDArray[np.float64], beyond: float) -> Point:
        """The point ``beyond`` mm outside the surface in a direction (own axes)."""
        direction = direction / np.linalg.norm(direction)
        own = direction * (beyond + 1 / np.linalg.norm(direction / self.radii))
        own[1] -= self.bend * (own[0] / self.radii[0]) ** 2
        z, y, x = (self.center + own @ self.frame).tolist()
        return z, y, x

    def distances(self, grid: Grid) -> tuple[Array, Array, list[Array]]:
        """Signed distance to the capsule and to the sinus, and the local coordinates."""
        local = self.local(grid)
        capsule = ellipsoid(local, (0, 0, 0), self.radii) + 1.3 * self.surface(grid)
        mouth = [local[0], local[1] + 0.75 * self.radii[1], local[2]]
        sinus = ellipsoid(mouth, (0, 0, 0), (0.46 * self.radii[0], 0.8 * self.radii[1], 0.44 * self.radii[2]))
        return capsule, sinus + 1.5 * self.surface(grid), local


@dataclass(frozen=True)
class LesionShape:
    """The shape of a tumor or cyst: a ball with bumps at a kidney's surface."""

    center: Point
    radius: float
    bumps: SmoothField
    side: int

    @classmethod
    def draw(cls, kidney: KidneyShape, rng: Generator, diameter: float) -> LesionShape:
        """Draw a ball that is partly inside the kidney, away from the hilum and the spine."""
        radius = diameter / 2
        direction = rng.normal(0, (1, 0.7, 0.8))
        direction[1] = abs(direction[1]) + 0.2
        direction[2] -= radius / 25
        depth = min(radius * rng.uniform(0.5, 1.9), 26.0)
        center = kidney.surface_point(direction, radius - depth)
        return cls(center, radius, SmoothField(rng, max(0.7 * radius, 5)), kidney.side)

    def window(self, canvas: Canvas) -> tuple[Index, Grid, Array]:
        """The window around the lesion, and the signed distance to it inside the retroperitoneum."""
        index, grid = canvas.around(self.center, 1.5 * self.radius + 8)
        ball = ellipsoid(grid, self.center, (self.radius,) * 3) + 0.1 * self.radius * self.bumps(grid)
        room = np.maximum(canvas.cavity[index] + 2, 25 - self.side * grid[2])
        return index, grid, np.maximum(ball, room)


def _perirenal_fat(canvas: Canvas, kidney: KidneyShape, lesions: list[LesionShape], rng: Generator) -> None:
    """Paint the fat capsule around a kidney and its lesions."""
    strands, thickness = SmoothField(rng, 6), rng.uniform(4, 14)
    index, grid = canvas.around(kidney.center, 85)
    distance = np.maximum(kidney.distances(grid)[0] - thickness, canvas.cavity[index])
    canvas.paint(index, distance, FAT + 8 * strands(grid))
    for lesion in lesions:
        index, grid, distance = lesion.window(canvas)
        canvas.paint(index, distance - 3, FAT + 8 * strands(grid))


def _hilum(canvas: Canvas, who: Subject, kidney: KidneyShape, rng: Generator) -> None:
    """Paint renal artery, vein and pelvis from the great vessels into the sinus."""
    front = who.spine_y - 27
    gate = kidney.surface_point(np.array([0, -1, 0]), 4)
    deep = kidney.surface_point(np.array([0, -1, 0]), -0.6 * kidney.radii[1])
    canvas.tube([deep, gate, (gate[0] + 35, gate[1] + 5, gate[2])], [1, 6, 3.5], FLUID)
    for spread in (-14, 0, 14):
        calyx = kidney.surface_point(np.array([spread / 10, -1, 0.1]), -0.9 * kidney.radii[1])
        canvas.tube([gate, calyx], 3, FLUID)
        canvas.tube([gate, (calyx[0] + 5, calyx[1] - 3, calyx[2])], 2.2, who.enhanced(150, 170))
    vein = (gate[0] - 4, gate[1] - 5, gate[2])
    midway = (vein[0], front - 13, 10.0) if kidney.side == 1 else vein
    canvas.tube([vein, midway, (vein[0], front, -20)], 5, who.enhanced(150, 165))
    artery = [(gate[0] - 6, front, 8.0), (gate[0], gate[1] + 1, gate[2])]
    canvas.tube(artery, rng.uniform(2.5, 3.2), who.enhanced(290, 165))


def _parenchyma(canvas: Canvas, who: Subject, kidney: KidneyShape, rng: Generator) -> None:
    """Paint cortex and pyramids around the sinus."""
    cortex, medulla = who.enhanced(205, 178) + rng.normal(0, 8), who.enhanced(110, 165)
    pitch, grain = rng.uniform(15, 20), SmoothField(rng, 4)
    index, grid = canvas.around(kidney.center, 85)
    capsule, sinus, (long, lateral, dorsal) = kidney.distances(grid)
    rows = np.cos(2 * np.pi * long / pitch) * np.cos(3 * np.arctan2(dorsal, lateral + 0.3 * kidney.radii[1]))
    pyramid = np.clip((-capsule - 5.5) / 2, 0, 1) * np.clip(2 * rows + 0.9, 0, 1)
    distance = np.maximum(np.maximum(capsule, -sinus), canvas.cavity[index] + 2)
    canvas.paint(index, distance, cortex + pyramid * (medulla - cortex) + 4 * grain(grid), KIDNEY)


def _cyst(canvas: Canvas, lesion: LesionShape, rng: Generator) -> None:
    """Paint a cyst of water with the label kidney, as in KiTS19."""
    index, _, distance = lesion.window(canvas)
    canvas.paint(index, distance, float(rng.uniform(0, 15)), CYST)


def _tumor(canvas: Canvas, lesion: LesionShape, rng: Generator) -> None:
    """Paint a heterogeneous solid tumor; larger ones often have a necrotic core."""
    mean, texture = rng.uniform(45, 145), SmoothField(rng, float(np.clip(lesion.radius / 3, 2.5, 9)))
    necrotic, share = lesion.radius > 12 and rng.uniform() < 0.55, rng.uniform(0.25, 0.6)
    index, grid, distance = lesion.window(canvas)
    uneven = texture(grid)
    canvas.paint(index, distance, mean + (0.06 * mean + 6) * uneven, TUMOR)
    if necrotic:
        core = distance + share * lesion.radius + 0.2 * lesion.radius * uneven
        canvas.paint(index, core, 25 + 4 * uneven)


def _kidneys(canvas: Canvas, who: Subject, rng: Generator) -> None:
    """Paint one or two kidneys with at least one tumor in total."""
    sides = [int(rng.choice((-1, 1)))] if rng.uniform() < SINGLE_KIDNEY else [-1, 1]
    kidneys = [KidneyShape.draw(who, rng, side, 1.0 if len(sides) == 2 else 1.12) for side in sides]
    cysts = rng.integers(1, 4) if rng.uniform() < CYSTIC else 0
    tumors = rng.choice((1, 2, 3), p=(0.82, 0.14, 0.04))
    hosts = rng.integers(len(kidneys), size=cysts + tumors)
    sizes = [*rng.uniform(8, 38, cysts), *np.clip(rng.lognormal(np.log(34), 0.55, tumors), 10, 80)]
    lesions = [LesionShape.draw(kidneys[host], rng, float(size)) for host, size in zip(hosts, sizes, strict=True)]
    for side, kidney in enumerate(kidneys):
        own = [lesion for host, lesion in zip(hosts, lesions, strict=True) if host == side]
        _perirenal_fat(canvas, kidney, own, rng)
    for kidney in kidneys:
        _hilum(canvas, who, kidney, rng)
        _parenchyma(canvas, who, kidney, rng)
    for number, lesion in enumerate(lesions):
        (_cyst if number < cysts else _tumor)(canvas, lesion, rng)


# --- the scan --------------------------------------------------------------------------------------------------------


def _lattice(who: Subject, rng: Generator, matrix: int) -> tuple[Grid, Point]:
    """Voxel centres in mm along each axis, and the spacing."""
    thickness = float(rng.choice(THICKNESSES, p=THICKNESS_WEIGHTS))
    slices = int(min(rng.uniform(190, 330) / thickness, MOST_SLICES))
    width = 2 * (who.half_width + 1.3 * who.wall + who.fat)
    pixel = float(np.clip(width * rng.uniform(1.05, 1.3), 330, 460)) / matrix
    middle = rng.uniform((-8, -12, -6), (8, 12, 6)) + np.array((0, 0.2 * who.fat, 0))
    z, y, x = (
        (mid + step * (np.arange(n) - (n - 1) / 2)).astype(np.float32)
        for mid, step, n in zip(middle, (thickness, pixel, pixel), (slices, matrix, matrix), strict=True)
    )
    return (z, y, x), (thickness, pixel, pixel)


def _acquire(canvas: Canvas, spacing: Point, rng: Generator) -> NDArray[np.int16]:
    """Add the scanner's blur, shading and correlated noise."""
    hu = canvas.hu
    sigma = (0.35, max(0.8 / spacing[1], 0.35), max(0.8 / spacing[2], 0.35))
    ndimage.gaussian_filter(hu, sigma, output=hu, truncate=3)
    shading, strength = SmoothField(rng, 140), rng.uniform(9, 20)
    for index, grid in canvas.slabs():
        noise = rng.standard_normal(hu[index].shape, dtype=np.float32)
        noise = ndimage.gaussian_filter(noise, (0, 0.7, 0.7), truncate=3, mode="wrap")
        hu[index] += strength / 0.403 * noise + 4 * shading(grid)
    return np.clip(np.rint(hu, out=hu), -1024, 3071).astype(np.int16)


def make_case(
    seed: int, index: int, matrix: int = 512
) -> tuple[NDArray[np.int16], NDArray[np.uint8], NDArray[np.float64]]:
    """Generate a synthetic contrast CT case, which is determined by seed and index.

    Args:
        seed: random seed of the data set.
        index: of the case in the data set.
        matrix: pixels along rows and columns; the field of view in mm and the anatomy don't depend on it.

    Returns:
        CT (D, H, W) in HU; labels (D, H, W) with kitseg's ids, cysts among them; affine (4, 4) to mm in RAS+,
        orientation (I, P, L).
    """
    rng = np.random.default_rng([seed, index])
    who = Subject.draw(rng)
    axes, spacing = _lattice(who, rng, matrix)
    canvas = Canvas(axes, edge=max(spacing[1], 1.0))
    paint_body(canvas, who, rng)
    _kidneys(canvas, who, rng)
    affine = np.eye(4)
    affine[:3, :3] = 0.0 - np.diag(spacing)[::-1]
    return _acquire(canvas, spacing, rng), canvas.label, affine


def write_case(folder: Path, seed: int, index: int, matrix: int, scheme: Scheme = KITS19) -> None:
    """Write ``folder/case_{index:05d}`` with imaging.nii.gz and segmentation.nii.gz, both marked as phantom.

    scheme: of the label map.

    The case is written atomically; an earlier phantom of that name is replaced.

    Raises:
        InputError: a case of that name exists that isn't a phantom. KitsegError: the folder can't be written.
    """
    target = folder / f"case_{index:05d}"
    own = {"imaging.nii.gz", "segmentation.nii.gz"}
    there = {p.name for p in target.iterdir()} if target.is_dir() else None
    if target.exists() and not (there == own and {mark_of(target / name) for name in own} == {PHANTOM_MARK}):
        raise InputError(target, "already exists and is not a phantom", "Choose another folder")
    ct, label, affine = make_case(seed, index, matrix)
    native = Geometry((ct.shape[0], ct.shape[1], ct.shape[2]), affine)
    with atomic_write(target) as partial:
        write_image(partial / "imaging.nii.gz", ct, native, PHANTOM_MARK)
        write_labels(partial / "segmentation.nii.gz", label, native, PHANTOM_MARK, scheme)
