"""A killed command resumes where it stood."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import SMALLEST, kitseg, kitseg_process

pytestmark = pytest.mark.slow
COARSE = (
    *SMALLEST,
    "--stage=coarse",
    "--epochs=6",
    "--set=size.validate_every=1",
    "--set=size.coarse_samples=4",
    "--jobs=1",
)


def kill_when(ready: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    try:
        while not ready():
            assert process.poll() is None, "it ended too early"
            assert time.monotonic() < end, "it never came"
            time.sleep(0.02)
    finally:
        process.kill()
        process.communicate()


def weights(run: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(run / "last.ckpt", weights_only=True)["state_dict"]
    return state


def test_a_killed_training_ends_with_the_same_weights(phantoms: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        (folder / "data").symlink_to(phantoms / "data")
    assert kitseg(whole, "train", *COARSE).code == 0

    stage = Path("runs/two-phase-tiny/fold_0/coarse")
    process = kitseg_process(killed, "train", *COARSE)
    kill_when((killed / stage / "last.ckpt").exists, process)
    assert not (killed / stage / "done.json").exists()
    assert torch.load(killed / stage / "last.ckpt", weights_only=True)["epoch"] < 5

    killed = killed.rename(tmp_path / "moved")  # a run is resumed also where its folder has moved
    again = kitseg(killed, "train", *COARSE)
    assert again.code == 0, again.text
    assert "coarse: resumes" in again.text
    one, other = weights(whole / stage), weights(killed / stage)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (whole / stage / "history.csv").read_text() == (killed / stage / "history.csv").read_text()
    scores = [[row["val_score"] for row in json.loads((f / stage / "done.json").read_text())["checkpoints"]]
              for f in (whole, killed)]  # fmt: skip
    assert scores[0] == scores[1]
    assert not list(killed.rglob(".partial*"))


def test_a_killed_preprocessing_resumes(phantoms: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(phantoms / "data")
    options = ("preprocess", "--size=small", "--jobs=1")
    process = kitseg_process(tmp_path, *options)
    kill_when(lambda: len(list((tmp_path / "preprocessed").glob("*/case_*/meta.json"))) >= 2, process)
    there = {path: path.stat().st_mtime_ns for path in (tmp_path / "preprocessed").glob("*/case_*/meta.json")}
    assert 2 <= len(there) < 12
    again = kitseg(tmp_path, *options)
    assert again.code == 0, again.text
    assert f"{len(there)} unchanged" in again.text
    assert f"{12 - len(there)} done" in again.text
    assert all(path.stat().st_mtime_ns == then for path, then in there.items())
    assert not list(tmp_path.rglob(".partial*"))


def test_a_changed_case_is_preprocessed_again(phantoms: Path, tmp_path: Path) -> None:
    for number in (0, 1):
        source, target = phantoms / "data" / f"case_{number:05d}", tmp_path / "data" / f"case_{number:05d}"
        target.mkdir(parents=True)
        for name in ("imaging.nii.gz", "segmentation.nii.gz"):
            (target / name).write_bytes((source / name).read_bytes())
    options = ("preprocess", *SMALLEST, "--jobs=1")
    assert "4 done" in kitseg(tmp_path, *options).text
    label = tmp_path / "data" / "case_00000" / "segmentation.nii.gz"
    label.touch()
    assert "4 unchanged" in kitseg(tmp_path, *options).text, "same content, new time"
    image = nib.load(label)
    nib.save(nib.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine), label)
    result = kitseg(tmp_path, *options)
    assert "2 unchanged" in result.text
    assert "2 done" in result.text
