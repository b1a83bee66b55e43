"""The phantom's organs around the kidneys: one function per organ draws its parameters and paints it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import numpy as np
from numpy.random import Generator

from kitseg.volumes.phantom_canvas import (
    FAT,
    Array,
    Canvas,
    Grid,
    Point,
    SmoothField,
    Subject,
    capsule,
    ellipsoid,
)

GAS, LUNG, SKIN, MUSCLE, BOWEL_WALL = -900.0, -830.0, 20.0, 58.0, 75.0  # HU
VERTEBRA_PITCH = 36.0
ORAL_CONTRAST = 0.4


def paint_body(canvas: Canvas, who: Subject, rng: Generator) -> None:
    """Paint everything but the kidneys, in the order in which later organs cover earlier ones."""
    for organ in (_trunk, _table, _lungs, _bowel, _liver, _spleen, _stomach, _spine, _muscles, _ribs, _great_vessels):
        organ(canvas, who, rng)


def _trunk(canvas: Canvas, who: Subject, rng: Generator) -> None:
    """Paint skin, subcutaneous fat, muscle wall and the fat of the cavity."""
    outline, strands, depot = SmoothField(rng, 70), SmoothField(rng, 7), SmoothField(rng, 60)
    waist = 1 + rng.uniform(-0.04, 0.04) * np.sin(canvas.axes[0] / 90)[:, None, None]
    for index, grid in canvas.slabs():
        _, y, x = grid
        rho = np.hypot(y, x) + 1e-3
        cavity_radius = rho / ((abs(y) / who.half_depth) ** 2.3 + (abs(x) / who.half_width) ** 2.3) ** (1 / 2.3)
        canvas.cavity[index] = rho - cavity_radius * waist[index[0]] + 2.5 * outline(grid)
        side, back = abs(x) / rho, y / rho
        wall = who.wall * (0.75 + 0.5 * side + 0.2 * np.maximum(back, 0))
        fat = who.fat * (0.85 + 0.45 * np.maximum(back, 0) - 0.1 * side)
        skin = canvas.cavity[index] - wall - fat
        canvas.paint(index, skin, SKIN)
        canvas.paint(index, skin + 2.5, FAT + 6 * strands(grid))
        canvas.paint(index, skin + fat, MUSCLE + 5 * strands(grid))
        between = abs(canvas.cavity[index] - 0.5 * wall) - 0.9 + 0.8 * strands(grid)
        canvas.paint(index, between + 2 * (back > 0.7) + 3 * (side < 0.5), -40.0)
        canvas.paint(index, canvas.cavity[index], FAT + 9 * strands(grid) + 4 * depot(grid))


def _table(canvas: Canvas, who: Subject, rng: Generator) -> None:
    """Paint the scanner's table: a thin curved shell behind the back."""
    top = who.half_depth + 1.4 * who.wall + 1.5 * who.fat
    for index, grid in canvas.slabs():
        _, y, x = grid
        shell = np.maximum(abs(y - top + (x / 30) ** 2) - 1.5, abs(x) - 200)
        body = canvas.hu[index] > -700
        canvas.paint(index, np.where(body, np.float32(1e3), shell), -250.0)


def _lungs(canvas: Canvas, who: Subject, rng: Generator) -> None:
    """Paint the lung bases: the part of the cavity above the diaphragm's dome."""
    dome = (rng.uniform(125, 150), who.half_depth * 1.02, who.half_width * 1.02)
    vessels = SmoothField(rng, 5)
    index, grid = canvas.window((-400, -400, -400), (-20, 400, 400))
    outside = 1 - ellipsoid(grid, (0, -3, 0), dome)
    canvas.paint(index, np.maximum(outside - 2.5, canvas.cavity[index]), MUSCLE)
    canvas.paint(index, np.maximum(outside, canvas.cavity[index] + 1), LUNG + 45 * np.maximum(vessels(grid), 0) ** 2)


