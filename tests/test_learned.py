"""Scans that networks learned from: a fold's networks for its held-out cases, and marks wherever a result goes."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import kitseg
from dicom_files import write_series
from method_runs import untrained
from nifti_files import IPL, save

from kitseg.labels import KITS19
from kitseg.runtime.files import file_digest, write_json
from kitseg.splits import Fold, Split, write_split
from kitseg.training.initial import learned_before
from kitseg.types import Case, Grid
from kitseg.volumes.nifti import read_image
from kitseg.volumes.scan import hu_digest
from kitseg.volumes.store import CaseFiles, open_case, store_case

MODEL = ("--model=runs/r", "--device=cpu", "--engine=torch")


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Scans a, b and c with references, and a run of two folds: 0 learned from b and c, 1 from a and c."""
    hashes = {}
    for number, name in enumerate("abc"):
        scan = np.full((12, 24, 24), -1000, np.int16)
        scan[:, 3:21, 3:21] = 40 + number
        (tmp_path / "data" / name).mkdir(parents=True)
        file = save(tmp_path / "data" / name / "imaging.nii.gz", scan, IPL)
        hashes[name] = file_digest(file), hu_digest(read_image(file, name))
        save(tmp_path / "data" / name / "segmentation.nii.gz", (scan > 0).astype(np.uint8), IPL)
    run = untrained(tmp_path / "runs" / "r")
    shutil.copytree(run / "fold_0", run / "fold_1")
    folds = {"a": [1], "b": [0], "c": [0, 1]}
    learned = {sha256: folds[name] for name, pair in hashes.items() for sha256 in pair}
    facts = {"kitseg": "0.1.0", "phantom": False, "cases": [*"abc"], "learned": learned, "hu_known": True}
    write_json(run / "run.json", 1, facts)
    split = Split((Fold(("b", "c"), ("a",)), Fold(("a", "c"), ("b",))), KITS19)
    for path in (run / "splits.json", tmp_path / "splits.json"):
        write_split(split, path)
    return tmp_path


def run(cwd: Path, *arguments: str) -> str:
    done = kitseg(cwd, *arguments)
    assert done.code == 0, done.text
    return done.text


def records(folder: Path) -> dict[str, Any]:
    """What the networks of each prediction learned from, by its record."""
    return {path.stem: json.loads(path.read_text())["learned_from"] for path in folder.glob("*.json")}


def test_held_out_cases_are_predicted_by_the_networks_of_their_fold(here: Path) -> None:
    for fold, case in enumerate("ab"):
        run(here, "predict", "data", *MODEL, "--split=splits.json", f"--fold={fold}", "-o", "out")
        assert json.loads((here / "out" / f"{case}.json").read_text())["models"][0]["folds"] == [fold]
    assert records(here / "out") == {"a": [], "b": []}
    assert "learned" not in run(here, "evaluate", "out", "data", "--jobs=1")
    shutil.rmtree(here / "runs" / "r" / "fold_1")
    lacking = kitseg(here, "predict", "data", *MODEL, "--split=splits.json", "--fold=1")
    assert lacking.code == 2
    assert "runs/r has no fold 1" in lacking.text


def test_a_case_that_networks_learned_from_is_marked_wherever_it_goes(here: Path) -> None:
    text = run(here, "predict", "data", *MODEL, "-o", "out")
    assert "its networks learned from this scan (runs/r, fold 1)" in text
    assert records(here / "out") == {"a": ["runs/r, fold 1"], "b": ["runs/r, fold 0"], "c": ["runs/r, fold 0, 1"]}
    text = run(here, "evaluate", "out", "data", "--jobs=1", "--json=scores.json")
    sentence = (
        "the networks learned from the scans of 3 of 3 cases (a, b, c): these scores are no measure for new scans"
    )
    assert sentence in text
    written = json.loads((here / "scores.json").read_text())
    assert sentence in written["notes"]
    assert written["learned_from"]["a"] == ["runs/r, fold 1"]
    run(here, "report", "out", "data", "--scores=scores.json", "--jobs=1")
    assert "Its networks learned from this scan (runs/r, fold 1)" in (here / "report" / "a.html").read_text()
    assert sentence in (here / "report" / "index.html").read_text()


def test_marks_pass_through_probabilities_and_their_mean(here: Path) -> None:
    for fold in ("0", "1"):
        run(here, "infer", f"--run=runs/r/fold_{fold}", "--data=data", "--engine=torch", "-o", f"p{fold}")
    again = run(here, "infer", "--run=runs/r/fold_1", "--data=data", "--engine=torch", "-o", "p1")
    assert again.count("unchanged") == 3
    run(here, "ensemble", "p0", "p1", "-o", "mean")
    run(here, "postprocess", "mean", "-o", "out")
    assert records(here / "out")["a"] == ["runs/r, fold 1"]
    assert records(here / "out")["c"] == ["runs/r, fold 0", "runs/r, fold 1"]


