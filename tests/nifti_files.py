"""Small NIfTI files for the tests of the reader."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest

from kitseg.errors import InputError
from kitseg.labels import KITS19
from kitseg.types import Case, Geometry, Grid
from kitseg.volumes import nifti
from kitseg.volumes.store import CaseFiles, store_case

SHAPE = (3, 4, 5)
IPL = np.array([[0, 0, -0.8, 90], [0, -0.7, 0, 60.5], [-2.5, 0, 0, 1000.25], [0, 0, 0, 1]])


def save(path: Path, array: np.ndarray, affine: np.ndarray = IPL) -> Path:
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def count(shape: tuple[int, ...] = SHAPE, dtype: type = np.int16) -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def case_files(folder: Path, hu: np.ndarray, label: np.ndarray, native: Geometry, number: int = 0) -> Case:
    """A case with these voxels: ``NUMBER.nii.gz`` and ``NUMBER_label.nii.gz``."""
    case = Case(f"case_{number:05d}", folder / f"{number}.nii.gz", folder / f"{number}_label.nii.gz")
    nifti.write_image(case.image, hu.astype(np.int16), native)
    nifti.write_labels(case.label, label, native)
    return case


def stored_case(
    folder: Path, hu: np.ndarray, label: np.ndarray, native: Geometry, number: int = 0, grid: Grid | None = None
) -> Path:
    """The folder of a stored case with these voxels."""
    case = case_files(folder, hu, label, native, number)
    assert store_case(CaseFiles(case, KITS19), folder / "store" / case.id, grid or Grid())
    return folder / "store" / case.id


def refused(path: Path, fact: str, read=nifti.read_image) -> None:
    """Reading fails in one line that names the file and contains the fact."""
    arguments = () if read is nifti.read_geometry else ("a",)
    with pytest.raises(InputError, match=fact) as caught:
        read(path, *arguments)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert caught.value.remedy
