from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import kitseg
from scipy import ndimage

from kitseg.errors import InputError, KitsegError
from kitseg.labels import KITS19, to_kits19
from kitseg.runtime.files import HOST
from kitseg.volumes.nifti import PHANTOM_MARK, mark_of
from kitseg.volumes.phantom import make_case, write_case

INDICES = range(8)
MATRIX = 96
SINGLE = 17  # with seed 0


@pytest.fixture(scope="module")
def cases() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    return [make_case(0, index, MATRIX) for index in INDICES]


def spacing(affine: np.ndarray) -> np.ndarray:
    return np.linalg.norm(affine[:3, :3], axis=0)


def millilitres(mask: np.ndarray, affine: np.ndarray) -> float:
    return float(mask.sum() * np.prod(spacing(affine)) / 1000)


def components(label: np.ndarray, affine: np.ndarray) -> list[tuple[float, float]]:
    """Volume in ml and mean column of each 26-connected foreground component, largest first."""
    parts, count = ndimage.label(label > 0, np.ones((3, 3, 3)))
    found = [
        (millilitres(parts == n, affine), float(np.argwhere(parts == n)[:, 2].mean())) for n in range(1, count + 1)
    ]
    return sorted(found, reverse=True)


def test_same_seed_and_index_make_the_same_case(cases: list) -> None:
    for first, again in zip(cases[1], make_case(0, 1, MATRIX), strict=True):
        np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize(("seed", "index"), [(0, 2), (1, 1)])
def test_another_seed_or_index_makes_another_case(cases: list, seed: int, index: int) -> None:
    label = make_case(seed, index, MATRIX)[1]
    assert label.shape != cases[1][1].shape or (label != cases[1][1]).any()


def test_arrays_are_a_kits_scan(cases: list) -> None:
    for ct, label, affine in cases:
        assert ct.dtype == np.int16
        assert label.dtype == np.uint8
        assert ct.shape == label.shape
        assert ct.shape[1:] == (MATRIX, MATRIX)
        assert ct.shape[0] < 400
        assert {0, 1, 2} <= set(np.unique(label)) <= {0, 1, 2, 3}
        assert nib.aff2axcodes(affine) == ("I", "P", "L")
        thickness, row, column = spacing(affine)
        assert 0.5 <= thickness <= 5
        assert row == column
        assert 330 <= MATRIX * row <= 460
        assert 180 <= ct.shape[0] * thickness <= 330


