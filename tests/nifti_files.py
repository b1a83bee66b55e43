"""Small NIfTI files for the tests of the reader."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest

from kitseg.errors import InputError
from kitseg.volumes import nifti

SHAPE = (3, 4, 5)
IPL = np.array([[0, 0, -0.8, 90], [0, -0.7, 0, 60.5], [-2.5, 0, 0, 1000.25], [0, 0, 0, 1]])


def save(path: Path, array: np.ndarray, affine: np.ndarray = IPL) -> Path:
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def count(shape: tuple[int, ...] = SHAPE, dtype: type = np.int16) -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def refused(path: Path, fact: str, read=nifti.read_image) -> None:
    """Reading fails in one line that names the file and contains the fact."""
    arguments = () if read is nifti.read_geometry else ("a",)
    with pytest.raises(InputError, match=fact) as caught:
        read(path, *arguments)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert caught.value.remedy