def _spine(canvas: Canvas, who: Subject, rng: Generator) -> None:
    """Paint vertebrae with cortical shell, discs, canal and processes."""
    center = who.spine_y
    cortex, marrow, shift = rng.uniform(320, 480), rng.uniform(130, 210), rng.uniform(0, VERTEBRA_PITCH)
    trabeculae = SmoothField(rng, 3)
    index, grid = canvas.window((-400, center - 30, -60), (400, center + 75, 60))
    z, y, x = grid
    level = abs((z + shift) % VERTEBRA_PITCH - VERTEBRA_PITCH / 2)
    flare = 2.5 * np.minimum(level / 14, 1) ** 2
    ring = np.hypot(x * 0.76, y - center) - 16 - flare
    body = np.maximum(np.maximum(ring, level - 13.5), y - center - 14)
    canal = np.hypot(x * 0.8, y - center - 22) - 8
    arch = np.maximum(canal - 5, level - 14)
    spinous = np.maximum(abs(x) - 3.5, np.maximum(abs(y - center - 45) - 15, abs(level - 9) - 7))
    transverse = np.maximum(np.hypot(level - 2, y - center - 17 - abs(x) / 8) - 4.5, abs(x) - 38)
    facet = np.hypot(np.hypot(abs(x) - 17, y - center - 27), np.maximum(abs(level - 14) - 4, 0)) - 7
    canvas.paint(index, np.maximum(ring, y - center - 13), 85.0)
    bone = np.minimum(np.minimum(arch, spinous), np.minimum(transverse, facet))
    for part in (bone, body):
        canvas.paint(index, part, cortex)
        canvas.paint(index, part + 2.2, marrow + 25 * trabeculae(grid))
    canvas.paint(index, canal + 0 * z, 35.0)


def _muscles(canvas: Canvas, who: Subject, rng: Generator) -> None:
    """Paint psoas, quadratus lumborum and erector spinae of both sides."""
    bulk, marbling = rng.uniform(0.85, 1.15), SmoothField(rng, 5)
    index, grid = canvas.window((-400, -30, -100), (400, 130, 100))
    z, y, x = grid
    across, behind = abs(x), y - who.spine_y
    grown = np.clip((z + 45) / 150, 0, 1)
    psoas = np.hypot((across - 33 - 9 * grown) * 1.15, behind + 1) - 24 * bulk * np.sqrt(grown)
    quadratus = np.hypot((across - 58) / 1.9, behind - 24 + (across - 58) / 8) - 9 * bulk * (z > -60)
    erector = np.hypot((across - 31) / 1.25, behind - 42) - 23 * bulk
    distance = np.minimum(np.minimum(psoas, quadratus), erector)
    inside = np.maximum(distance, canvas.cavity[index] - who.wall)
    canvas.paint(index, inside, MUSCLE + 8 * marbling(grid))


def _ribs(canvas: Canvas, who: Subject, rng: Generator) -> None:
    """Paint the last ribs from the spine to the flank, and the iliac crests."""
    low = rng.uniform(-70, -45)
    crest = rng.uniform(85, 110)
    for side in (-1, 1):
        for level, sweep in enumerate((70, 115, 150, 160)):
            angles = np.radians(np.linspace(22, sweep, 14))
            points = []
            for angle in angles:
                y, x = np.cos(angle) * (who.half_depth + 3), side * np.sin(angle) * (who.half_width + 3)
                points.append((low - 28 * level + 32 * float(angle), float(y), float(x)))
            for a, b in pairwise(points):
                index, grid = canvas.window(np.minimum(a, b) - 8, np.maximum(a, b) + 8)
                axis = capsule((grid[0] * 0.7, grid[1], grid[2]), (a[0] * 0.7, *a[1:]), (b[0] * 0.7, *b[1:]))
                canvas.paint(index, axis - 4.2, 380.0)
                canvas.paint(index, axis - 2.2, 160.0)
    index, grid = canvas.window((crest - 10, -20, -400), (400, 400, 400))
    z, y, x = grid
    wing = np.maximum(abs(canvas.cavity[index] + 4) - 5, np.maximum(crest + (y - 25) ** 2 / 40 - z, 42 - abs(x)))
    canvas.paint(index, wing, 360.0)
    canvas.paint(index, wing + 2.2, 150.0)


