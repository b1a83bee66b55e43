"""The surface of a mask as a triangle mesh, in mm in the patient's space."""

from __future__ import annotations

from typing import Any

import edt
import numpy as np
import trimesh
from numpy.typing import NDArray
from scipy import ndimage
from skimage.measure import marching_cubes

from kitseg.components import bounding_box
from kitseg.types import Geometry

_MARGIN = 2  # voxels around the mask, so that its surface is closed at the edge of the scan
_SMOOTHINGS = 10
_LEAST_KEPT = 0.3  # of the volume, after smoothing
_STEPS = 5

Vertices = NDArray[np.float32]
Faces = NDArray[np.int32]


def surface(mask: NDArray[np.bool_], geometry: Geometry, coarse: float | None = None) -> tuple[Vertices, Faces]:
    """The closed surface of a mask (D, H, W), with outward normals.

    Marching cubes on the signed distance to the mask's boundary, which interpolates well between thick slices, then 10
    iterations of Taubin smoothing (Taubin, SIGGRAPH 1995), which hardly shrinks the surface; finally the surface is
    moved along its normals by the fraction of a millimetre that restores the mask's volume.

    Args:
        mask: the region to enclose.
        geometry: of the mask.
        coarse: mm between samples in every direction, for a small mesh; None for the mask's own voxels.

    Returns:
        Vertices (N, 3) in mm, RAS+, and faces (M, 3), three vertices each; both empty for an empty mask.
    """
    box = bounding_box(mask)
    if box is None:
        return np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int32)
    inside = np.pad(mask[box.slices], _MARGIN)
    spacing = np.array(geometry.spacing)
    field = -edt.sdf(inside, anisotropy=geometry.spacing, parallel=1)  # mm to the boundary, negative inside
    step = np.ones(3)
    if coarse is not None and (coarse > spacing).any():
        field, step = _sampled(field, np.maximum(coarse / spacing, 1))
    if not field.min() < 0 < field.max():  # too small for the coarse sampling
        return np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int32)
    vertices, faces, _, _ = marching_cubes(field, 0, spacing=tuple(step * spacing), gradient_direction="descent")
    points = _with_volume(_smooth(vertices, faces), faces, int(inside.sum()) * geometry.voxel_ml * 1000)
    axes = geometry.affine[:3, :3]
    world = (points / spacing + box.start - _MARGIN) @ axes.T + geometry.affine[:3, 3]
    if np.linalg.det(axes) < 0:
        faces = faces[:, ::-1]
    return world.astype(np.float32), np.ascontiguousarray(faces, np.int32)


def voxel_faces(mask: NDArray[np.bool_]) -> tuple[int, ...]:
    """The number of voxel faces across each axis between a mask and the rest of its array."""
    return tuple(int(np.count_nonzero(np.diff(mask, axis=axis))) for axis in range(mask.ndim))


def normals(vertices: NDArray[Any], faces: NDArray[Any]) -> NDArray[np.float64]:
    """Each face's normal (M, 3), as long as twice the face's area."""
    across: NDArray[np.float64] = trimesh.triangles.cross(vertices[faces].astype(np.float64))
    return across


def volume(vertices: NDArray[Any], faces: NDArray[Any]) -> float:
    """The volume inside a closed surface, in cubed units of its vertices; negative if its normals point inward."""
    centres = vertices[faces].astype(np.float64).mean(axis=1)
    return float((centres * normals(vertices, faces)).sum() / 6)


def stl(vertices: Vertices, faces: Faces) -> bytes:
    """A surface as a binary STL file; 3D Slicer reads the coordinate system ``SPACE=RAS`` from its header."""
    header = b"kitseg; millimetres; SPACE=RAS".ljust(80)
    content: bytes = trimesh.exchange.stl.export_stl(trimesh.Trimesh(vertices, faces, process=False))
    return header + content[len(header) :]


def _sampled(field: NDArray[np.float32], step: NDArray[np.float64]) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """A field at every ``step``-th voxel, averaged over a step; and the step adjusted to include both ends."""
    shape = np.maximum(np.ceil((np.array(field.shape) - 1) / step).astype(int) + 1, 2)
    step = (np.array(field.shape) - 1) / (shape - 1)
    for axis, width in enumerate(step):
        field = ndimage.gaussian_filter1d(field, width / 4, axis=axis, mode="nearest") if width > 1 else field
    grid = np.meshgrid(*(np.arange(n) * s for n, s in zip(shape, step, strict=True)), indexing="ij")
    sampled: NDArray[np.float32] = ndimage.map_coordinates(field, grid, order=1, mode="nearest")
    return sampled, step


def _smooth(vertices: NDArray[Any], faces: Faces) -> NDArray[np.float64]:
    """The vertices after Taubin smoothing, or unchanged if it would leave almost nothing of a tiny mask."""
    smooth = trimesh.Trimesh(vertices, faces, process=False)
    trimesh.smoothing.filter_taubin(smooth, iterations=_SMOOTHINGS)
    points: NDArray[np.float64] = np.asarray(smooth.vertices, np.float64)
    kept = volume(points, faces) >= _LEAST_KEPT * volume(vertices, faces)
    return points if kept else vertices.astype(np.float64)


def _with_volume(vertices: NDArray[np.float64], faces: Faces, mm3: float) -> NDArray[np.float64]:
    """The vertices moved along their normals by one length so that they enclose ``mm3`` (Newton's method)."""
    for _ in range(_STEPS):
        across = normals(vertices, faces)
        area = np.linalg.norm(across, axis=1).sum() / 2
        outward = np.zeros_like(vertices)
        for corner in range(3):
            np.add.at(outward, faces[:, corner], across)
        outward /= np.maximum(np.linalg.norm(outward, axis=1, keepdims=True), 1e-12)
        vertices = vertices + outward * ((mm3 - volume(vertices, faces)) / area)
    return vertices
