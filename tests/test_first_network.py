"""The way from the command to the first network: few calls, and no library that prediction doesn't need."""

from __future__ import annotations

import subprocess
import sys
import traceback
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import kitseg
from method_runs import untrained

import kitseg as package
from kitseg.nets.unet import UNet

#: Calls of kitseg's own from ``main`` to a network's ``forward``, both counted; OpenVINO traces the network.
FEWEST = {"torch": 14, "openvino": 15}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and a small scan."""
    folder = tmp_path_factory.mktemp("first")
    untrained(folder / "run")
    nib.save(nib.Nifti1Image(np.zeros((16, 16, 4), np.int16), np.diag([8.0, 8, 8, 1])), folder / "scan.nii.gz")
    return folder


@pytest.mark.parametrize("engine", FEWEST)
def test_few_calls_lie_between_the_command_and_a_network(
    folder: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    if engine == "openvino":
        pytest.importorskip("openvino")
    trips: list[list[str]] = []

    def forward(self: UNet, x: object) -> None:
        root = str(Path(package.__file__).parent)
        trips.append([f"{f.filename} {f.name}" for f in traceback.extract_stack() if f.filename.startswith(root)])
        raise RuntimeError("here")

    monkeypatch.setattr(UNet, "forward", forward)
    done = kitseg(folder, "predict", "scan.nii.gz", "--model=run", "-o", "out", "--device=cpu", f"--engine={engine}")
    assert done.code == 1
    assert "RuntimeError: here" in done.text
    assert trips[0][0].endswith("main")
    assert len(trips[0]) + 1 <= FEWEST[engine], "\n".join(trips[0])


def test_prediction_loads_neither_lightning_nor_torchio(folder: Path) -> None:
    code = """
import sys
from kitseg.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code
print(sorted({"torch", "pytorch_lightning", "lightning_fabric", "torchio"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", code, "predict", "scan.nii.gz", "--model=run", "-o", "found", "--device=cpu"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "found" / "scan.nii.gz").exists()
    assert done.stdout.splitlines()[-1] == "['torch']"
