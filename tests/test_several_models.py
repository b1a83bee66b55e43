"""Several models in one prediction: each has its own weight, and is in memory alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import kitseg
from method_runs import untrained
from nifti_files import save

from kitseg.models.engines import Compiling, has_kernels
from kitseg.models.ensemble_file import Member, write_ensemble
from kitseg.models.members import open_ensemble
from kitseg.runtime.files import write_json
from kitseg.volumes.nifti import read_image


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Two runs, and an ensemble file of both."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        untrained(tmp_path / name)
    write_ensemble(tmp_path / "both.yaml", [Member(tmp_path / "a", 3.0), Member(tmp_path / "b", 1.0)], {}, {})
    save(tmp_path / "scan.nii.gz", np.random.default_rng(0).normal(0, 100, (2, 24, 24)).astype(np.int16))
    return tmp_path


@pytest.mark.parametrize(
    ("models", "weights", "expected"),
    [
        (("both.yaml", "a"), (), [0.75, 0.25, 1]),
        (("a", "both.yaml"), ("--weights=1,2",), [1, 1.5, 0.5]),
        (("both.yaml",), (), [3, 1]),
    ],
)
def test_the_members_of_an_ensemble_share_its_weight(
    work: Path, models: tuple[str, ...], weights: tuple[str, ...], expected: list[float]
) -> None:
    """As `kitseg ensemble` weighs folders that are means themselves."""
    named = [f"--model={model}" for model in models]
    done = kitseg(work, "predict", "scan.nii.gz", *named, *weights, "--device=cpu", "--engine=torch", "-o", "out")
    assert done.code == 0, done.text
    record = json.loads((work / "out" / "scan.json").read_text())
    assert [model["weight"] for model in record["models"]] == expected


def test_a_model_of_weight_0_is_left_out(work: Path) -> None:
    """It is not run, and no flag is about its disagreement with the others."""
    write_ensemble(work / "one.yaml", [Member(work / "a", 0.0), Member(work / "b", 1.0)], {}, {})
    for named in (("--model=a", "--model=b", "--weights=0,2"), ("--model=one.yaml",)):
        done = kitseg(work, "predict", "scan.nii.gz", *named, "--device=cpu", "--engine=torch", "-o", "out")
        assert done.code == 0, done.text
        record = json.loads((work / "out" / "scan.json").read_text())
        assert [Path(model["path"]).name for model in record["models"]] == ["b"]
        assert record["quality"]["agreement"] is None
    for name in ("a", "b"):
        infer = ("infer", f"--model={name}", "--data=scan.nii.gz", "--device=cpu", "--engine=torch", "-o", f"p{name}")
        assert kitseg(work, *infer).code == 0
    done = kitseg(work, "ensemble", "pa", "pb", "--weights=0,2", "-o", "mean")
    assert done.code == 0, done.text
    members = json.loads((work / "mean" / "manifest.json").read_text())["members"]
    assert [(member["folder"], member["weight"]) for member in members] == [("pb", 2.0)]
    assert np.array_equal(np.load(work / "mean" / "scan.npy"), np.load(work / "pb" / "scan.npy"))


@pytest.mark.parametrize(
    "engine",
    ["torch", pytest.param("winograd", marks=pytest.mark.skipif(not has_kernels(), reason="no compiled kernels"))],
)
def test_one_model_at_a_time_is_in_memory(work: Path, engine: str) -> None:
    """Also the next scan has all of them; a single model stays for it."""
    scan = read_image(work / "scan.nii.gz", "scan")
    for paths in (["a", "b"], ["a"]):
        opened = open_ensemble([work / path for path in paths], "cpu", engine=engine)
        first, again = (opened.predict_proba(scan)[0].array for _ in range(2))
        assert np.array_equal(first, again)
        stages = [stage for model in opened.models for stage in model.chain.values()]
        kept = [
            stage.engine._compiled is not None
            if isinstance(stage.engine, Compiling)
            else stage.model.device.type == "cpu"
            for stage in stages
        ]
        assert any(kept) == (len(paths) == 1)


@pytest.mark.parametrize("fitted", [["another"], ["a"], []])
def test_a_record_states_whose_errors_its_expected_dice_is_from(work: Path, fitted: list[str]) -> None:
    model = {"constant": 0.5, "weights": {}, "doubtful": 0.75}
    facts = {"reviewed": 4, "cases": 20, "failed": 0, "model": model, "orderings": {}, "models": fitted}
    write_json(work / "c.json", 1, facts)
    done = kitseg(work, "predict", "scan.nii.gz", "--model=a", "--confidence=c.json", "--device=cpu", "-o", "out")
    assert done.code == 0, done.text
    record = json.loads((work / "out" / "scan.json").read_text())
    assert "expected-dice" in [flag["name"] for flag in record["quality"]["flags"]]
    stated = "the expected Dice was fitted to another, not to a" in record["note"]
    assert stated == (fitted == ["another"])
    assert record["confidence"]["models"] == fitted
