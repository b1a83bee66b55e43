"""Folds, what they say of cases that they never saw, and the ensemble that is chosen by it."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import yaml
from conftest import kitseg, once
from method_runs import quick, working_folder

from kitseg.ensemble import mean
from kitseg.errors import KitsegError
from kitseg.labels import KITS19, Scheme
from kitseg.models.ensemble_file import Member, read_ensemble, write_ensemble
from kitseg.models.members import open_ensemble
from kitseg.scoring.kits19 import kits19_scores
from kitseg.splits import read_split
from kitseg.training.split import look_at
from kitseg.types import Case, Traits
from kitseg.volumes.blocks import read_block
from kitseg.volumes.nifti import read_image

pytestmark = pytest.mark.slow
METHODS = ("progressive", "two-stage")
RUNS = tuple(f"runs/{method}-tiny" for method in METHODS)
CASES = 6


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Path:
    """A working folder with three folds of two methods, trained and validated."""

    def make(folder: Path) -> None:
        working_folder(folder, phantoms, CASES)
        for method in METHODS:
            done = kitseg(folder, "train", *quick(method), "--fold=all")
            assert done.code == 0, done.text

    return once(tmp_path_factory, "cross_validation", make)


def labels(path: Path) -> Any:
    return np.asarray(nib.load(path).dataobj).astype(np.uint8)


def scores(folder: Path, run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / run / "validation/scores.json").read_text())
    return found


@pytest.mark.parametrize("run", RUNS)
def test_every_case_is_predicted_by_the_fold_that_never_saw_it(validated: Path, run: str) -> None:
    split = read_split(validated / run / "splits.json")
    assert read_split(validated / "splits.json") == split
    found = scores(validated, run)
    for number, fold in enumerate(split.folds):
        for case in fold.val:
            assert found["folds"][case] == number
            alone = validated / f"alone-{number}"
            done = kitseg(validated, "predict", f"data/{case}", f"--model={run}/fold_{number}", "-o", str(alone))
            assert done.code == 0, done.text
            same = validated / run / "validation/predictions" / f"{case}.nii.gz"
            assert np.array_equal(labels(alone / f"{case}.nii.gz"), labels(same))


@pytest.mark.parametrize("run", RUNS)
def test_scores_are_those_of_the_label_maps_together_by_fold_and_by_stratum(validated: Path, run: str) -> None:
    found = scores(validated, run)
    assert json.loads((validated / run / "validation/intervals.json").read_text())["cases"] == CASES
    dice = {}
    for case in found["cases"]:
        pair = (f"{run}/validation/predictions/{case}.nii.gz", f"data/{case}/segmentation.nii.gz")
        dice[case] = kits19_scores(*(labels(validated / path) for path in pair))
    assert len(dice) == CASES
    assert {case: {k: v["dice"] for k, v in row.items()} for case, row in found["cases"].items()} == dice
    groups = {(group["kind"], group["name"]): group for group in found["groups"]}
    assert groups["all", "all"]["dice"]["tumor"] == pytest.approx(np.mean([row["tumor"] for row in dice.values()]))
    for number in range(3):
        mine = [dice[case]["kidney"] for case, fold in found["folds"].items() if fold == number]
        assert groups["fold", str(number)]["cases"] == len(mine) == 2
        assert groups["fold", str(number)]["dice"]["kidney"] == pytest.approx(np.mean(mine))
    assert sum(group["cases"] for (kind, _), group in groups.items() if kind == "tumor size") == CASES
    assert groups["slices", "over 3 mm"]["cases"] == CASES


def test_patients_by_a_table_that_is_newer_than_the_split(validated: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(validated / "data", data)
    (data / "patients.csv").write_text("case,patient\ncase_00003,Ann\n")
    done = kitseg(validated, "validate", RUNS[0], f"--data={data}")
    assert done.code == 0, done.text
    assert scores(validated, RUNS[0])["patients"] == {"case_00003": "Ann"}


def test_histology_and_surgery_where_the_challenges_list_is_there(validated: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(validated / "data", data)
    rows = [
        {"case_id": f"case_{i:05d}", "tumor_histologic_subtype": kind}
        for i, kind in enumerate(["clear_cell_rcc", *["papillary"] * 5])
    ]
    (data / "kits.json").write_text(json.dumps(rows))
    done = kitseg(validated, "validate", RUNS[0], f"--data={data}")
    assert done.code == 0, done.text
    assert done.text.count("unchanged") == CASES
    found = {(g["kind"], g["name"]): g["cases"] for g in scores(validated, RUNS[0])["groups"]}
    assert found["histology", "papillary"] == 5
    assert found["histology", "clear_cell_rcc"] == 1
    (data / "kits.json").write_text("[3]")
    broken = kitseg(validated, "validate", RUNS[0], f"--data={data}")
    assert broken.code == 1
    assert "kits.json: can't be read" in broken.text
    assert "KiTS19 repository" in broken.text


def test_it_goes_on_when_called_again(validated: Path) -> None:
    again = kitseg(validated, "train", *quick("progressive"), "--fold=all")
    assert again.code == 0, again.text
    assert again.text.count("trained already") == 3
    assert again.text.count("unchanged") == 1 + CASES  # the preprocessed cases in one line, and each prediction
    lost = validated / RUNS[0] / "fold_1/validation"
    gone = sorted(lost.glob("case_*.json"))[0]
    gone.unlink()
    mended = kitseg(validated, "validate", RUNS[0])
    assert mended.code == 0, mended.text
    assert mended.text.count("unchanged") == CASES - 1
    assert gone.exists()


def test_the_folds_that_are_there_so_far(validated: Path, tmp_path: Path) -> None:
    shutil.copytree(validated / RUNS[0], tmp_path / "runs/part")
    shutil.rmtree(tmp_path / "runs/part/fold_2")
    part = kitseg(tmp_path, "validate", "runs/part", f"--data={validated / 'data'}")
    assert part.code == 0, part.text
    assert "2 of 3 folds are trained and validated so far" in part.text
    assert len(scores(tmp_path, "runs/part")["cases"]) == 4
    lacking = kitseg(tmp_path, "choose", "runs/part", str(validated / RUNS[1]), f"--data={validated / 'data'}")
    assert lacking.code == 2
    assert "has no current out-of-fold predictions" in lacking.text


def test_a_fold_alone_keeps_the_scores_of_the_others(validated: Path, tmp_path: Path) -> None:
    shutil.copytree(validated / RUNS[0], tmp_path / "runs/one")
    done = kitseg(tmp_path, "validate", "runs/one/fold_1", f"--data={validated / 'data'}")
    assert done.code == 0, done.text
    assert done.text.count("unchanged") == 2
    assert len(scores(tmp_path, "runs/one")["cases"]) == CASES


def test_a_fold_of_another_split_is_refused(validated: Path, tmp_path: Path) -> None:
    """As when folds are put together that were trained on machines with different splits."""
    shutil.copytree(validated / RUNS[0], tmp_path / "runs/mixed")
    path = tmp_path / "runs/mixed/splits.json"
    split = json.loads(path.read_text())
    split["folds"] = split["folds"][1:] + split["folds"][:1]
    path.write_text(json.dumps(split))
    done = kitseg(tmp_path, "validate", "runs/mixed", f"--data={validated / 'data'}")
    assert done.code == 2
    assert "was trained on case_" in done.text
    assert "holds out" in done.text


def test_a_scan_that_has_changed_is_predicted_again(validated: Path, tmp_path: Path) -> None:
    shutil.copytree(validated / "data", tmp_path / "data")
    shutil.copytree(validated / RUNS[0], tmp_path / RUNS[0])
    path = tmp_path / "data/case_00002/imaging.nii.gz"
    scan = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(scan.dataobj) + np.int16(3), scan.affine), path)
    refused = kitseg(tmp_path, "choose", RUNS[0], "-o", "x.yaml", "--jobs=1")
    assert refused.code == 1
    assert "is not what progressive-tiny predicted" in refused.text
    again = kitseg(tmp_path, "validate", RUNS[0])
    assert again.code == 0, again.text
    assert again.text.count("unchanged") == CASES - 1
    assert kitseg(tmp_path, "choose", RUNS[0], "-o", "x.yaml", "--jobs=1").code == 0
    path.write_bytes(b"no scan")
    broken = kitseg(tmp_path, "validate", RUNS[0])
    assert broken.code == 1
    assert scores(tmp_path, RUNS[0])["missing"] == ["case_00002"]


def test_choosing_spares_other_files(validated: Path) -> None:
    config = validated / RUNS[0] / "config.yaml"
    before = config.read_bytes()
    assert kitseg(validated, "choose", RUNS[0], "-o", str(config)).code == 2
    assert config.read_bytes() == before


def test_a_stage_begun_again_takes_its_validation_along(validated: Path, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    shutil.copytree(validated, folder)
    options = (*quick("two-stage"), "--fold=1", "--stage=segment", "--restart")
    done = kitseg(folder, "train", *options)
    assert done.code == 0, done.text
    assert not (folder / RUNS[1] / "fold_1/validation").exists()
    assert (folder / RUNS[1] / "fold_1/validation.old-1").exists()
    refused = kitseg(folder, "choose", RUNS[1], "-o", "x.yaml")
    assert refused.code == 2
    assert "has no current out-of-fold predictions" in refused.text


def test_a_validation_case_that_is_not_there(validated: Path, tmp_path: Path) -> None:
    shutil.copytree(validated / "data/case_00000", tmp_path / "few/case_00000")
    done = kitseg(validated, "validate", RUNS[0], f"--data={tmp_path / 'few'}")
    assert done.code == 2
    assert "case_00001" in done.text or "case_00002" in done.text
    assert "--data" in done.text


# --- choosing --------------------------------------------------------------------------------------------------------


def test_the_chosen_one_is_at_least_as_good_as_each_member(validated: Path) -> None:
    done = kitseg(validated, "choose", *RUNS, "-o", "best.yaml", "--jobs=1")
    assert done.code == 0, done.text
    chosen = yaml.safe_load((validated / "best.yaml").read_text())
    tried = chosen["chosen"]["tried"]
    assert chosen["chosen"]["dice"]["mean"] == max(row["mean"] for row in tried)
    assert all(set(member["sha256"]) == {0, 1, 2} for member in chosen["members"]), "of each fold"
    assert {row["runs"] for row in tried} >= {"progressive-tiny", "two-stage-tiny", "progressive-tiny + two-stage-tiny"}
    for run in RUNS:
        found = scores(validated, run)["mean"]
        alone = (found["kidney"]["dice"] + found["tumor"]["dice"]) / 2
        assert chosen["chosen"]["dice"]["mean"] >= round(alone, 6)
    scan = kitseg(validated, "predict", "test/case_00000", "--model=best.yaml", "-o", "chosen")
    assert scan.code == 0, scan.text


def test_a_pair_scores_like_the_mean_of_its_probabilities(validated: Path) -> None:
    """By hand from the files: mean, most probable channel, Dice."""
    done = kitseg(validated, "choose", *RUNS, "-o", "pair.yaml", "--jobs=1")
    assert done.code == 0, done.text
    tried = yaml.safe_load((validated / "pair.yaml").read_text())["chosen"]["tried"]
    both = next(r for r in tried if r["runs"] == "progressive-tiny + two-stage-tiny" and r["postprocess"] == "none")
    split, dice = read_split(validated / "splits.json"), []
    for number, fold in enumerate(split.folds):
        for case in fold.val:
            blocks = [read_block(validated / run / f"fold_{number}/validation", case) for run in RUNS]
            found = mean([(block, 1.0) for block in blocks])
            whole = np.zeros(found.geometry.shape, np.uint8)
            whole[found.box.slices] = found.array.astype(np.float32).argmax(0)
            truth = nib.load(validated / f"data/{case}/segmentation.nii.gz")
            # the phantoms' own axes are those of the arrays
            dice.append(kits19_scores(whole, np.asarray(truth.dataobj).astype(np.uint8)))
    assert both["kidney"] == pytest.approx(np.mean([row["kidney"] for row in dice]), abs=1e-6)
    assert both["tumor"] == pytest.approx(np.mean([row["tumor"] for row in dice]), abs=1e-6)


def test_runs_of_other_cases_cannot_be_chosen_from(validated: Path, tmp_path: Path) -> None:
    fold = f"{RUNS[1]}/fold_0"
    done = kitseg(validated, "choose", RUNS[0], fold, "-o", str(tmp_path / "x.yaml"))
    assert done.code == 2
    assert "weren't validated on the same cases" in done.text
    assert not (tmp_path / "x.yaml").exists()


# --- ensembles of models ---------------------------------------------------------------------------------------------


def test_several_models_are_averaged_like_their_folders(validated: Path) -> None:
    """Two runs of three folds and one, weights 2 and 1: the plain mean of the files within float16's rounding."""
    models, path = [RUNS[0], f"{RUNS[1]}/fold_1"], validated / "test/case_00000/imaging.nii.gz"
    for number, run in enumerate(models):
        assert kitseg(validated, "infer", f"--run={run}", "--data=test", "-o", f"p/{number}").code == 0
    opened = open_ensemble([validated / run for run in models], "cpu", [2, 1])
    found, _ = opened.predict_proba(read_image(path, "case_00000"))
    wholes = []
    for block in (found, *(read_block(validated / f"p/{number}", "case_00000") for number in range(2))):
        wholes.append(np.zeros((3, *block.geometry.shape)))
        wholes[-1][0] = 1
        wholes[-1][(slice(None), *block.box.slices)] = block.array
    assert np.allclose(wholes[0], (2 * wholes[1] + wholes[2]) / 3, atol=2**-10)
    both = [f"--model={run}" for run in models]
    done = kitseg(validated, "predict", "test", *both, "--weights=2,1", "-o", "p/labels")
    assert done.code == 0, done.text
    facts = json.loads((validated / "p/labels/case_00000.json").read_text())
    assert [(len(model["folds"]), model["weight"]) for model in facts["models"]] == [(3, 2), (1, 1)]
    bad = kitseg(validated, "predict", "test", *both, "--weights=1", "-o", "p/bad")
    assert bad.code == 2
    assert "2 model(s), but the weights" in bad.text
    assert kitseg(validated, "predict", "test", *both, "--weights=nan,1", "-o", "p/bad").code == 2


