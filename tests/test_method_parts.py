"""What sets two-stage, guided-unetpp and dual-unet apart, seen in what their trainings leave."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import kitseg, once
from method_runs import history, labels_of, quick_run, read, run_of, stage_folder, train, working_folder
from scipy import ndimage

from kitseg import config
from kitseg.models.chain import Output, run_chain, run_on_grid
from kitseg.models.model import open_model
from kitseg.models.run_folder import StageFolder
from kitseg.models.stage import open_stage
from kitseg.stages.base import Stage
from kitseg.types import Box
from kitseg.volumes.blocks import read_block, write_block
from kitseg.volumes.nifti import read_image
from kitseg.volumes.store import StoredCase, open_case

pytestmark = pytest.mark.slow
CASE = "case_00000"


# --- two-stage -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def two_stage(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Path:
    return quick_run(tmp_path_factory, phantoms, "two-stage")


def outputs(run: Path, scan: Path) -> dict[str, Output]:
    """What both stages of two-stage predict for a scan, on their grid, which is the phantoms' own."""
    stages = open_model(run, "cpu").stages[0]
    return run_chain(read_image(scan, CASE), stages, [("slices", "main"), ("segment", "main")])


def slice_probabilities(output: Output) -> np.ndarray:
    """The classifier's probability of foreground, a number a slice."""
    assert output.array is not None
    values = output.array[1].numpy()
    assert (values == values[:, :1, :1]).all(), "the classifier gives one probability for a whole slice"
    return values[:, 0, 0]


def test_the_threshold_finds_the_slices_of_the_validation_cases(two_stage: Path) -> None:
    run = two_stage / run_of("two-stage")
    threshold = read(run / "fold_0" / "slices" / "done.json")["threshold"]
    probability, true, passed = [], [], []
    for case in read(run / "splits.json")["folds"][0]["val"]:
        label = labels_of(two_stage / "data" / case / "segmentation.nii.gz")
        found = outputs(run, two_stage / "data" / case / "imaging.nii.gz")["slices.main"]
        probability.append(slice_probabilities(found))
        passed.append(found.labels().any((1, 2)))
        true.append((label > 0).any((1, 2)))
    values, positive, gate = (np.concatenate(parts) for parts in (probability, true, passed))
    assert 0 < positive.sum() < len(positive)
    assert gate[positive].mean() >= 0.99
    higher = values[(values > threshold + 1e-6) & (values <= 0.5)]  # it is never above 0.5
    assert all((values[positive] >= value).mean() < 0.99 for value in higher), "a larger threshold would have done"


