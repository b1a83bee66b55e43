"""From phantoms to labels and scores, through the command line."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import SMALLEST, kitseg
from nibabel.orientations import aff2axcodes, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

import kitseg as package

RUN = "runs/two-phase-tiny"


def labels_of(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def test_a_training_leaves_what_it_promises(trained: Path) -> None:
    for stage in ("coarse", "fine"):
        folder = trained / RUN / "fold_0" / stage
        done = json.loads((folder / "done.json").read_text())
        named = {row["file"] for row in done["checkpoints"]}
        assert named == {f"best/{path.name}" for path in (folder / "best").iterdir()}
        assert 1 <= len(named) <= 5
        scores = [row["val_score"] for row in done["checkpoints"]]
        assert scores == sorted(scores, reverse=True)
        weights = torch.load(folder / done["checkpoints"][0]["file"], weights_only=True)
        assert "optimizer_states" not in weights
        assert "optimizer_states" in torch.load(folder / "last.ckpt", weights_only=True)
        rows = (folder / "history.csv").read_text().splitlines()
        assert len(rows) == 5
        assert {"epoch", "train/loss", "val/dice_kidney", "val/dice_tumor"} <= set(rows[0].split(","))
        assert (folder / "curves.png").stat().st_size > 1000
        assert list((folder / "tensorboard").glob("events*"))
    assert json.loads((trained / RUN / "run.json").read_text())["phantom"] is True
    assert not list(trained.rglob(".partial*"))


def test_a_second_call_finds_everything_done(trained: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (trained / RUN).rglob("*") if path.is_file()}
    again = kitseg(trained, "train", *SMALLEST, "--jobs=1")
    assert again.code == 0
    assert "coarse: trained already" in again.text
    assert "12 unchanged" in again.text
    assert before == {path: path.stat().st_mtime_ns for path in (trained / RUN).rglob("*") if path.is_file()}


def test_another_configuration_is_refused_with_the_difference(trained: Path) -> None:
    """A line for each value that differs, as a terminal shows them."""
    terminal, end = pty.openpty()
    command = [sys.executable, "-m", "kitseg", "train", *SMALLEST, "--seed=5", "--set=keep_best=2", "--jobs=1"]
    refused = subprocess.Popen(command, cwd=trained, stdout=end, stderr=end)
    os.close(end)
    shown = b""
    with contextlib.suppress(OSError):  # at its end
        while part := os.read(terminal, 4096):
            shown += part
    os.close(terminal)
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).rstrip() for line in shown.decode().splitlines()]
    assert refused.wait() == 2
    first = next(number for number, line in enumerate(lines) if "another configuration" in line)
    assert lines[first + 1 :] == ["  keep_best: 5 → 2", "  seed: 0 → 5"]


def test_another_split_is_refused(trained: Path) -> None:
    split = json.loads((trained / "splits.json").read_text())
    split["folds"] = split["folds"][1:]
    (trained / "other.json").write_text(json.dumps(split))
    refused = kitseg(trained, "train", *SMALLEST, "--split=other.json", "--jobs=1")
    assert refused.code == 2
    assert "another split" in refused.text


def test_a_later_stage_needs_its_earlier_one(trained: Path) -> None:
    refused = kitseg(trained, "train", *SMALLEST, "--fold=1", "--stage=fine", "--jobs=1")
    assert refused.code == 2
    assert "builds on stage coarse" in refused.text
    assert not (trained / RUN / "fold_1" / "fine" / "last.ckpt").exists()


def test_dry_run_writes_nothing(phantoms: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(phantoms / "data")
    shown = kitseg(tmp_path, "train", "--size=paper", "--dry-run")
    assert shown.code == 0
    assert "65.20 M" in shown.text
    assert "130.40 M" in shown.text
    assert "inner_2" in shown.text
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_restart_moves_the_old_run_aside(phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").symlink_to(phantoms / "data")
    quick = (*SMALLEST, "--stage=coarse", "--epochs=1", "--set=size.coarse_samples=1", "--jobs=1")
    assert kitseg(tmp_path, "train", *quick).code == 0
    assert kitseg(tmp_path, "train", *quick, "--restart").code == 0
    assert (tmp_path / RUN / "fold_0" / "coarse.old-1" / "done.json").exists()
    assert kitseg(tmp_path, "train", *quick, "--seed=3", "--restart").code == 0
    assert (tmp_path / "runs" / "two-phase-tiny.old-1" / "config.yaml").exists()
    assert (tmp_path / RUN / "fold_0" / "coarse" / "done.json").exists()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    queued_again = kitseg(tmp_path, "train", *quick, "--seed=3", "--restart")
    assert queued_again.code == 2
    assert "leave --restart out" in queued_again.text
    assert not (tmp_path / RUN / "fold_0" / "coarse.old-1").exists()


def test_out_of_fold_places_come_from_inner_folds(phantoms: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(phantoms / "data")
    quick = (*SMALLEST, "--epochs=1", "--set=size.coarse_samples=2", "--set=size.guide=out_of_fold", "--jobs=1")
    result = kitseg(tmp_path, "train", *quick, "--set=nested_folds=2")
    assert result.code == 0, result.text
    coarse = tmp_path / RUN / "fold_0" / "coarse"
    split = json.loads((tmp_path / "splits.json").read_text())["folds"][0]
    for number in (0, 1):
        places = json.loads((coarse / f"inner_{number}" / "places.json").read_text())
        assert set(places["train"]) == set(split["inner"][number]["train"])
        assert not set(places["train"]) & set(split["inner"][number]["val"])
        assert (coarse / f"inner_{number}" / "done.json").exists()
    fine = json.loads((tmp_path / RUN / "fold_0" / "fine" / "places.json").read_text())
    assert set(fine["train"]) == set(split["train"])
    assert set(fine["val"]) == set(split["val"])


def test_the_steps_one_by_one_give_what_predict_gives(trained: Path) -> None:
    assert kitseg(trained, "infer", f"--run={RUN}", "--data=test", "-o", "p").code == 0
    assert kitseg(trained, "ensemble", "p", "-o", "mean").code == 0
    assert kitseg(trained, "postprocess", "mean", "-o", "steps").code == 0
    assert kitseg(trained, "predict", "test", "-o", "whole", f"--model={RUN}").code == 0
    for case in ("case_00000", "case_00001"):
        one, other = trained / "steps" / f"{case}.nii.gz", trained / "whole" / f"{case}.nii.gz"
        assert np.array_equal(labels_of(one), labels_of(other))
        assert one.read_bytes() == other.read_bytes()
    assert any(labels_of(trained / "whole" / f"{case}.nii.gz").any() for case in ("case_00000", "case_00001"))


def test_the_heads_of_a_stage_differ(trained: Path) -> None:
    for stage in ("fine.1", "fine.2"):
        assert kitseg(trained, "infer", f"--run={RUN}", f"--stage={stage}", "--data=test", "-o", f"h{stage}").code == 0
    one, two = (json.loads((trained / f"hfine.{i}" / "case_00000.json").read_text()) for i in (1, 2))
    same_box = one["box"] == two["box"]
    blocks = [np.load(trained / f"hfine.{i}" / "case_00000.npy") for i in (1, 2)]
    assert not same_box or not np.array_equal(*blocks)


def test_a_weighted_ensemble_is_the_weighted_mean(trained: Path) -> None:
    for stage in ("fine.1", "fine.2"):
        kitseg(trained, "infer", f"--run={RUN}", f"--stage={stage}", "--data=test", "-o", f"w{stage}")
    done = kitseg(trained, "ensemble", "wfine.1", "wfine.2", "-o", "weighted", "--weights=3,1")
    assert done.code == 0, done.text
    full = {}
    for name in ("wfine.1", "wfine.2", "weighted"):
        meta = json.loads((trained / name / "case_00001.json").read_text())
        whole = np.zeros((3, *meta["geometry"]["shape"]), np.float32)
        whole[0] = 1
        box = tuple(slice(a, b) for a, b in zip(meta["box"]["start"], meta["box"]["stop"], strict=True))
        whole[(slice(None), *box)] = np.load(trained / name / "case_00001.npy")
        full[name] = whole
    expected = (3 * full["wfine.1"] + full["wfine.2"]) / 4
    assert np.allclose(full["weighted"], expected, atol=1e-3)


def test_predict_keeps_the_grid_of_a_scan_in_another_orientation(trained: Path, tmp_path: Path) -> None:
    source = nib.load(trained / "test" / "case_00000" / "imaging.nii.gz")
    turn = ornt_transform(io_orientation(source.affine), axcodes2ornt("RAS"))
    array = nib.orientations.apply_orientation(np.asarray(source.dataobj), turn)
    affine = source.affine @ inv_ornt_aff(turn, source.shape)
    assert aff2axcodes(affine) == ("R", "A", "S")
    nib.save(nib.Nifti1Image(array, affine), tmp_path / "turned.nii.gz")
    result = kitseg(trained, "predict", str(tmp_path / "turned.nii.gz"), "-o", str(tmp_path / "out"), f"--model={RUN}")
    assert result.code == 0, result.text
    found = nib.load(tmp_path / "out" / "turned.nii.gz")
    assert found.shape == array.shape
    assert np.array_equal(found.affine, nib.load(tmp_path / "turned.nii.gz").affine)
    assert found.get_data_dtype() == np.uint8
    kitseg(trained, "predict", "test/case_00000", "-o", str(tmp_path / "out"), f"--model={RUN}")
    straight = labels_of(tmp_path / "out" / "case_00000.nii.gz")
    assert np.array_equal(nib.orientations.apply_orientation(straight, turn), np.asarray(found.dataobj))


def test_predict_writes_figures_and_a_picture(trained: Path, tmp_path: Path) -> None:
    assert kitseg(trained, "predict", "test/case_00001", "-o", str(tmp_path), f"--model={RUN}").code == 0
    facts = json.loads((tmp_path / "case_00001.json").read_text())
    scan = nib.load(trained / "test" / "case_00001" / "imaging.nii.gz")
    ml = abs(np.linalg.det(scan.affine[:3, :3])) / 1000
    labels = labels_of(tmp_path / "case_00001.nii.gz")
    assert facts["volumes_ml"]["kidney"] == pytest.approx((labels == 1).sum() * ml, abs=2e-3)
    assert [len(model["sha256"]) for model in facts["models"]] == [64]
    assert facts["versions"]["kitseg"] == package.__version__
    assert (tmp_path / "case_00001.png").read_bytes().startswith(b"\x89PNG")


def test_predict_never_writes_over_the_scan(trained: Path, tmp_path: Path) -> None:
    scan = tmp_path / "scan.nii.gz"
    shutil.copy(trained / "test" / "case_00000" / "imaging.nii.gz", scan)
    before = scan.read_bytes()
    refused = kitseg(trained, "predict", str(scan), "-o", str(tmp_path), f"--model={RUN}")
    assert refused.code == 2
    assert "is the scan itself" in refused.text
    assert scan.read_bytes() == before


def test_a_folder_holds_probabilities_of_one_kind(trained: Path) -> None:
    infer = ("infer", f"--run={RUN}", "--data=test", "-o", "kind")
    assert kitseg(trained, *infer).code == 0
    assert kitseg(trained, *infer).code == 0
    refused = kitseg(trained, *infer, "--stage=fine.1")
    assert refused.code == 2
    assert "another model, stage or version" in refused.text
    refused = kitseg(trained, "ensemble", "kind", "-o", "kind")
    assert refused.code == 2


def test_only_the_cases_that_a_fold_holds_out(trained: Path, tmp_path: Path) -> None:
    held_out = ("--split=splits.json", "--fold=0")
    labels = str(tmp_path / "labels")
    assert kitseg(trained, "predict", *held_out, "-o", labels, f"--model={RUN}").code == 0
    expected = json.loads((trained / "splits.json").read_text())["folds"][0]["val"]
    assert sorted(path.name[:10] for path in (tmp_path / "labels").glob("*.nii.gz")) == expected
    scored = kitseg(trained, "evaluate", labels, *held_out, "--json", str(tmp_path / "s.json"))
    assert scored.code == 0, scored.text
    assert sorted(json.loads((tmp_path / "s.json").read_text())["cases"]) == expected
    assert kitseg(trained, "evaluate", labels, "--split=splits.json").code == 2


def test_a_run_trained_on_phantoms_is_marked(trained: Path) -> None:
    named = kitseg(trained, "predict", "test/case_00000", f"--model={RUN}")
    assert named.code == 0
    assert "trained on phantoms, not on patients" in named.text


def test_the_only_run_that_learned_from_patients_is_picked(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / RUN, tmp_path / "runs" / "real")
    info = tmp_path / "runs" / "real" / "run.json"
    info.write_text(info.read_text().replace('"phantom": true', '"phantom": false'))
    (tmp_path / "scan").symlink_to(trained / "test" / "case_00000")
    result = kitseg(tmp_path, "predict", "scan/imaging.nii.gz")
    assert result.code == 0, result.text
    assert "model: runs/real" in result.text
    shutil.copytree(tmp_path / "runs" / "real", tmp_path / "runs" / "second")
    both = kitseg(tmp_path, "predict", "scan/imaging.nii.gz")
    assert both.code == 2
    assert "runs/real, runs/second" in both.text


def test_evaluate_scores_and_names_what_is_missing(trained: Path, tmp_path: Path) -> None:
    perfect = tmp_path / "perfect"
    perfect.mkdir()
    truth = trained / "test" / "case_00000" / "segmentation.nii.gz"
    shutil.copy(truth, perfect / "prediction_00000.nii.gz")
    scored = kitseg(trained, "evaluate", str(perfect), "test", "--json", str(tmp_path / "scores.json"))
    assert scored.code == 0, scored.text
    content = json.loads((tmp_path / "scores.json").read_text())
    assert content["protocol"] == "kits19"
    classes = content["cases"]["case_00000"]
    assert {name: scores["dice"] for name, scores in classes.items()} == {"kidney": 1, "tumor": 1}
    required = kitseg(trained, "evaluate", str(perfect), "test", "--cases=0-1", "--json", str(tmp_path / "two.json"))
    assert required.code == 1
    assert "case_00001" in required.text
    content = json.loads((tmp_path / "two.json").read_text())
    assert content["missing"] == ["case_00001"]
    assert content["mean"]["kidney"]["dice"] == 0.5
