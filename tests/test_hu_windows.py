"""Networks whose input has windows of HU as further channels, wherever these channels are counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import kitseg
from method_runs import untrained
from nifti_files import save

from kitseg import config
from kitseg.errors import UsageError
from kitseg.training.cost import stage_cost
from kitseg.training.fit import make_feed
from kitseg.training.rehearsal import _smallest_patch, seconds_a_step

WINDOWS = "size.hu.windows=[[-20,40],[20,80]]"
SCALE = {"_target_": "kitseg.links.intensity.ClipScale", "low": -79, "high": 304, "shift": 101, "scale": 76.9}


def stages(*overrides: str) -> Any:
    return config.compose("resenc", "tiny", overrides)["stages"]


def test_each_window_is_a_channel() -> None:
    assert (stages()["masses"]["intensity"], stages()["masses"]["module"]["net"]["channels_in"]) == (SCALE, 1)
    for stage in stages(WINDOWS).values():
        assert stage["intensity"] == {**SCALE, "windows": [[-20, 40], [20, 80]]}
        assert stage["module"]["net"]["channels_in"] == 3


def test_another_intensity_has_one_channel() -> None:
    changes = [
        "stages.masses.intensity=null",
        "stages.masses.intensity={_target_: kitseg.links.intensity.ZScore}",
        "stages.masses.augmentation=[{_target_: torch.nn.Identity, windows: []}]",
    ]
    found = stages(*changes)["masses"]
    assert found["module"]["net"]["channels_in"] == 1
    assert found["augmentation"] == [{"_target_": "torch.nn.Identity", "windows": []}], "left as it is given"


def test_an_unknown_key_beside_windows_is_the_one_that_is_named() -> None:
    with pytest.raises(UsageError, match=r"--set size\.epochz: unknown key"):
        stages(WINDOWS, "size.epochz=5")


def test_a_training_is_estimated_and_rehearsed() -> None:
    spec = config.method_of(config.compose("resenc", "tiny", [WINDOWS])).stages["kidneys"]
    assert stage_cost(spec, (48, 48, 48), "cpu", True).patch == (48, 48, 48)
    assert max(_smallest_patch(spec, make_feed(spec, seed=0, workers=0))) < 48
    assert seconds_a_step(spec, (16, 16, 16), "cpu") > 0


def test_predictions_within_a_limit_and_networks_as_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    run = untrained(tmp_path / "run", "resenc", WINDOWS)
    save(tmp_path / "scan.nii.gz", np.full((20, 24, 24), 40, np.int16))
    done = kitseg(tmp_path, "predict", "scan.nii.gz", "--model", str(run), "--max-memory=6GB", "--engine=torch")
    assert done.code == 0, done.text
    done = kitseg(tmp_path, "export", str(run), "-o", "out", "--format=onnx")
    assert (done.code, done.text.count("100.000% same labels")) == (0, 2), done.text
