"""Several ranks on the CPU (gloo): both stages train and leave one set of files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALLEST

pytestmark = pytest.mark.slow
OPTIONS = (*SMALLEST, "--epochs=2", "--set=size.coarse_samples=2", "--set=size.fine_samples=2", "--jobs=1")


def check_one_set_of_files(folder: Path) -> None:
    run = folder / "runs" / "two-phase-tiny"
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "fold_0", "run.json", "splits.json"]
    for stage in ("coarse", "fine"):
        files = sorted(path.name for path in (run / "fold_0" / stage).iterdir())
        names = ["best", "curves.png", "done.json", "history.csv", "last.ckpt", "places.json", "tensorboard"]
        assert files == names
        rows = (run / "fold_0" / stage / "history.csv").read_text().splitlines()
        assert len(rows) == 3
        assert json.loads((run / "fold_0" / stage / "done.json").read_text())["checkpoints"]
    assert not list(folder.rglob(".partial*"))


def run(folder: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400, check=False
    )


def test_two_processes(phantoms: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(phantoms / "data")
    command = [sys.executable, "-m", "kitseg", "train", *OPTIONS, "--device=cpu", "--processes=2"]
    result = run(tmp_path, command)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("coarse: starts") == 1
    assert "2 × CPU" in result.stdout
    check_one_set_of_files(tmp_path)


def test_torchrun(phantoms: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(phantoms / "data")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = run(tmp_path, [*launcher, "-m", "kitseg", "train", *OPTIONS, "--device=cpu", "--processes=2"])
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("coarse: starts") == 1
    check_one_set_of_files(tmp_path)


def test_more_gpus_than_there_are(phantoms: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(phantoms / "data")
    result = run(tmp_path, [sys.executable, "-m", "kitseg", "train", *OPTIONS, "--gpus=99"])
    assert result.returncode == 2
    assert "99 GPU(s) asked for" in result.stderr
    assert not (tmp_path / "runs").exists()
