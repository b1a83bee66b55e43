"""Measurements of a lesion in relation to its kidney: size class, exophytic share, contact surface area."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import ConvexHull

from kitseg.components import Components
from kitseg.measurement.diameters import line_ends
from kitseg.measurement.mesh import normals, surface, voxel_faces
from kitseg.types import Geometry

#: Largest diameter in mm of each class; larger tumors are T2b.
T_CLASSES = {"T1a": 40.0, "T1b": 70.0, "T2a": 100.0}
LARGEST = "T2b"

_PIECE = 0.05  # of the largest piece; smaller ones are ignored in a kidney's outline
_SAMPLES = 20_000  # most voxels of a lesion that are compared with the outline
_AT_ONCE = 512  # of these voxels
_OUTWARD = 0.75  # voxels from the surface to the neighbour that is looked up
#: Voxel faces: a ball of 25 cm in voxels of 0.5 mm has 1.2 million, noise throughout a scan ten times as many.
_MOST_FACES = 2_000_000


def size_class(diameter_mm: float) -> str:
    """T1a, T1b, T2a or T2b by the largest diameter in mm (TNM, 8th edition, for a tumor limited to the kidney)."""
    return next((name for name, most in T_CLASSES.items() if diameter_mm <= most), LARGEST)


def outline(parenchyma: NDArray[np.bool_], spacing: tuple[float, float, float]) -> NDArray[np.float64] | None:
    """A kidney's outline: the planes (N, 4) of the convex hull of its parenchyma (D, H, W) in mm; None without any.

    A plane is an outward normal and an offset: a point p lies inside if ``normal @ p + offset <= 0`` for all planes.
    Voxels extend to their faces; pieces smaller than 5 % of the largest one are ignored.
    """
    pieces = Components.of(parenchyma)
    kidney = pieces.chosen(pieces.sizes >= _PIECE * pieces.sizes.max())
    if not kidney.any():
        return None
    ends = np.concatenate([line_ends(kidney, axis, beyond=0.5) for axis in range(3)]) * spacing
    planes: NDArray[np.float64] = np.unique(ConvexHull(ends).equations, axis=0)
    return planes


def share_outside(
    lesion: NDArray[np.bool_], start: tuple[int, int, int], spacing: tuple[float, float, float], planes: NDArray[Any]
) -> float:
    """The exophytic share of a lesion: the part of its volume outside a kidney's ``outline``, 0 to 1.

    It corresponds to the E of the R.E.N.A.L. nephrometry score (Kutikov and Uzzo, Journal of Urology 2009), which
    distinguishes tumors with at least 50 % outside. Lesions above 20,000 voxels are sampled evenly.

    Args:
        lesion: mask of the lesion (D, H, W) in a box.
        start: the box's first voxel in the coordinates of ``planes``.
        spacing: mm per voxel along each axis.
        planes: from ``outline``.
    """
    voxels = np.flatnonzero(lesion)
    sample = np.unravel_index(voxels[:: -(-len(voxels) // _SAMPLES)], lesion.shape)
    points = (np.stack(sample, axis=1) + start) * spacing
    parts = np.array_split(points, -(-len(points) // _AT_ONCE))
    outside = [((part @ planes[:, :3].T + planes[:, 3]) > 0).any(axis=1) for part in parts]
    return float(np.concatenate(outside).mean())


def contact_area(lesion: NDArray[np.bool_], parenchyma: NDArray[np.bool_], geometry: Geometry) -> float | None:
    """The area in mm² of a lesion's surface that touches parenchyma; both masks (D, H, W).

    None for a mask too ragged to be a lesion, such as the noise of an untrained network, whose surface would take more
    memory than the scan.

    The contact surface area of Leslie et al. (European Urology 2014), here of the smooth surface of the mask
    (``mesh.surface``): a triangle is in contact if the next voxel outward is parenchyma. Counting voxel faces instead
    would overestimate a ball's surface by half.
    """
    if sum(voxel_faces(lesion)) > _MOST_FACES:
        return None
    vertices, faces = surface(lesion, geometry)
    if not len(faces):
        return 0.0
    axes = geometry.affine[:3, :3]
    across = normals(vertices, faces)
    double = np.linalg.norm(across, axis=1)
    outward = across @ axes / geometry.spacing
    centres = (vertices[faces].astype(np.float64).mean(axis=1) - geometry.affine[:3, 3]) @ np.linalg.inv(axes).T
    step = outward / np.maximum(np.linalg.norm(outward, axis=1, keepdims=True), 1e-12)
    next_voxel = np.rint(centres + _OUTWARD * step).astype(int)
    on_grid = ((next_voxel >= 0) & (next_voxel < geometry.shape)).all(axis=1)
    touches = on_grid.copy()
    touches[on_grid] = parenchyma[tuple(next_voxel[on_grid].T)]
    return float(double[touches].sum() / 2)