def test_a_bundle_knows_its_training_scans_elsewhere_under_other_names(here: Path, tmp_path: Path) -> None:
    run(here, "export", "runs/r", "-o", "m.kitseg")
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(here / "data" / "a" / "imaging.nii.gz", tmp_path / "elsewhere" / "x.nii.gz")
    shutil.rmtree(here / "runs")
    given = ("--model=m.kitseg", "--device=cpu", "--engine=torch")
    run(here, "predict", "elsewhere", *given, "-o", "out")
    assert records(here / "out") == {"x": ["r.kitseg, fold 1"]}


@pytest.mark.parametrize("form", ["zipped again", "nii", "mha", "DICOM"])
def test_a_training_scan_is_known_in_any_file(here: Path, form: str) -> None:
    scan, other = here / "data" / "a" / "imaging.nii.gz", here / "other"
    other.mkdir()
    if form == "zipped again":
        (other / "x.nii.gz").write_bytes(gzip.compress(gzip.decompress(scan.read_bytes()), 1))
    elif form == "nii":
        (other / "x.nii").write_bytes(gzip.decompress(scan.read_bytes()))
    elif form == "mha":
        sitk.WriteImage(sitk.ReadImage(scan), other / "x.mha")
    else:
        image = nibabel.load(scan)
        write_series(other / "x", np.asarray(image.dataobj), image.affine)
    run(here, "predict", "other", *MODEL, "-o", "out")
    assert list(records(here / "out").values()) == [["runs/r, fold 1"]]
    if form != "DICOM":
        run(here, "infer", "--run=runs/r", "--data=other", "--engine=torch", "-o", "p")
        run(here, "postprocess", "p", "-o", "labels")
        assert records(here / "labels") == {"x": ["runs/r, fold 1"]}


def test_a_scan_in_another_file_may_be_one_that_an_older_run_learned_from(here: Path) -> None:
    file = here / "runs" / "r" / "run.json"
    info = json.loads(file.read_text())
    file.write_text(json.dumps({**info, "learned": dict([*info["learned"].items()][::2]), "hu_known": False}))
    scan = here / "data" / "a" / "imaging.nii.gz"
    (here / "data" / "x.nii").write_bytes(gzip.decompress(scan.read_bytes()))
    text = run(here, "predict", "data", "--model=runs/r/fold_0", *MODEL[1:], "-o", "out")
    assert "marked in the files that it learned from only" in text
    assert records(here / "out") == {"a": [], "b": ["runs/r, fold 0"], "c": ["runs/r, fold 0"], "x": None}


def test_what_initial_weights_learned_from_counts_for_the_folds_that_they_start(here: Path) -> None:
    a, b, c = (file_digest(here / "data" / name / "imaging.nii.gz") for name in "abc")
    whole = learned_before(str(here / "runs" / "r"), 3)
    assert ([whole.learned[one] for one in (a, b, c)], whole.hu_known) == ([(1,), (0, 2), (0, 1, 2)], True)
    part = learned_before(str(here / "runs" / "r" / "fold_1"), 2)
    assert [part.learned[one] for one in (a, b, c)] == [(0, 1), (), (0, 1)]
    assert learned_before(str(here / "runs" / "r" / "fold_1" / "kidneys" / "best" / "3.ckpt"), 2) is None
    one = shutil.copytree(here / "runs" / "r", here / "runs" / "one")  # fold 1 isn't trained: fold 0 starts them all
    shutil.rmtree(one / "fold_1")
    alone = learned_before(str(one), 2)
    shutil.rmtree(one)
    assert [alone.learned[one] for one in (a, b, c)] == [(), (0, 1), (0, 1)]


def test_a_case_that_an_earlier_version_stored_gets_the_hash_of_its_hu(here: Path) -> None:
    folder, scan = here / "stored", here / "data" / "a" / "imaging.nii.gz"
    files = CaseFiles(Case("a", scan), KITS19)
    assert store_case(files, folder, Grid())
    meta = json.loads((folder / "meta.json").read_text())
    hashes = file_digest(scan), meta.pop("hu_sha256")
    (folder / "meta.json").write_text(json.dumps(meta))
    assert open_case(folder).hashes == (hashes[0], "")
    assert not store_case(files, folder, Grid()), "nothing is preprocessed again"
    assert open_case(folder).hashes == hashes == (file_digest(scan), hu_digest(read_image(scan, "a")))


def test_of_an_older_run_nothing_is_claimed(here: Path) -> None:
    write_json(here / "runs" / "r" / "run.json", 1, {"kitseg": "0.1.0", "phantom": False})
    assert "scans that it learned from are not marked" in run(here, "predict", "data/a", *MODEL, "-o", "out")
    assert records(here / "out") == {"a": None}
