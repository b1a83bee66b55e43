"""Analytic shapes in the patient, painted on any lattice."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations, product

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from kitseg.labels import KIDNEY, TUMOR
from kitseg.types import Geometry

#: All 48 ways in which the axes of an array can lie in the patient.
ORIENTATIONS = [
    "".join(pair[sign] for pair, sign in zip(order, signs, strict=True))
    for order in permutations(("LR", "PA", "IS"))
    for signs in product((0, 1), repeat=3)
]
_AXES = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}


@dataclass(frozen=True)
class Ellipsoid:
    """centre and radii in mm, (x, y, z) in RAS+; label: what it is painted with."""

    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    label: int

    @property
    def ml(self) -> float:
        return 4 / 3 * np.pi * float(np.prod(self.radii)) / 1000


RIGHT_KIDNEY = Ellipsoid((62, -10, 5), (27, 25, 50), KIDNEY)
LEFT_KIDNEY = Ellipsoid((-58, -12, 12), (28, 26, 52), KIDNEY)


def ball(centre: tuple[float, float, float], radius: float, label: int = TUMOR) -> Ellipsoid:
    return Ellipsoid(centre, (radius, radius, radius), label)


def lattice(
    codes: str = "IPL",
    spacing: tuple[float, float, float] = (3.0, 0.7, 0.7),
    size: tuple[float, float, float] = (230, 110, 130),
    degrees: tuple[float, float, float] = (0, 0, 0),
    centre: tuple[float, float, float] = (1.3, -8.4, 6.2),
) -> Geometry:
    """A scan around ``centre``: its axes' directions, mm between voxels and mm (x, y, z) in all; turned by angles.

    spacing: (slices, rows, columns) of the patient: along z, y and x.
    """
    mm = dict(zip((2, 1, 0), spacing, strict=True))
    affine, shape = np.eye(4), []
    for column, code in enumerate(codes):
        axis, sign = _AXES[code]
        affine[:3, column] = 0
        affine[axis, column] = sign * mm[axis]
        shape.append(round(size[axis] / mm[axis]))
    affine[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix() @ affine[:3, :3]
    affine[:3, 3] = np.array(centre) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Geometry((shape[0], shape[1], shape[2]), affine)


def paint(geometry: Geometry, *shapes: Ellipsoid) -> NDArray[np.uint8]:
    """The labels of shapes on a lattice, by the centres of its voxels; later shapes cover earlier ones."""
    labels = np.zeros(geometry.shape, np.uint8)
    axes = [np.arange(n).reshape([-1 if a == axis else 1 for a in range(3)]) for axis, n in enumerate(geometry.shape)]
    world = [sum(row[a] * axes[a] for a in range(3)) + row[3] for row in geometry.affine[:3]]
    for shape in shapes:
        distance = sum(((w - c) / r) ** 2 for w, c, r in zip(world, shape.centre, shape.radii, strict=True))
        labels[distance <= 1] = shape.label
    return labels