def test_a_mirrored_scan_mirrors_the_prediction(validated: Path, tmp_path: Path) -> None:
    """With --mirror the networks see both sides, so the mirrored scan has the mirrored labels."""
    source = nib.load(validated / "test/case_00000/imaging.nii.gz")
    for name, array in (("plain", source.dataobj), ("flipped", np.asarray(source.dataobj)[..., ::-1])):
        nib.save(nib.Nifti1Image(np.asarray(array), source.affine), tmp_path / f"{name}.nii.gz")
    for mode in ((), ("--mirror",)):
        done = kitseg(
            validated, "infer", f"--run={RUNS[0]}", f"--data={tmp_path}", "-o", str(tmp_path / f"p{len(mode)}"), *mode
        )
        assert done.code == 0, done.text
    apart = []
    for mode in range(2):
        plain, flipped = (read_block(tmp_path / f"p{mode}", name) for name in ("plain", "flipped"))
        a, b = (np.zeros((3, *plain.geometry.shape), np.float32) for _ in range(2))
        a[(slice(None), *plain.box.slices)], b[(slice(None), *flipped.box.slices)] = plain.array, flipped.array
        apart.append(np.abs(a - b[..., ::-1]).max())
    assert apart[1] < 1e-3 < apart[0]


def test_an_ensemble_file_there_and_back(tmp_path: Path) -> None:
    members = [Member(tmp_path / "runs/a", 2.0), Member(tmp_path / "runs/b", mirror=True)]
    steps = {"dark": {"_target_": "kitseg.postprocess.intensity.RemoveLowHuTumors", "threshold": 10}}
    write_ensemble(tmp_path / "x.yaml", members, steps, {})
    assert read_ensemble(tmp_path / "x.yaml") == (members, steps)
    assert yaml.safe_load((tmp_path / "x.yaml").read_text())["members"][0]["run"] == "runs/a"


