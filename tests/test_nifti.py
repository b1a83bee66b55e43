"""NIfTI in and out: orientations, values, and exact grids."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from nifti_files import IPL, SHAPE, count, refused, save
from shapes import ORIENTATIONS, lattice

from kitseg.errors import InputError, KitsegError
from kitseg.labels import KITS23
from kitseg.runtime.files import file_digest
from kitseg.types import Box, Geometry, Probabilities
from kitseg.volumes import nifti
from kitseg.volumes.blocks import read_block, write_block


def affine_of(codes: str) -> np.ndarray:
    return lattice(codes, spacing=(2.0, 0.75, 0.5)).affine


def rotation(degrees: float) -> np.ndarray:
    """About the left-right axis."""
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    turned = np.eye(4)
    turned[1:3, 1:3] = [[c, -s], [s, c]]
    return turned


# --- orientation


@pytest.mark.parametrize(
    "affine", [*map(affine_of, ORIENTATIONS), rotation(20) @ IPL, rotation(-35) @ affine_of("LPS")]
)
def test_round_trip_of_any_orientation(tmp_path: Path, affine: np.ndarray) -> None:
    stored = save(tmp_path / "in.nii.gz", count(), affine)
    volume = nifti.read_image(stored, "a")
    assert nifti.axis_codes(volume.geometry) == "IPL"
    assert volume.array.shape == volume.geometry.shape
    assert volume.array.flags.c_contiguous
    for index in [(0, 0, 0), (2, 3, 4), (1, 0, 3)]:  # each voxel stays where it is in the patient
        where = nibabel.load(stored).affine @ [*index, 1]
        there = np.linalg.solve(volume.geometry.affine, where)[:3]
        np.testing.assert_allclose(there, there.round(), atol=1e-6)
        assert volume.array[tuple(there.round().astype(int))] == count()[index]

    nifti.write_image(tmp_path / "out.nii.gz", volume.array, volume.native)
    before, after = nibabel.load(stored), nibabel.load(tmp_path / "out.nii.gz")
    assert np.array_equal(after.affine, before.affine)
    assert np.array_equal(after.dataobj, count())


def test_a_long_name_is_compressed(tmp_path: Path) -> None:
    path = tmp_path / f"{'x' * 200}.nii.gz"
    volume = nifti.read_image(save(tmp_path / "in.nii", count()), "a")
    nifti.write_image(path, volume.array, volume.native)
    assert np.array_equal(nibabel.load(path).dataobj, count())


def test_canonical_geometry_by_hand() -> None:
    # RAS, 2 x 3 x 4 voxels of 1, 2, 5 mm: I is -S, P is -A, L is -R
    native = Geometry((2, 3, 4), np.diag([1.0, 2, 5, 1]))
    turned = nifti.canonical_geometry(native)
    assert turned.shape == (4, 3, 2)
    assert turned.spacing == (5, 2, 1)
    np.testing.assert_array_equal(turned.affine, [[0, 0, -1, 1], [0, -2, 0, 4], [-5, 0, 0, 15], [0, 0, 0, 1]])


def test_turning_refuses_another_shape() -> None:
    native = Geometry(SHAPE, affine_of("RAS"))
    with pytest.raises(ValueError, match="native grid"):
        nifti.turn_to_canonical(np.zeros((5, 4, 3)), native)
    with pytest.raises(ValueError, match=r"shape \("):
        nifti.turn_to_native(np.zeros((3, 4, 5)), native)


# --- values


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64, ">i2"])
def test_integers_become_int16(tmp_path: Path, dtype: type) -> None:
    image = nibabel.Nifti1Image(count(dtype=dtype), IPL, dtype=dtype)
    nibabel.save(image, tmp_path / "a.nii.gz")
    array = nifti.read_image(tmp_path / "a.nii.gz", "a").array
    assert array.dtype == np.int16
    np.testing.assert_array_equal(array, count())


def test_integers_beyond_int16_become_float32(tmp_path: Path) -> None:
    array = nifti.read_image(save(tmp_path / "a.nii.gz", count(dtype=np.int32) + 40000), "a").array
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, count() + 40000.0)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_scaled_integers_become_hu(tmp_path: Path, name: str) -> None:
    image = nibabel.Nifti1Image(count(), IPL)
    image.header.set_slope_inter(2, -1024)
    image.to_filename(tmp_path / name)
    array = nifti.read_image(tmp_path / name, "a").array
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, count() * 2.0 - 1024)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floats_are_float32(tmp_path: Path, dtype: type) -> None:
    array = nifti.read_image(save(tmp_path / "a.nii", count(dtype=dtype) - 0.5), "a").array
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, count() - 0.5)


def test_labels_that_nibabel_scaled(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image((count() % 3).astype(np.float32), IPL)
    image.set_data_dtype(np.uint8)
    image.to_filename(tmp_path / "a.nii.gz")
    assert nibabel.load(tmp_path / "a.nii.gz").dataobj.slope != 1
    np.testing.assert_array_equal(nifti.read_labels(tmp_path / "a.nii.gz", "a").array, count() % 3)


def test_labels_are_turned(tmp_path: Path) -> None:
    stored = save(tmp_path / "a.nii.gz", (count() % 3).astype(np.uint8), affine_of("RAS"))
    array = nifti.read_labels(stored, "a").array
    np.testing.assert_array_equal(array, (count() % 3)[::-1, ::-1, ::-1].transpose(2, 1, 0))


def test_cysts_belong_to_kits23(tmp_path: Path) -> None:
    stored = save(tmp_path / "a.nii.gz", (count() % 4).astype(np.uint8))
    np.testing.assert_array_equal(nifti.read_labels(stored, "a", KITS23).array, count() % 4)
    refused(stored, "give --labels kits23", nifti.read_labels)


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ((1, 2, 0.01), "right angles"),
        ((0, 2, -0.04), "spacing is 2.5 x 0.7 x 0.04 mm"),
        ((1, 1, -21), "spacing is 2.5 x 21 x 0.8 mm"),
    ],
)
def test_lattices_that_are_no_scanners(tmp_path: Path, change: tuple[int, int, float], fact: str) -> None:
    affine, (row, column, value) = IPL.copy(), change
    affine[row, column] = value
    refused(save(tmp_path / "a.nii.gz", count(), affine), fact)


def test_a_little_shear_is_rounding(tmp_path: Path) -> None:
    affine = IPL.copy()
    affine[1, 2] = 0.0005
    assert nifti.read_image(save(tmp_path / "a.nii.gz", count(), affine), "a").array.shape == SHAPE


def test_any_damaged_header_is_read_or_refused(tmp_path: Path) -> None:
    content = save(tmp_path / "a.nii", np.zeros(SHAPE, np.int16)).read_bytes()
    rng, refusals = np.random.default_rng(0), 0
    for _ in range(500):
        damaged = bytearray(content)
        for place in rng.integers(0, 348, 4):
            damaged[place] = rng.integers(256)
        (tmp_path / "b.nii").write_bytes(damaged)
        try:
            nifti.read_image(tmp_path / "b.nii", "a")
        except InputError:
            refusals += 1
    assert 0 < refusals < 500


# --- writing


def test_labels_come_back_on_the_scans_own_grid(tmp_path: Path) -> None:
    scan = nifti.read_image(save(tmp_path / "scan.nii.gz", count(), rotation(7) @ affine_of("LAS")), "a")
    labels = (scan.array % 3).astype(np.uint8)
    nifti.write_labels(tmp_path / "new" / "out.nii.gz", labels, scan.native)
    source, written = nibabel.load(tmp_path / "scan.nii.gz"), nibabel.load(tmp_path / "new" / "out.nii.gz")
    assert written.shape == source.shape
    assert np.array_equal(written.affine, source.affine)
    assert written.get_data_dtype() == np.uint8
    assert np.array_equal(written.dataobj, np.asarray(source.dataobj) % 3)
    np.testing.assert_array_equal(nifti.read_labels(tmp_path / "new" / "out.nii.gz", "a").array, labels)
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["out.nii.gz"]


STATED = ("qform_code", "sform_code", "pixdim", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y",
          "qoffset_z", "srow_x", "srow_y", "srow_z", "xyzt_units")  # fmt: skip
ELSEWHERE = np.array([[1, 0, 0, 30], [0, 1, 0, -20], [0, 0, 1, 5], [0, 0, 0, 1]]) @ rotation(3) @ IPL


def scan_of(path: Path, header: nibabel.Nifti1Header) -> None:
    """A file with exactly this header."""
    header.set_data_offset(352)
    header["magic"] = header.single_magic
    path.write_bytes(header.binaryblock + bytes(4) + count().tobytes(order="F"))


@pytest.mark.parametrize(
    ("qform", "sform", "codes", "unit"),
    [
        (IPL, IPL, (1, 1), "mm"),
        (IPL, IPL, (0, 0), "mm"),
        (ELSEWHERE, IPL, (1, 2), "mm"),
        (ELSEWHERE, IPL, (1, 0), "unknown"),
        (None, IPL, (0, 4), "mm"),
        (IPL * 1e-3, IPL * 1e-3, (1, 1), "meter"),
        (IPL * 1e3, IPL * 1e3, (1, 1), "micron"),
    ],
)
def test_labels_state_their_place_as_the_scan_does(
    tmp_path: Path, qform: np.ndarray | None, sform: np.ndarray, codes: tuple[int, int], unit: str
) -> None:
    header = nibabel.Nifti1Header()
    header.set_data_shape(SHAPE)
    header.set_data_dtype(np.int16)
    header.set_xyzt_units(unit)
    for set_form, affine, code in ((header.set_qform, qform, codes[0]), (header.set_sform, sform, codes[1])):
        set_form(affine, int(code)) if code or affine is not None else None
    if qform is None:
        header["pixdim"][1:4] = np.linalg.norm(sform[:3, :3], axis=0)
    header["qform_code"], header["sform_code"] = codes
    scan_of(tmp_path / "a.nii", header)
    scan = nifti.read_image(tmp_path / "a.nii", "a")
    np.testing.assert_allclose(sorted(scan.geometry.spacing), [0.7, 0.8, 2.5], rtol=1e-3)
    whole = Probabilities(
        scan.array[None], ("kidney",), Box((0, 0, 0), scan.array.shape), scan.geometry, scan.native, "a"
    )
    write_block(tmp_path, whole, tmp_path / "a.nii", "")
    for native in (scan.native, read_block(tmp_path, "a").native):
        nifti.write_labels(tmp_path / "labels.nii.gz", (scan.array % 3).astype(np.uint8), native)
        written, given = nibabel.load(tmp_path / "labels.nii.gz"), nibabel.load(tmp_path / "a.nii")
        assert [written.header[name].tolist() for name in STATED] == [given.header[name].tolist() for name in STATED]
        assert np.array_equal(written.affine, given.affine)
        assert nifti.read_geometry(tmp_path / "labels.nii.gz").same_as(scan.native, 0)


def test_what_a_header_says_twice_must_agree(tmp_path: Path) -> None:
    image = nibabel.load(save(tmp_path / "a.nii.gz", count()))
    for qform, sform, fact in (
        (
            IPL @ np.diag([1, 1, 1.1, 1]),
            IPL,
            r"its sform states voxels of 2.5 x 0.7 x 0.8 mm, its qform 2.5 x 0.7 x 0.88",
        ),
        (IPL, np.diag([1.0, 1, 1, 1]), "its sform states voxels of 1 x 1 x 1 mm, its qform 2.5 x 0.7 x 0.8 mm"),
        (IPL, IPL @ np.diag([-1, 1, 1, 1]), "mirror images: left and right are unknown"),
    ):
        image.set_qform(qform, 1)
        image.header["srow_x"], image.header["srow_y"], image.header["srow_z"] = sform[:3]
        image.header["sform_code"] = 2
        scan_of(tmp_path / "b.nii", image.header)
        for read in (nifti.read_image, nifti.read_labels, nifti.read_geometry):
            refused(tmp_path / "b.nii", fact, read)
    image.set_qform(ELSEWHERE, 1)
    image.set_sform(IPL, 2)
    image.to_filename(tmp_path / "c.nii")
    (doubt,) = nifti.read_geometry(tmp_path / "c.nii").doubts
    assert doubt.startswith("its qform (IPL) and its sform (IPL, which is used) place it up to ")


def test_written_twice_the_bytes_are_the_same_and_as_nibabel_writes_them(tmp_path: Path) -> None:
    labels, native = (count((3, 5, 7)) % 3).astype(np.uint8), Geometry((3, 5, 7), np.diag([-2.0, -3.0, 4.0, 1.0]))
    canonical = np.ascontiguousarray(nifti.turn_to_canonical(labels, native))
    for name in ("a.nii.gz", "b.nii.gz", "c.nii"):
        nifti.write_labels(tmp_path / name, canonical, native, "by hand")
    image = nibabel.Nifti1Image(labels, native.affine)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = "by hand"
    image.set_qform(native.affine, 1)
    image.set_sform(native.affine, 1)
    assert (tmp_path / "c.nii").read_bytes() == image.to_bytes()
    assert gzip.decompress((tmp_path / "a.nii.gz").read_bytes()) == image.to_bytes()
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_a_file_with_a_qform_alone(tmp_path: Path) -> None:
    header = nibabel.Nifti1Header()
    header.set_data_shape(SHAPE)
    header.set_data_dtype(np.int16)
    header.set_qform(rotation(12) @ IPL, code=1)
    nibabel.save(nibabel.Nifti1Image(count(), None, header), tmp_path / "a.nii.gz")
    volume = nifti.read_image(tmp_path / "a.nii.gz", "a")
    nifti.write_image(tmp_path / "b.nii.gz", volume.array, volume.native)
    again = nifti.read_image(tmp_path / "b.nii.gz", "a")
    assert again.native.same_as(volume.native, tolerance=1e-4)  # a quaternion has no exact matrix in float32
    np.testing.assert_array_equal(again.array, volume.array)


def test_writing_refuses_other_types(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="uint8, not int16"):
        nifti.write_labels(tmp_path / "a.nii.gz", count(), Geometry(SHAPE, IPL))
    assert not list(tmp_path.iterdir())


def test_failed_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(KitsegError, match="can't be written"):
        nifti.write_labels(tmp_path / "file" / "a.nii.gz", np.zeros(SHAPE, np.uint8), Geometry(SHAPE, IPL))
    (tmp_path / "a.nii.gz").mkdir()  # the last step, renaming, fails
    with pytest.raises(KitsegError, match="can't be written"):
        nifti.write_labels(tmp_path / "a.nii.gz", np.zeros(SHAPE, np.uint8), Geometry(SHAPE, IPL))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.nii.gz", "file"]


def test_phantoms_are_marked(tmp_path: Path) -> None:
    native = Geometry(SHAPE, IPL)
    nifti.write_image(tmp_path / "a.nii.gz", count(), native, nifti.PHANTOM_MARK)
    nifti.write_image(tmp_path / "b.nii.gz", count(), native)
    assert nifti.mark_of(tmp_path / "a.nii.gz") == nifti.PHANTOM_MARK
    assert nifti.mark_of(tmp_path / "b.nii.gz") == ""


def test_orientation_missing_in_the_header(tmp_path: Path) -> None:
    header = nibabel.Nifti1Header()
    header.set_data_shape(SHAPE)
    nibabel.save(nibabel.Nifti1Image(count(), None, header), tmp_path / "a.nii.gz")
    assert "no orientation" in nifti.read_geometry(tmp_path / "a.nii.gz").doubts[0]
    assert not nifti.read_geometry(save(tmp_path / "b.nii.gz", count())).doubts


def test_digest(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")  # FIPS 180-2, example B.1
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_digest(tmp_path / "a") == known
    with pytest.raises(InputError, match="no such file"):
        file_digest(tmp_path / "b")


def test_reading_needs_no_torch_nor_scientific_machinery() -> None:
    heavy = "{'torch', 'scipy.ndimage', 'matplotlib', 'joblib', 'huggingface_hub', 'pooch'}"
    code = f"import sys, kitseg.volumes.nifti; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
