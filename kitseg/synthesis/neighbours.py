"""What lies beside a kidney: tissue of other bodies, and another contrast.

A handful of bodies has a handful of spleens and loops of bowel, which a network learns by heart. Here any tissue can be
the neighbour of any kidney; the kidney and a margin around it stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

from numpy.random import Generator
from torch import Tensor

from kitseg.synthesis import habitus
from kitseg.synthesis.bodies import NATIVE, RealBody
from kitseg.synthesis.fields import Vector, rotation, smooth_noise, step

BORROWED, SHIFTED = 0.5, 0.6  # of the patches
MARGIN = (4.0, 14.0)  # mm around the kidneys that stay as they are
CLEAR = 3.0  # mm around the kidneys of the other body that are not borrowed
CELL, LIMIT = (15.0, 45.0), (-0.6, 0.8)  # mm, of the pieces; of a smooth field above which a piece is borrowed
SHIFT, SHIFT_CELL = 18.0, (20.0, 70.0)  # HU, deviation of the change of contrast; mm, of its extent
Fields = tuple[Tensor, Tensor, Tensor]


def change(body: RealBody, others: Sequence[RealBody], fields: Fields, spacing: Vector, rng: Generator) -> Fields:
    """HU, distance to the kidneys (mm) and tissue (D, H, W) of a patch with other neighbours of the kidneys."""
    donor = any_donor(body, others, rng)
    if donor is not None and rng.random() < BORROWED:
        fields = borrow(donor, fields, spacing, rng)
    hu, distance, tissue = fields
    return (shift(hu, distance, spacing, rng) if rng.random() < SHIFTED else hu), distance, tissue


def any_donor(body: RealBody, others: Sequence[RealBody], rng: Generator) -> RealBody | None:
    """Another body that is like this one with contrast agent or without; None where there is none."""
    native = body.facts.parenchyma < NATIVE
    alike = [one for one in others if one.name != body.name and (one.facts.parenchyma < NATIVE) == native]
    return alike[int(rng.integers(len(alike)))] if alike else None


def borrow(donor: RealBody, fields: Fields, spacing: Vector, rng: Generator) -> Fields:
    """HU, distance and tissue (D, H, W) with pieces of another body's tissue away from the kidneys of both."""
    hu, distance, tissue = fields
    frame = habitus.Frame(rotation(rng, (180, 20, 20)) @ habitus.any_matrix(rng), donor.somewhere(rng))
    there = habitus.sample(donor, frame.grid(hu.shape, tuple(spacing)))
    far = step(distance - rng.uniform(*MARGIN), 0.8) * step(there[1] - CLEAR, 0.8)
    pieces = step(smooth_noise(rng, hu.shape, rng.uniform(*CELL) / spacing) - rng.uniform(*LIMIT), 0.08)
    share = far * pieces * step(there[0] + 160, 12)  # no air, inside or beside the patient
    return hu + share * (there[0] - hu), distance, tissue + share * (there[2].clamp(min=0) - tissue)


def shift(hu: Tensor, distance: Tensor, spacing: Vector, rng: Generator) -> Tensor:
    """HU (D, H, W) with more or less contrast agent in the soft tissue outside the kidneys, smoothly varying."""
    field = smooth_noise(rng, hu.shape, rng.uniform(*SHIFT_CELL) / spacing) + rng.normal()
    soft = step(hu - 10, 12) * step(200 - hu, 20)
    return hu + step(distance - 2.5, 0.6) * soft * field * float(rng.normal(0, SHIFT))
