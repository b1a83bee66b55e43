"""A method of one's own takes two files: one YAML in ``conf/method``, and one stage."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from method_runs import read, working_folder

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]

METHOD = """\
# @package _global_
stages:
  voxels:
    inputs: []
    heads: [main]
    channels: [background, kidney, tumor]
    grid: { pixels: 32 }
    intensity: { _target_: kitseg.links.intensity.ClipScale, low: -100, high: 300, scale: 100 }
    region: { _target_: kitseg.links.regions.Square, pixels: 32 }
    sampler: { _target_: kitseg.patches.samplers.SliceSampler, holding: foreground, negatives: 0.5 }
    batch: 4
    epochs: ${either:${size.epochs},10}
    validate_every: 1
    precision: ${size.precision}
    module:
      _target_: kitseg.stages.toy.Toy
      net: { _target_: torch.nn.Conv2d, in_channels: 1, out_channels: 3, kernel_size: 3, padding: 1 }
      loss: { _target_: torch.nn.CrossEntropyLoss }
      optimizer: { _target_: torch.optim.Adam, _partial_: true, lr: 0.1 }
      scheduler: null
      window: { _target_: kitseg.inference.windows.Slices, batch: 8 }

name: toy
paper: "None: one convolution"
published: {}
chain: [voxels]
outputs: { background: voxels.background, kidney: voxels.kidney, tumor: voxels.tumor }
postprocess: {}
"""

STAGE = '''\
"""One convolution."""

from __future__ import annotations

from kitseg.stages.model import SliceModel


class Toy(SliceModel):
    """Labels pixels by their nearest neighbours."""
'''


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_sixth_method_takes_two_files(phantoms: Path, tmp_path: Path) -> None:
    package, folder = tmp_path / "site" / "kitseg", working_folder(tmp_path / "work", phantoms, cases=3)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "kitseg", package, ignore=ignored)
    shutil.copytree(ROOT / "conf", package / "conf", ignore=ignored)  # as the wheel holds it
    before = digests(package)
    added = {"conf/method/toy.yaml": METHOD, "stages/toy.py": STAGE}
    for name, text in added.items():
        assert not (package / name).exists()
        (package / name).write_text(text)

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "kitseg", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(package.parent), "COLUMNS": "160"}
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "None: one convolution" in run("methods")
    run("train", "--method=toy", "--size=tiny", "--epochs=2", "--set=folds=3", "--jobs=1")
    stage = folder / "runs" / "toy-tiny" / "fold_0" / "voxels"
    assert (stage / read(stage / "done.json")["checkpoints"][0]["file"]).exists()
    run("predict", "test", "--model=runs/toy-tiny")
    for number in range(2):
        found = nib.load(folder / "predictions" / f"case_{number:05d}.nii.gz")
        scan = nib.load(folder / "test" / f"case_{number:05d}" / "imaging.nii.gz")
        assert found.shape == scan.shape
        assert np.array_equal(found.affine, scan.affine)
        assert set(np.unique(np.asarray(found.dataobj))) <= {0, 1, 2}

    after = digests(package)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == set(added)
