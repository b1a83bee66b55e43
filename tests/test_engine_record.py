"""Records state the engine that has computed, also where it is not the chosen one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import kitseg
from method_runs import untrained
from nifti_files import save

from kitseg.models.engines import has_kernels

pytestmark = pytest.mark.skipif(not has_kernels(), reason="the kernels are not compiled")
PYTORCH = "PyTorch, float32"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run, and a labelled scan that none of its folds learned from; the kernels can't take its networks."""
    (tmp_path / "run").mkdir()
    untrained(tmp_path / "run")
    (tmp_path / "data" / "else").mkdir(parents=True)
    hu = np.random.default_rng(0).normal(0, 100, (8, 24, 24)).astype(np.int16)
    save(tmp_path / "data" / "else" / "imaging.nii.gz", hu)
    save(tmp_path / "data" / "else" / "segmentation.nii.gz", (hu > 0).astype(np.uint8))

    def refused(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("an operation that can't be traced")

    monkeypatch.setattr("kitseg.native.compiled.compile_network", refused)
    monkeypatch.setattr("kitseg.models.stage.has_openvino", lambda: False)
    return tmp_path


def engines(path: Path) -> list[str]:
    return [model["engine"] for model in json.loads(path.read_text())["models"]]


def test_of_probabilities_and_the_labels_from_them(work: Path) -> None:
    infer = ("infer", "--run=run", "--data=data", "--engine=winograd", "--device=cpu", "-o")
    for verb in (
        (*infer, "p"),
        ("ensemble", "p", "p", "-o", "mean", "--weights=3,1"),
        ("ensemble", "mean", "p", "-o", "means"),
        ("postprocess", "p", "-o", "one"),
        ("postprocess", "means", "-o", "three"),
    ):
        done = kitseg(work, *verb)
        assert done.code == 0, done.text
    assert json.loads((work / "p" / "manifest.json").read_text())["model"]["engine"].startswith("Winograd")
    assert engines(work / "one" / "else.json") == [PYTORCH]
    assert engines(work / "three" / "else.json") == 3 * [PYTORCH]
    members = json.loads((work / "means" / "manifest.json").read_text())["members"]
    assert [member["weight"] for member in members] == [0.75, 0.25, 1], "a mean's members keep their shares"
    for verb in ((*infer, "p"), ("postprocess", "means", "-o", "three")):
        assert "unchanged" in kitseg(work, *verb).text


def test_of_a_validation(work: Path) -> None:
    done = kitseg(work, "validate", "run", "--data=data", "--device=cpu")
    assert "PyTorch computes a network" in done.text
    assert engines(work / "run" / "validation" / "predictions" / "else.json") == [PYTORCH]
    assert "unchanged" in kitseg(work, "validate", "run", "--data=data", "--device=cpu").text