@pytest.mark.parametrize(
    "content",
    [
        "schema: 1\nmembers: [{run: a, mirror: 'no'}]\npostprocess: {}",
        "schema: 1\nmembers: [{run: a, weight: .nan}]\npostprocess: {}",
        "schema: 1\nmembers: [{run: a}]\npostprocess: {d: 3}",
        "",
        "3",
        "schema: 2\nmembers: []\n",
        "schema: 1\nmembers: []\npostprocess: {}\n",
        "schema: 1\nmembers: [{}]\n",
        "{",
    ],
)
def test_a_file_that_is_no_ensemble(phantoms: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "x.yaml").write_text(content)
    done = kitseg(tmp_path, "predict", str(phantoms / "test"), "--model=x.yaml")
    assert done.code == 1
    assert "x.yaml is not an ensemble file" in done.text or "x.yaml: is not an ensemble file" in done.text


# --- the split -------------------------------------------------------------------------------------------------------


def test_a_split_by_command_holds_patients_together(validated: Path, tmp_path: Path) -> None:
    shutil.copytree(validated / "data", tmp_path / "data")
    with (tmp_path / "data/patients.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("case", "patient"), ("case_00000", "Ann"), ("case_00003", "Ann")])
    done = kitseg(tmp_path, "split", "--folds=3", "--jobs=1")
    assert done.code == 0, done.text
    split = read_split(tmp_path / "splits.json")
    assert split.patients == {"case_00000": ("Ann",), "case_00003": ("Ann",)}
    assert any({"case_00000", "case_00003"} <= set(fold.val) for fold in split.folds)
    assert kitseg(tmp_path, "split", "--folds=3").code == 2
    again = kitseg(tmp_path, "split", "--folds=3", "-o", "again.json")
    assert again.code == 0
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "splits.json").read_bytes()
    apart = {"schema": 1, "convention": "kits19", "folds": [{"train": ["case_00000"], "val": ["case_00003"]}]}
    (tmp_path / "apart.json").write_text(json.dumps(apart))
    refused = kitseg(tmp_path, "train", *quick("progressive"), "--split=apart.json", "--set=folds=5")
    assert refused.code == 1
    assert "patient Ann on two sides: case_00000, case_00003" in refused.text
    (tmp_path / "data/patients.csv").write_text("case,patient\ncase_00000,Ann\ncase_00000,Bea\n")
    two = kitseg(tmp_path, "split", "-o", "two.json")
    assert two.code == 1
    assert "gives no patient, or two, to case_00000" in two.text
    (tmp_path / "data/patients.csv").write_text("case,patient\n00000,Ann\ncase_00003,Ann\n")
    mistyped = kitseg(tmp_path, "split", "-o", "three.json")
    assert mistyped.code == 1
    assert "names 00000, which no data folder holds" in mistyped.text