def _liver(canvas: Canvas, who: Subject, rng: Generator) -> None:
    """Paint right and left lobe, portal and hepatic veins, gallbladder."""
    value, low = who.enhanced(85, 112) + rng.normal(0, 7), rng.uniform(-85, -65)
    bump, grain = SmoothField(rng, 45), SmoothField(rng, 6)
    right, left = who.at(low, -5, -68), who.at(low - 25, -48, 5)
    index, grid = canvas.window((-400, -400, -400), (low + 110, 400, 110))
    a = ellipsoid(grid, right, (rng.uniform(82, 105), 80, 66))
    b = ellipsoid(grid, left, (45, 34, 80))
    blend = np.maximum(12 - abs(a - b), 0) ** 2 / 48
    renal_bed = grid[1] - 8 - 0.8 * (abs(grid[2]) - 68) - 1.3 * np.maximum(-50 - grid[0], 0)
    distance = np.maximum(np.minimum(a, b) - blend, 0.7 * renal_bed) + 4 * bump(grid)
    distance = np.maximum(distance, canvas.cavity[index] + 2)
    canvas.paint(index, distance, value + 4 * grain(grid))
    vein = value + who.enhanced(5, 55)
    gate = who.at(low + 15, -22, -35)
    for _ in range(9):
        tip = who.at(low + rng.uniform(-60, 30), rng.uniform(-55, 30), rng.uniform(-105, -20))
        _, middle, _ = (np.linspace(gate, tip, 3) + rng.normal(0, 8, 3)).tolist()
        canvas.tube([gate, middle, tip], [5, 4.5, 3], vein)
    canvas.tube([who.at(15, -15, -8), gate], 6.5, vein)
    if rng.uniform() < 0.75:
        canvas.blob(who.at(low + 40, -48, -52), (24, 15, 13), 10)


def _spleen(canvas: Canvas, who: Subject, rng: Generator) -> None:
    """Paint a crescent under the left diaphragm."""
    value, center = who.enhanced(125, 118) + rng.normal(0, 6), who.at(rng.uniform(-85, -65), 22, 100)
    bump = SmoothField(rng, 35)
    index, grid = canvas.around(center, 85)
    outer = ellipsoid(grid, center, (rng.uniform(45, 60), 52, 34))
    hollow = 38 - np.hypot(grid[1] - center[1] + 12, grid[2] - center[2] + 42)
    distance = np.maximum(np.maximum(outer, hollow) + 2 * bump(grid), canvas.cavity[index] + 3)
    canvas.paint(index, distance, value)


def _stomach(canvas: Canvas, who: Subject, rng: Generator) -> None:
    """Paint the stomach with wall, content and an air bubble in front, and the pancreas behind it."""
    course = [(-95, -5, 62), (-70, -35, 62), (-45, -52, 45), (-32, -52, 12), (-30, -42, -18)]
    path = [who.at(*p) for p in course]
    radii = [1, 30, 27, 21, 14]
    canvas.tube(path, radii, BOWEL_WALL)
    level = float(rng.uniform(-70, -40))
    content = 250.0 if rng.uniform() < ORAL_CONTRAST / 2 else float(rng.uniform(10, 45))
    canvas.tube(path, [r - 4 for r in radii], partial(_fluid_level, level=level, content=content))
    gland, tail = who.enhanced(105, 85), rng.uniform(-50, -25)
    head = [(18, -12, -42), (0, -18, -28), (-12, -24, 0), (-25, -12, 30)]
    lobules = _finer([*(who.at(*p) for p in head), who.at(tail, 4, 62)], 5)
    canvas.tube(lobules, rng.uniform(6.5, 11, len(lobules)).tolist(), gland)


