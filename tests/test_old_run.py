"""A run that kitseg 0.1.0 trained (tests/old_run/README.txt) opens and gives the labels that it gave then."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import kitseg

from kitseg import config, trust
from kitseg.models.members import open_ensemble
from kitseg.stages.base import Stage

OLD = Path(__file__).parent / "old_run"


def test_an_old_run_gives_its_stored_labels_and_probabilities(tmp_path: Path) -> None:
    """One voxel's two most probable classes are a step of float16 apart, so that another machine may swap them."""
    options = ("--device=cpu", "--engine=torch")
    done = kitseg(tmp_path, "predict", str(OLD / "scan.nii.gz"), "--model", str(OLD / "run"), "-o", "out", *options)
    assert done.code == 0, done.text
    stored, found = nib.load(OLD / "labels.nii.gz"), nib.load(tmp_path / "out" / "scan.nii.gz")
    assert np.array_equal(found.affine, stored.affine)
    assert np.count_nonzero(np.asarray(found.dataobj) != np.asarray(stored.dataobj)) <= 1
    assert np.count_nonzero(stored.dataobj) > 1000

    facts, step = json.loads((OLD / "probabilities.json").read_text()), 3
    prediction = open_ensemble([OLD / "run"], "cpu", engine="torch").predict(OLD / "scan.nii.gz")
    assert facts["box"] == {"start": [*prediction.proba.box.start], "stop": [*prediction.proba.box.stop]}
    values = prediction.proba.array[:, ::step, ::step, ::step].astype(np.float32)
    assert np.abs(values - np.load(OLD / "probabilities.npy")).max() < 1e-3


def test_an_old_configuration_is_read_with_todays_names() -> None:
    configuration = config.read(OLD / "run" / "config.yaml")
    assert "inner_folds" not in configuration
    assert configuration["stages"]["fine"]["module"]["_target_"] == "kitseg.stages.model.StageModel"
    method = config.method_of(configuration)
    assert list(method.stages) == ["coarse", "fine"]
    for spec in method.stages.values():
        assert len(Stage.of(spec).loss.weights) == len(spec.heads)


def test_a_configuration_of_before_an_option_is_the_same_as_with_its_default(tmp_path: Path) -> None:
    """So that a run goes on after an update."""
    today = config.compose("progressive", "paper")
    text = trust.dump(today)
    assert "count_absent: true" in text
    (tmp_path / "config.yaml").write_text(re.sub(r"\n *count_absent: true", "", text))
    assert config.differences(config.read(tmp_path / "config.yaml"), today) == []


@pytest.mark.parametrize("file", ["fold_0/fine/done.json", "run.json"])
def test_a_run_of_another_schema_is_refused_in_a_line(tmp_path: Path, file: str) -> None:
    shutil.copytree(OLD / "run", tmp_path / "run")
    content = json.loads((tmp_path / "run" / file).read_text())
    (tmp_path / "run" / file).write_text(json.dumps({**content, "schema": 0}))
    done = kitseg(tmp_path, "predict", str(OLD / "scan.nii.gz"), "--model=run", "-o", "out", "--device=cpu")
    assert done.code == 1
    (line,) = (line for line in done.text.splitlines() if line.strip())
    assert file in line
    assert "schema" in line
    assert not (tmp_path / "out" / "scan.nii.gz").exists()