def test_a_split_leaves_out_what_cannot_be_read(validated: Path, tmp_path: Path) -> None:
    shutil.copytree(validated / "data", tmp_path / "data")
    cases = sorted(folder.name for folder in (tmp_path / "data").glob("case_*"))
    broken = tmp_path / "data" / cases[1] / "imaging.nii.gz"
    broken.write_bytes(broken.read_bytes()[:-500])
    done = kitseg(tmp_path, "split", "--folds=3", "--jobs=1")
    assert done.code == 1
    assert f"{cases[1]}/imaging.nii.gz" in done.text
    assert "left out" in done.text
    assert read_split(tmp_path / "splits.json").cases == {*cases} - {cases[1]}


def test_a_split_leaves_no_case_out_for_a_fault_of_the_machine(tmp_path: Path) -> None:
    def out_of_memory(case: Case, scheme: Scheme) -> Traits:
        raise MemoryError

    with pytest.raises(KitsegError, match=r"case_00000: out of memory"):
        look_at(
            [Case("case_00000", tmp_path / "case_00000" / "imaging.nii.gz")], KITS19, 1, lambda: None, out_of_memory
        )


def test_a_fold_that_is_no_number(tmp_path: Path) -> None:
    done = kitseg(tmp_path, "train", "--fold=first")
    assert done.code == 2
    assert "--fold first" in done.text
