"""Every bad scan ends in one line with its name, through the command line, and leaves nothing behind."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import kitseg

MODEL = "--model=runs/two-phase-tiny"
AFFINE = np.array([[0, 0, -3.0, 0], [0, -3.0, 0, 0], [-3.0, 0, 0, 0], [0, 0, 0, 1]])


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    image = nib.Nifti1Image(array, None)
    image.set_sform(affine, 1)
    nib.save(image, path)


def soft_tissue(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(-150, 200, shape).astype(np.int16)


def truncated(path: Path) -> None:
    save(path, soft_tissue((30, 30, 30)))
    path.write_bytes(path.read_bytes()[:500])


def with_nan(path: Path) -> None:
    array = soft_tissue((20, 20, 20)).astype(np.float32)
    array[3, 3, 3] = np.nan
    save(path, array)


def sheared(path: Path) -> None:
    affine = AFFINE.copy()
    affine[0, 1] = 1.5
    save(path, soft_tissue((20, 20, 20)), affine)


def singular(path: Path) -> None:
    affine = AFFINE.copy()
    affine[:, 0] = 0
    save(path, soft_tissue((20, 20, 20)), affine)


def text(path: Path) -> None:
    path.write_bytes(gzip.compress(b"patient's letter, not a scan\n" * 40))


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (lambda path: None, "no such file"),
    "empty": (lambda path: path.touch(), "empty"),
    "truncated": (truncated, ""),
    "text": (text, "NIfTI"),
    "two_d": (lambda path: save(path, soft_tissue((30, 30))), "2 dimensions"),
    "four_d": (lambda path: save(path, soft_tissue((20, 20, 20, 3))), "4 dimensions"),
    "nan": (with_nan, "not finite"),
    "sheared": (sheared, ""),
    "singular": (singular, ""),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_scan(trained: Path, tmp_path: Path, name: str) -> None:
    make, words = BAD[name]
    path = tmp_path / f"{name}.nii.gz"
    make(path)
    result = kitseg(trained, "predict", str(path), "-o", str(tmp_path / "out"), MODEL)
    assert result.code == 1
    assert words in result.text
    assert "Traceback" not in result.text
    (line,) = [line for line in result.text.splitlines() if line.startswith("✗")]
    assert f"{name}.nii.gz" in line
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_scan_smaller_than_a_patch(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "small.nii.gz"
    save(path, soft_tissue((5, 9, 7)))
    result = kitseg(trained, "predict", str(path), "-o", str(tmp_path / "out"), MODEL)
    assert result.code == 0, result.text
    assert nib.load(tmp_path / "out" / "small.nii.gz").shape == (5, 9, 7)


def test_a_scan_without_kidneys_is_all_background_in_words(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "air.nii.gz"
    save(path, np.full((20, 40, 40), -1000, np.int16))
    result = kitseg(trained, "predict", str(path), "-o", str(tmp_path / "out"), MODEL)
    assert result.code == 0, result.text
    labels = np.asarray(nib.load(tmp_path / "out" / "air.nii.gz").dataobj)
    assert labels.any() or "no kidney or tumor found: all background" in result.text


def test_one_volume_in_four_dimensions_is_that_volume(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "four.nii.gz"
    save(path, soft_tissue((20, 20, 20, 1)))
    assert kitseg(trained, "predict", str(path), "-o", str(tmp_path / "out"), MODEL).code == 0


def test_two_scans_with_one_name_are_refused(trained: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save(tmp_path / folder / "scan.nii.gz", soft_tissue((20, 20, 20)))
    paths = [str(tmp_path / folder / "scan.nii.gz") for folder in ("a", "b")]
    result = kitseg(trained, "predict", *paths, MODEL)
    assert result.code == 2
    assert all(path in result.text.replace("\n", "") for path in paths)


def test_a_label_on_another_grid_is_reported_and_the_others_are_done(phantoms: Path, tmp_path: Path) -> None:
    for number in range(3):
        target = tmp_path / "data" / f"case_{number:05d}"
        target.mkdir(parents=True)
        for name in ("imaging.nii.gz", "segmentation.nii.gz"):
            (target / name).write_bytes((phantoms / "data" / target.name / name).read_bytes())
    save(tmp_path / "data" / "case_00001" / "segmentation.nii.gz", np.zeros((20, 64, 64), np.uint8))
    result = kitseg(tmp_path, "preprocess", "--size=tiny", "--jobs=2")
    assert result.code == 1
    assert "case_00001" in result.text
    assert "4 done" in result.text
    checked = kitseg(tmp_path, "check", "--jobs=1")
    assert checked.code == 1
    assert "2 of 3 cases are fine" in checked.text


def test_a_damaged_checkpoint_is_named(trained: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(trained / "runs", tmp_path / "runs")
    for path in (tmp_path / "runs").glob("*/fold_0/fine/best/*.ckpt"):
        path.write_bytes(path.read_bytes()[:1000])
    scan = str(trained / "test" / "case_00000")
    result = kitseg(tmp_path, "predict", scan, MODEL)
    assert result.code == 1
    assert ".ckpt: can't be loaded" in result.text
    assert "Traceback" not in result.text


def test_an_output_that_is_a_file(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    result = kitseg(trained, "predict", "test/case_00000", "-o", str(tmp_path / "out"), MODEL)
    assert result.code == 1
    assert "Traceback" not in result.text


def test_commands_that_cannot_be_meant(trained: Path) -> None:
    for command in (
        ("predict", "test", "--model=nowhere"),
        ("predict", "test", MODEL, "--device=tpu"),
        ("infer", "--run=runs/two-phase-tiny", "--stage=coarser", "--data=test", "-o", "x"),
        ("infer", "--run=runs/two-phase-tiny", "--stage=fine.3", "--data=test", "-o", "x"),
        ("train", "--size=tiny", "--fold=9"),
        ("train", "--size=tiny", "--stage=finest", "--name=n"),
        ("check", "--convention=kits20"),
        ("evaluate", "test", "test", "--cases=0", "--split=splits.json"),
        ("download", "kits99"),
        ("phantom", "x", "--matrix=3"),
    ):
        result = kitseg(trained, *command)
        assert result.code == 2, f"{command}: {result}"
        assert "Traceback" not in result.text