def test_slices_below_the_threshold_are_background(two_stage: Path, tmp_path: Path) -> None:
    run, scan = tmp_path / "run", two_stage / "test" / CASE / "imaging.nii.gz"
    shutil.copytree(two_stage / run_of("two-stage"), run)
    done = run / "fold_0" / "slices" / "done.json"
    probability = slice_probabilities(outputs(run, scan)["slices.main"])
    middle = float(np.sort(probability)[len(probability) // 2 :][:2].mean())
    done.write_text(json.dumps({**read(done), "threshold": middle}))

    passes = probability > middle
    assert 0 < passes.sum() < len(passes)
    found = outputs(run, scan)["segment.main"].array
    assert found is not None
    assert np.array_equal((found[0] < 1).any(dim=(1, 2)).numpy(), passes)
    predicted = kitseg(tmp_path, "predict", str(scan.parent), f"--model={run}", "-o", "out")
    assert predicted.code == 0, predicted.text
    labels = labels_of(tmp_path / "out" / f"{CASE}.nii.gz")
    expected = found.argmax(dim=0).numpy()
    assert np.array_equal(labels.any((1, 2)), expected.any((1, 2)))
    assert not labels[~passes].any()


# --- guided-unetpp ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def guided(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Path:
    """Two training cases, each guided by the network that learned from the other one."""

    def make(folder: Path) -> None:
        options = ("--set=size.guide=out_of_fold", "--set=nested_folds=2", "--set=size.pixels=64")
        train(working_folder(folder, phantoms, cases=3), "guided-unetpp", *options)

    return once(tmp_path_factory, "guided-inner", make)


def predicted_by(guided: Path, case: str, trained: Path) -> tuple[StoredCase, Output]:
    """A stored case and what a trained foreground network predicts for it."""
    spec = open_model(guided / run_of("guided-unetpp"), "cpu").method.stages["foreground"]
    stored = open_case(guided / "preprocessed" / str(spec.grid) / case)
    predictor = open_stage(spec, torch.device("cpu")).trained_in(StageFolder(trained))
    return stored, run_on_grid(stored.image, stored.grid, predictor, "main", {})


def guides(guided: Path, side: str) -> Iterator[tuple[str, np.ndarray]]:
    folder = stage_folder(guided, "guided-unetpp", "segment")
    for case, place in read(folder / "places.json")[side].items():
        yield case, np.load(folder / place["guide"])


def dilated(mask: np.ndarray) -> np.ndarray:
    """Dilated by the ball of 10 × 10/8 × 10/8 voxels, given as the set of its voxels."""
    z, y, x = np.ogrid[-10:11, -2:3, -2:3]
    ball = (z / 10) ** 2 + (y / 1.25) ** 2 + (x / 1.25) ** 2 < 1
    return ndimage.binary_dilation(mask, ball)


def test_a_training_case_is_guided_by_the_network_that_has_not_seen_it(guided: Path) -> None:
    foreground = stage_folder(guided, "guided-unetpp", "foreground")
    fold = read(guided / "splits.json")["folds"][0]
    checked = 0
    for case, (probability, mask) in guides(guided, "train"):
        number = next(i for i, part in enumerate(fold["inner"]) if case in part["val"])
        assert case not in read(foreground / f"inner_{number}" / "places.json")["train"]
        stored, inner = predicted_by(guided, case, foreground / f"inner_{number}")
        assert np.array_equal(probability, inner.foreground().astype(np.float16))
        _, outer = predicted_by(guided, case, foreground)
        assert not np.array_equal(probability, outer.foreground().astype(np.float16))
        assert np.array_equal(mask, dilated(np.asarray(stored.label) > 0)), "its mask is the label's"
        assert 0 < (mask > 0).sum() < mask.size
        checked += 1
    assert checked == len(fold["train"]) == 2


def test_a_validation_case_is_guided_by_the_stage_itself(guided: Path) -> None:
    found = dict(guides(guided, "val"))
    assert list(found) == read(guided / "splits.json")["folds"][0]["val"]
    for case, (probability, mask) in found.items():
        _, outer = predicted_by(guided, case, stage_folder(guided, "guided-unetpp", "foreground"))
        assert np.array_equal(probability, outer.foreground().astype(np.float16))
        assert np.array_equal(mask, dilated(outer.labels() > 0)), "its mask is the network's"


def test_weight_decay_does_not_outweigh_the_masked_losss_small_gradients() -> None:
    """The mean over all pixels, most of them masked out, has gradients near zero: they leave the weights alone."""
    spec = config.method_of(config.compose("guided-unetpp", "tiny", [])).stages["segment"]
    stage = Stage.of(spec)
    optimizer = stage.configure_optimizers()
    optimizer = optimizer["optimizer"] if isinstance(optimizer, dict) else optimizer
    before = {name: weights.detach().clone() for name, weights in stage.model.net.named_parameters()}
    for _ in range(100):
        for weights in stage.model.net.parameters():
            weights.grad = torch.zeros_like(weights)
        optimizer.step()
    for name, weights in stage.model.net.named_parameters():
        assert torch.allclose(weights, before[name], rtol=0.001), name


# --- dual-unet -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def learned(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Path:
    """Five training cases, long enough to find kidneys."""

    def make(folder: Path) -> None:
        options = ("--epochs=9", "--set=folds=6", "--set=size.validate_every=3", "--set=size.learning_rate=3e-3")
        train(working_folder(folder, phantoms, cases=6, every=8), "dual-unet", *options)
        predicted = kitseg(folder, "predict", "test", f"--model={run_of('dual-unet')}", "-o", "predictions")
        assert predicted.code == 0, predicted.text

    return once(tmp_path_factory, "learned", make)


@pytest.fixture(scope="session")
def stopped(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Path:
    """Networks that learn nothing, and stop after two validations that bring nothing; without the shape filter."""

    def make(folder: Path) -> None:
        stop = [f"--set=stages.{stage}.stop_after=2" for stage in ("kidneys", "tumors")]
        options = ("--epochs=40", "--set=size.learning_rate=0", "--set=postprocess.shape=null", *stop)
        train(working_folder(folder, phantoms, cases=3), "dual-unet", *options)

    return once(tmp_path_factory, "stopped", make)


def test_kidneys_of_unseen_phantoms_are_found(learned: Path) -> None:
    assert kitseg(learned, "evaluate", "predictions", "test", "--json", "scores.json").code == 0
    assert read(learned / "scores.json")["mean"]["kidney"]["dice"] > 0.6


def test_tumors_are_looked_for_in_the_lower_half_only(learned: Path) -> None:
    inferred = kitseg(learned, "infer", f"--run={run_of('dual-unet')}", "--data=test", "-o", "p")
    assert inferred.code == 0, inferred.text
    probabilities = read_block(learned / "p", CASE)
    assert probabilities.channels == ("foreground", "tumor")
    middle = 32 - probabilities.box.start[1]
    foreground, tumor = probabilities.array
    assert (foreground[:, :middle] > 0.5).any()
    assert not tumor[:, :middle].any()
    assert tumor[:, middle:].any()
    for file in (learned / "predictions").glob("*.nii.gz"):
        assert not (labels_of(file)[:, :32] == 2).any()


def test_a_training_ends_where_nothing_improves_any_more(stopped: Path) -> None:
    for stage in ("kidneys", "tumors"):
        folder = stage_folder(stopped, "dual-unet", stage)
        rows = history(folder / "history.csv")
        scores = [row["val/score"] for row in rows]
        assert len(scores) == scores.index(max(scores)) + 3 < 40
        assert read(folder / "done.json")["checkpoints"][0]["val_score"] == pytest.approx(max(scores))


def test_the_last_checkpoint_knows_the_plateau_that_the_learning_rate_waits_for(stopped: Path) -> None:
    for stage in ("kidneys", "tumors"):
        folder = stage_folder(stopped, "dual-unet", stage)
        losses = [row["train/loss"] for row in history(folder / "history.csv")]
        (schedule,) = torch.load(folder / "last.ckpt", weights_only=True)["lr_schedulers"]
        assert schedule["patience"] == 5
        assert schedule["best"] == pytest.approx(min(losses))
        assert schedule["last_epoch"] == len(losses)


def test_a_prior_that_is_null_is_switched_off(learned: Path, stopped: Path, tmp_path: Path) -> None:
    kept, scan = {}, learned / "test" / CASE / "imaging.nii.gz"
    for name, folder in (("shape", learned), ("none", stopped)):
        run, out = folder / run_of("dual-unet"), tmp_path / name
        inferred = kitseg(tmp_path, "infer", f"--run={run}", f"--data={scan.parent}", "-o", name)
        assert inferred.code == 0, inferred.text
        block = read_block(out, CASE)
        array = np.zeros((2, *block.geometry.shape), np.float16)
        array[0, 5:15, 30:50, 30:50] = 1
        array[1, 8:10, 40:43, 34:46] = 1  # a rod in the kidney
        whole = replace(block, array=array, box=Box((0, 0, 0), block.geometry.shape))
        write_block(out, whole, scan, read(out / f"{CASE}.json")["scan"]["sha256"])
        assert kitseg(tmp_path, "postprocess", name, "-o", f"{name}-labels").code == 0
        kept[name] = labels_of(tmp_path / f"{name}-labels" / f"{CASE}.nii.gz")
    assert np.array_equal(kept["shape"] > 0, kept["none"] > 0)
    assert (kept["none"] == 2).sum() == 2 * 3 * 12
    assert not (kept["shape"] == 2).any()