def test_tissues_have_the_hounsfield_units_of_contrast_ct(cases: list) -> None:
    for ct, label, _ in cases:
        kidney = ndimage.binary_erosion(to_kits19(label) == 1, iterations=2)
        assert 110 < np.median(ct[kidney]) < 230
        assert 20 < np.median(ct[label == 2]) < 175
        assert abs(np.median(ct[:, :4, :4]) + 1000) < 15
        values, counts = np.unique(ct[(ct > -160) & (ct < 0)] // 10 * 10, return_counts=True)
        assert -120 <= values[counts.argmax()] <= -90  # the histogram's fat peak


def test_tumors_are_inside_the_body(cases: list) -> None:
    for ct, label, _ in cases:
        smooth = ndimage.uniform_filter(ct.astype(np.float32), 3)
        assert smooth[label == 2].min() > -150


def test_kidneys_with_their_tumors_are_the_largest_components(cases: list) -> None:
    for _, label, affine in cases:
        assert millilitres(to_kits19(label) == 1, affine) >= 60
        assert millilitres(label == 2, affine) >= 0.2
        (first, column), (second, other), *rest = components(label, affine)
        assert min(first, second) > 60
        assert min(column, other) < MATRIX / 2 < max(column, other)
        assert sum(volume for volume, _ in rest) < 1


def test_liver_lies_at_low_columns_above_the_kidneys(cases: list) -> None:
    """Columns grow to the patient's left, slices downwards."""
    for ct, label, _ in cases:
        top = np.argwhere(label)[:, 0].min()
        soft = ndimage.uniform_filter((ct[:top] > 40) & (ct[:top] < 200), 3, output=np.float32) > 0.9
        assert soft[..., : MATRIX // 2].sum() > 1.3 * soft[..., MATRIX // 2 :].sum()


def test_some_patients_have_a_single_kidney() -> None:
    _, label, affine = make_case(0, SINGLE, MATRIX)
    (volume, _), *rest = components(label, affine)
    assert volume >= 60
    assert sum(volume for volume, _ in rest) < 1


@pytest.mark.parametrize("index", [1, 2, 5])
def test_anatomy_does_not_depend_on_the_matrix(cases: list, index: int) -> None:
    ct, label, affine = make_case(0, index, 160)
    _, coarse, coarse_affine = cases[index]
    assert ct.shape[0] == len(coarse)
    assert 160 * spacing(affine)[1] == pytest.approx(MATRIX * spacing(coarse_affine)[1])
    for value, tolerance in ((1, 0.1), (2, 0.2)):  # a 10 mm tumor is a dozen coarse voxels
        expected = millilitres(coarse == value, coarse_affine)
        assert millilitres(label == value, affine) == pytest.approx(expected, rel=tolerance)


def test_case_is_written_in_the_kits_layout_and_marked(tmp_path: Path) -> None:
    write_case(tmp_path / "data", 3, 2, 64, KITS19)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["case_00002"]
    case = tmp_path / "data" / "case_00002"
    assert sorted(path.name for path in case.iterdir()) == ["imaging.nii.gz", "segmentation.nii.gz"]
    for path, expected in zip(sorted(case.iterdir()), make_case(3, 2, 64), strict=False):
        image = nib.load(path)
        assert image.get_data_dtype() == expected.dtype
        assert image.header["descrip"].item() == PHANTOM_MARK.encode()
        assert mark_of(path) == PHANTOM_MARK
        assert image.header.get_xyzt_units()[0] == "mm"
        np.testing.assert_array_equal(np.asarray(image.dataobj), expected)
        np.testing.assert_allclose(image.affine, make_case(3, 2, 64)[2], atol=1e-5)


def test_writing_again_replaces_the_phantom(tmp_path: Path) -> None:
    write_case(tmp_path, 0, 2, 48, KITS19)
    (tmp_path / f".partial.{HOST}.999999999.case_00002").mkdir()  # a process that is gone left it
    write_case(tmp_path, 1, 2, 48, KITS19)
    assert [path.name for path in tmp_path.iterdir()] == ["case_00002"]
    ct, label, _ = make_case(1, 2, 48)
    np.testing.assert_array_equal(nib.load(tmp_path / "case_00002" / "imaging.nii.gz").dataobj, ct)
    np.testing.assert_array_equal(nib.load(tmp_path / "case_00002" / "segmentation.nii.gz").dataobj, to_kits19(label))


def test_a_patients_case_is_never_replaced(tmp_path: Path) -> None:
    write_case(tmp_path, 0, 2, 48, KITS19)
    image = tmp_path / "case_00002" / "imaging.nii.gz"
    scan = nib.load(image)
    scan.header["descrip"] = "a patient"
    nib.save(nib.Nifti1Image(np.asarray(scan.dataobj), scan.affine, scan.header), image)
    before = image.read_bytes()
    with pytest.raises(InputError, match="not a phantom"):
        write_case(tmp_path, 0, 2, 48, KITS19)
    assert image.read_bytes() == before


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(KitsegError, match="can't be written"):
        write_case(tmp_path / "file", 0, 2, 32, KITS19)


def test_brackets_in_a_folders_name_are_no_markup(tmp_path: Path) -> None:
    done = kitseg(tmp_path, "phantom", "out [bold]", "--cases=1", "--matrix=64", "--jobs=1")
    assert (done.code, "1 phantom in out [bold]" in done.text) == (0, True), done.text
