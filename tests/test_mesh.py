"""Surfaces of masks: closed, outward, in the patient's millimetres, with the mask's volume."""

from __future__ import annotations

import io
from pathlib import Path

import nibabel
import numpy as np
import pytest
import trimesh
from conftest import kitseg
from numpy.typing import NDArray
from shapes import LEFT_KIDNEY, ORIENTATIONS, RIGHT_KIDNEY, Ellipsoid, ball, lattice, paint

from kitseg.labels import TUMOR
from kitseg.measurement.mesh import stl, surface, volume, voxel_faces
from kitseg.types import Geometry

SPACINGS = [(1.0, 1.0, 1.0), (3.0, 0.7, 0.7), (5.0, 0.8, 0.8)]
TUMOR_BALL = ball((-80, -12, 12), 20)


def loaded(content: bytes) -> trimesh.Trimesh:
    mesh = trimesh.load(io.BytesIO(content), file_type="stl")
    assert isinstance(mesh, trimesh.Trimesh)
    return mesh


def is_closed(faces: NDArray[np.int32]) -> bool:
    """Every edge has a triangle on both sides."""
    edges = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), axis=1)
    return bool((np.unique(edges, axis=0, return_counts=True)[1] == 2).all())


def test_faces_of_voxels_by_hand() -> None:
    mask = np.zeros((4, 5, 6), bool)
    mask[1:3, 1:4, 1:5] = True
    assert voxel_faces(mask) == (2 * 3 * 4, 2 * 2 * 4, 2 * 2 * 3)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("radius", [12, 25])
def test_a_ball(spacing: tuple[float, float, float], radius: float) -> None:
    geometry = lattice(spacing=spacing, size=(70, 70, 70), centre=(-30, 0, 8))
    mask = paint(geometry, ball((-30, 1, 9), radius)) > 0
    vertices, faces = surface(mask, geometry)
    assert is_closed(faces)
    assert volume(vertices, faces) / 1000 == pytest.approx(mask.sum() * geometry.voxel_ml, rel=0.005)
    assert trimesh.Trimesh(vertices, faces).area == pytest.approx(4 * np.pi * radius**2, rel=0.03)
    assert np.linalg.norm(vertices - (-30, 1, 9), axis=1) == pytest.approx(radius, abs=max(spacing) / 2)


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_normals_are_outward_in_every_orientation(codes: str) -> None:
    geometry = lattice(codes, spacing=(3, 2, 2), size=(60, 50, 70), degrees=(0, 10, 5))
    shape = Ellipsoid((5, -8, 4), (20, 15, 25), TUMOR)
    vertices, faces = surface(paint(geometry, shape) > 0, geometry)
    assert volume(vertices, faces) / 1000 == pytest.approx(shape.ml, rel=0.02)
    assert vertices.mean(axis=0) == pytest.approx(shape.centre, abs=0.5)
    assert np.ptp(vertices, axis=0) == pytest.approx([40, 30, 50], abs=3)


def test_a_coarse_surface_is_small_and_of_the_same_volume() -> None:
    geometry = lattice(spacing=(1, 0.8, 0.8))
    mask = paint(geometry, LEFT_KIDNEY) > 0
    fine, coarse = surface(mask, geometry), surface(mask, geometry, coarse=4)
    assert len(coarse[1]) < len(fine[1]) / 10
    assert is_closed(coarse[1])
    assert volume(*coarse) == pytest.approx(volume(*fine), rel=0.01)


def test_masks_at_the_edge_and_empty_ones() -> None:
    geometry = lattice(spacing=(5, 5, 5))
    everything = np.ones(geometry.shape, np.bool_)
    vertices, faces = surface(everything, geometry)
    assert is_closed(faces)
    assert volume(vertices, faces) == pytest.approx(everything.size * 125, rel=0.01)
    nothing = surface(~everything, geometry)
    assert (nothing[0].shape, nothing[1].shape) == ((0, 3), (0, 3))


def test_stl_of_one_triangle() -> None:
    vertices = np.array([[0, 0, 0], [2, 0, 0], [0, 3, 0]], np.float32)
    content = stl(vertices, np.array([[0, 1, 2]], np.int32))
    assert len(content) == 84 + 50
    assert b"SPACE=RAS" in content[:80]
    assert not content.startswith(b"solid")  # that would be a text file
    assert np.frombuffer(content[84:132], "<f4").tolist() == [0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3, 0]


@pytest.mark.parametrize(("codes", "degrees"), [("IPL", (0, 0, 0)), ("RAS", (0, 0, 0)), ("LAS", (5, -8, 10))])
def test_mesh_on_files(codes: str, degrees: tuple[float, float, float], tmp_path: Path) -> None:
    geometry = lattice(codes, spacing=(5, 0.9, 0.9), degrees=degrees, size=(250, 150, 180))
    labels = paint(geometry, RIGHT_KIDNEY, LEFT_KIDNEY, TUMOR_BALL)
    nibabel.save(nibabel.Nifti1Image(labels, geometry.affine), tmp_path / "one.nii.gz")
    assert kitseg(tmp_path, "mesh", "one.nii.gz").code == 0
    assert kitseg(tmp_path, "mesh", "one.nii.gz", "--of=tumor", "-o", "tumor.stl").code == 0
    kidney, tumor = (loaded((tmp_path / f"{name}.stl").read_bytes()) for name in ("kidney", "tumor"))
    assert kidney.is_watertight
    assert len(kidney.split()) == 2
    assert kidney.volume / 1000 == pytest.approx((labels > 0).sum() * geometry.voxel_ml, rel=0.01)
    assert tumor.volume / 1000 == pytest.approx(TUMOR_BALL.ml, rel=0.01)
    assert tumor.centroid == pytest.approx(TUMOR_BALL.centre, abs=0.5)


def test_what_cannot_be_a_mesh(tmp_path: Path) -> None:
    geometry = lattice(spacing=(5, 4, 4))
    labels = paint(geometry, LEFT_KIDNEY)
    nibabel.save(nibabel.Nifti1Image(labels, geometry.affine), tmp_path / "one.nii.gz")
    for arguments, code, fact in (
        (("--of=tumor",), 1, "contains no tumor"),
        (("--of=liver",), 2, "part 'liver'"),
        (("-o", "kidney.obj"), 2, ".stl"),
    ):
        done = kitseg(tmp_path, "mesh", "one.nii.gz", *arguments)
        assert (done.code, fact in done.text) == (code, True), done.text
    assert [file.name for file in tmp_path.iterdir()] == ["one.nii.gz"]


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 2), (1, 2, 2), (2, 2, 2), (20, 1, 1), (1, 2, 30)])
@pytest.mark.parametrize("spacing", [(3, 2, 2), (5, 0.7, 0.7)])
def test_tiny_and_thin_masks_keep_their_volume(shape: tuple[int, int, int], spacing: tuple[float, ...]) -> None:
    vertices, faces = surface(np.ones(shape, np.bool_), Geometry(shape, np.diag([*spacing, 1])))
    assert volume(vertices, faces) == pytest.approx(np.prod(shape) * np.prod(spacing), rel=0.35)
