"""Everything that can be wrong with a NIfTI file is refused in one line."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest
from nifti_files import IPL, SHAPE, count, refused, save

from kitseg.errors import InputError
from kitseg.volumes import nifti

READERS = [nifti.read_geometry, nifti.read_image, nifti.read_labels]


@pytest.mark.parametrize("read", READERS)
def test_missing_file_and_folder(tmp_path: Path, read) -> None:
    refused(tmp_path / "a.nii.gz", "no such file", read)
    (tmp_path / "b.nii.gz").mkdir()
    refused(tmp_path / "b.nii.gz", "it is a folder", read)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (b"", "is empty"),
        (b"Dear colleague,\n" * 100, "broken or not a NIfTI"),
        (b"\x1f\x8b\x08\x00", "broken or not a NIfTI"),
    ],
)
def test_what_is_no_nifti(tmp_path: Path, read, name: str, content: bytes, fact: str) -> None:
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, fact, read)


def test_zipped_text_and_other_suffixes(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(b"Dear colleague,\n" * 100))
    refused(tmp_path / "a.nii.gz", "broken or not a NIfTI")
    (tmp_path / "a.dcm").write_bytes(b"DICM")
    refused(tmp_path / "a.dcm", "not a NIfTI file")


def test_a_file_cut_anywhere(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(-1000, 1000, (20, 20, 20)).astype(np.int16)
    whole = save(tmp_path / "a.nii.gz", noise).read_bytes()
    plain = save(tmp_path / "a.nii", noise).read_bytes()
    for share in (0.001, 0.01, 0.1, 0.5, 0.99):
        for name, content in (("b.nii.gz", whole), ("b.nii", plain)):
            (tmp_path / name).write_bytes(content[: int(len(content) * share)])
            refused(tmp_path / name, "broken or not a NIfTI|truncated")
    (tmp_path / "b.nii.gz").write_bytes(whole[:-2])  # all voxels are there, the checksum isn't
    refused(tmp_path / "b.nii.gz", "broken or not a NIfTI")


def test_a_flipped_bit(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(-1000, 1000, (20, 20, 20)).astype(np.int16)
    content = bytearray(save(tmp_path / "a.nii.gz", noise).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "a.nii.gz").write_bytes(content)
    refused(tmp_path / "a.nii.gz", "broken or not a NIfTI")


def test_any_damaged_header_is_read_or_refused(tmp_path: Path) -> None:
    content = save(tmp_path / "a.nii", np.zeros(SHAPE, np.int16)).read_bytes()
    rng = np.random.default_rng(0)
    refusals = 0
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


@pytest.mark.parametrize(
    ("shape", "fact"),
    [((4, 5), "2 dimensions"), ((3, 4, 5, 2), "4 dimensions"), ((3, 4, 5, 1, 2), "5 dimensions"), ((3, 0, 5), "empty")],
)
@pytest.mark.parametrize("read", READERS)
def test_shapes(tmp_path: Path, shape: tuple[int, ...], fact: str, read) -> None:
    refused(save(tmp_path / "a.nii.gz", np.zeros(shape, np.uint8)), fact, read)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(tmp_path: Path, value: float) -> None:
    array = count(dtype=np.float32)
    array[1, 1, 1] = value
    refused(save(tmp_path / "a.nii.gz", array), "NaN or infinite")


def test_float64_beyond_float32(tmp_path: Path) -> None:
    refused(save(tmp_path / "a.nii.gz", count(dtype=np.float64) * 1e300), "NaN or infinite")


def sheared() -> np.ndarray:
    affine = IPL.copy()
    affine[1, 2] = 0.01
    return affine


@pytest.mark.parametrize(
    ("affine", "fact"),
    [
        (np.diag([1.0, 1, 0, 1]), "singular"),
        (np.array([[1.0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "singular"),
        (sheared(), "right angles"),
        (np.diag([0.04, 1.0, 1, 1]), "spacing is 0.04 x 1 x 1 mm"),
        (np.diag([1.0, 21, 1, 1]), "spacing is 1 x 21 x 1 mm"),
        (np.diag([1.0, np.nan, 1, 1]), "affine contains NaN"),
    ],
)
@pytest.mark.parametrize("read", READERS)
def test_lattices(tmp_path: Path, affine: np.ndarray, fact: str, read) -> None:
    header = nibabel.Nifti1Header()
    header.set_data_shape(SHAPE)
    header["sform_code"] = 1
    header["srow_x"], header["srow_y"], header["srow_z"] = affine[:3]
    (tmp_path / "a.nii").write_bytes(header.binaryblock + bytes(4) + count().tobytes(order="F"))
    refused(tmp_path / "a.nii", fact, read)


def test_a_little_shear_is_rounding(tmp_path: Path) -> None:
    affine = IPL.copy()
    affine[1, 2] = 0.0005
    assert nifti.read_image(save(tmp_path / "a.nii.gz", count(), affine), "a").array.shape == SHAPE


@pytest.mark.parametrize("dtype", [np.complex64, [("R", "u1"), ("G", "u1"), ("B", "u1")]])
@pytest.mark.parametrize("read", READERS)
def test_colors_and_complex_numbers(tmp_path: Path, dtype, read) -> None:
    refused(save(tmp_path / "a.nii.gz", np.zeros(SHAPE, dtype)), "voxel type", read)


@pytest.mark.parametrize(
    ("shape", "fact"), [((2000, 2000, 2000), "8000000000 voxels"), ((1000, 1000, 1000), "truncated")]
)
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_header_that_promises_too_much(tmp_path: Path, shape: tuple[int, ...], fact: str, name: str) -> None:
    header = nibabel.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(np.int16)
    header.set_sform(IPL, 1)
    content = header.binaryblock + bytes(1000)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    refused(tmp_path / name, fact)