def _fluid_level(grid: Grid, level: float, content: float) -> Array:
    """Gas anterior to a level, content posterior to it."""
    z, y, x = grid
    return np.where(y + 0 * z + 0 * x < level, np.float32(GAS), np.float32(content))


def _stool(grid: Grid, texture: SmoothField) -> Array:
    """Stool with gas bubbles."""
    uneven = texture(grid)
    return np.where(uneven > 0.7, np.float32(-500), -20 + 50 * uneven)


def _bowel(canvas: Canvas, who: Subject, rng: Generator) -> None:
    """Paint the colon with haustra, gas and stool, and loops of small bowel with fluid or oral contrast."""
    right = [(135, 12, -98), (20, 8, -100), (5, -55, -75)]
    frame = [*right, (25, -72, 0), (0, -55, 75), (-45, 0, 103), (20, 28, 106), (135, 20, 98)]
    knots = np.array([who.at(*p) for p in frame]) + rng.normal(0, 7, (len(frame), 3))
    colon = _finer(knots.tolist(), 6)
    radii = rng.uniform(11, 22, len(colon))
    canvas.tube(colon, radii.tolist(), BOWEL_WALL)
    canvas.tube(colon, (radii - 2.5).tolist(), partial(_stool, texture=SmoothField(rng, 5)))
    oral = rng.uniform() < ORAL_CONTRAST
    for _ in range(30):
        start = who.at(rng.uniform(-10, 150), rng.uniform(-70, 0), rng.uniform(-75, 75))
        loop = np.cumsum(np.vstack([start, rng.normal(0, [12, 10, 19], (6, 3))]), axis=0).tolist()
        radius, level = float(rng.uniform(8, 14)), float(rng.uniform(-130, -40))
        content = float(rng.uniform(150, 320)) if oral and rng.uniform() < 0.6 else float(rng.uniform(10, 45))
        canvas.tube(loop, radius, BOWEL_WALL + 15)
        canvas.tube(loop, radius - 2.5, partial(_fluid_level, level=level, content=content))


def _great_vessels(canvas: Canvas, who: Subject, rng: Generator) -> None:
    """Paint aorta, vena cava, iliac and mesenteric vessels, and a few lymph nodes next to them."""
    aorta, cava = who.enhanced(290, 165) + rng.normal(0, 15), who.enhanced(115, 160)
    front = who.spine_y - 27
    fork = float(rng.uniform(75, 100))
    canvas.tube([(-400, front + 10, 12), (-60, front, 8), (fork, front - 2, 3)], rng.uniform(8.5, 11.5), aorta)
    canvas.tube([(-400, front, -22), (-40, front + 2, -22), (fork + 10, front + 4, -18)], rng.uniform(9.5, 12.5), cava)
    for side in (-1, 1):
        canvas.tube([(fork, front - 2, 3), (fork + 90, front + 20, 42 * side)], 5.5, aorta)
        canvas.tube([(fork + 10, front + 4, -18), (fork + 100, front + 28, 42 * side - 6)], 7, cava)
    canvas.tube([(-25, front, 6), (0, front - 22, 3), (90, front - 35, -10)], 3.5, aorta)
    canvas.tube([(-15, front - 24, -6), (90, front - 36, -20)], 5, cava + 10)
    for _ in range(rng.integers(2, 9)):
        node = (rng.uniform(-50, 90), front + rng.uniform(-12, 8), rng.choice((-38, -6, 23)) + rng.uniform(-4, 4))
        canvas.blob(node, tuple(rng.uniform(2.5, 8, 3)), rng.uniform(60, 100))


def _finer(points: Sequence[Point], pieces: int) -> list[Point]:
    """A path with each of its segments divided into pieces."""
    return [tuple(p) for a, b in pairwise(points) for p in np.linspace(a, b, pieces, endpoint=False).tolist()]
