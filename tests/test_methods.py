"""Every method that has a file in ``conf/method``: it trains, predicts and is scored, through the command line."""

from __future__ import annotations

import hashlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import kitseg
from method_runs import METHODS, history, labels_of, method_of, quick_run, read, run_of

pytestmark = pytest.mark.slow
CASES = ("case_00000", "case_00001")


@pytest.fixture(scope="session", params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, phantoms: Path, method: str) -> Path:
    """A working folder with a quick run of the method and its predictions of two scans."""
    made = quick_run(tmp_path_factory, phantoms, method)
    predicted = kitseg(made, "predict", "test", "-o", "predictions", f"--model={run_of(method)}")
    assert predicted.code == 0, predicted.text
    return made


def test_the_command_line_lists_the_methods_that_have_a_file(tmp_path: Path) -> None:
    listed = kitseg(tmp_path, "methods")
    assert listed.code == 0, listed.text
    names = {line.split()[0] for line in listed.text.splitlines() if line.strip()}
    assert set(METHODS) <= names


def test_every_stage_is_trained_to_its_end(folder: Path, method: str) -> None:
    for name, spec in method_of(folder, method).stages.items():
        stage = folder / run_of(method) / "fold_0" / name
        done = read(stage / "done.json")
        assert done["checkpoints"]
        for row in done["checkpoints"]:
            assert hashlib.sha256((stage / row["file"]).read_bytes()).hexdigest() == row["sha256"]
            assert 0 <= row["val_score"] <= 1
        trainings = [stage] if spec.rounds is None else sorted(stage.glob("round_*"))
        assert trainings
        for number, training in enumerate(trainings):
            rows = history(training / "history.csv")
            epochs = spec.rounds.epochs if spec.rounds and number else spec.epochs
            assert [row["epoch"] for row in rows] == list(range(epochs))
            assert all(np.isfinite(list(row.values())).all() for row in rows)
            best = max(row["val/score"] for row in rows)
            assert read(training / "done.json")["checkpoints"][0]["val_score"] == pytest.approx(best, abs=1e-6)
    assert not list(folder.rglob(".partial*"))


def test_labels_lie_on_the_scans_grid(folder: Path) -> None:
    for case in CASES:
        scan = nib.load(folder / "test" / case / "imaging.nii.gz")
        found = nib.load(folder / "predictions" / f"{case}.nii.gz")
        assert found.shape == scan.shape
        assert np.array_equal(found.affine, scan.affine)
        assert found.get_data_dtype() == np.uint8
        assert set(np.unique(np.asarray(found.dataobj))) <= {0, 1, 2}


def test_each_head_of_each_stage_can_be_inferred(folder: Path, method: str) -> None:
    for name, spec in method_of(folder, method).stages.items():
        for head in spec.heads:
            out = folder / "heads" / f"{name}.{head}"
            options = (f"--run={run_of(method)}/fold_0", f"--stage={name}.{head}", "--data=test/case_00000")
            inferred = kitseg(folder, "infer", *options, "-o", str(out))
            assert inferred.code == 0, inferred.text
            manifest = read(out / "manifest.json")
            assert (manifest["stage"], manifest["channels"]) == (f"{name}.{head}", list(spec.channels))
            block = np.load(out / "case_00000.npy").astype(np.float32)
            assert block.shape == (len(spec.channels), *box_size(out / "case_00000.json"))
            assert ((block >= 0) & (block <= 1)).all()
            if "background" in spec.channels:
                assert np.allclose(block.sum(axis=0), 1, atol=5e-3)


def test_a_stage_alone_means_its_last_head(folder: Path, method: str) -> None:
    name, spec = list(method_of(folder, method).stages.items())[-1]
    blocks = []
    for stage in (name, f"{name}.{spec.heads[-1]}"):
        options = (f"--run={run_of(method)}", f"--stage={stage}", "--data=test/case_00001")
        inferred = kitseg(folder, "infer", *options, "-o", f"alone-{stage}")
        assert inferred.code == 0, inferred.text
        blocks.append(np.load(folder / f"alone-{stage}" / "case_00001.npy"))
    assert np.array_equal(*blocks)


def test_the_steps_one_by_one_give_what_predict_gives(folder: Path, method: str) -> None:
    assert kitseg(folder, "infer", f"--run={run_of(method)}", "--data=test", "-o", "p").code == 0
    assert read(folder / "p" / "manifest.json")["channels"] == list(method_of(folder, method).outputs)
    assert kitseg(folder, "ensemble", "p", "-o", "mean").code == 0
    assert kitseg(folder, "postprocess", "mean", "-o", "steps").code == 0
    for case in CASES:
        steps, whole = folder / "steps" / f"{case}.nii.gz", folder / "predictions" / f"{case}.nii.gz"
        assert steps.read_bytes() == whole.read_bytes()


def test_predictions_are_scored(folder: Path) -> None:
    scored = kitseg(folder, "evaluate", "predictions", "test", "--json", "scores.json")
    assert scored.code == 0, scored.text
    scores = read(folder / "scores.json")["cases"]
    for case in CASES:
        found = labels_of(folder / "predictions" / f"{case}.nii.gz") > 0
        truth = labels_of(folder / "test" / case / "segmentation.nii.gz") > 0
        dice = 2 * (found & truth).sum() / (found.sum() + truth.sum())
        assert scores[case]["kidney"]["dice"] == pytest.approx(dice)


def box_size(path: Path) -> tuple[int, ...]:
    box = read(path)["box"]
    return tuple(b - a for a, b in zip(box["start"], box["stop"], strict=True))
