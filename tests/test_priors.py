"""Priors on the command line: what they would do to true labels, and switching them off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import kitseg
from nifti_files import IPL, save
from numpy.typing import NDArray

from kitseg import config, trust
from kitseg.labels import KITS19
from kitseg.models.postprocessing import build_steps
from kitseg.postprocess.kidneys import KeepKidneys
from kitseg.runtime.files import file_digest
from kitseg.splits import Fold, Split, write_split
from kitseg.types import Box, Probabilities
from kitseg.volumes import blocks
from kitseg.volumes.nifti import read_image, read_labels

VOXEL_ML = 2.5 * 0.7 * 0.8 / 1000


# --- fit-priors ------------------------------------------------------------------------------------------------------


def labels_with(*bricks: tuple[int, int, int], apart: bool = False) -> NDArray[np.uint8]:
    """A kidney with tumors in it, bricks of these edges; or apart from it, 21 mm away."""
    labels = np.zeros((20, 60, 60), np.uint8)
    labels[5:15, :25, 5:50] = 1
    at = 2
    for z, y, x in bricks:
        row = 54 if apart else at
        labels[8 : 8 + z, row : row + y, 10 : 10 + x] = 2
        at += y + 2
    return labels


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    """Label maps whose tumors have ratios 24/15, 63/15 and 24/8, beside one of them a CT."""
    maps = {
        "case_00000": labels_with((3, 4, 5)),
        "case_00001": labels_with((2, 4, 8), (1, 2, 3)),
        "case_00002": labels_with((5, 3, 1), apart=True),
        "case_00003": labels_with(),
    }
    for case, labels in maps.items():
        (tmp_path / "data" / case).mkdir(parents=True)
        save(tmp_path / "data" / case / "segmentation.nii.gz", labels, IPL)
    save(tmp_path / "data/case_00000/imaging.nii.gz", np.where(maps["case_00000"] == 2, 5, 90).astype(np.int16), IPL)
    return tmp_path


def fitted(cwd: Path, *options: str, code: int = 0) -> tuple[dict[str, Any], str]:
    result = kitseg(cwd, "fit-priors", "--data=data", "--jobs=1", "--json=priors.json", *options)
    assert result.code == code, result.text
    return json.loads((cwd / "priors.json").read_text()), result.text


def test_the_range_and_the_costs_by_hand(truth: Path) -> None:
    """Of 1.6, 3 and 4.2 the 5th and 95th percentile lie a tenth of the way from the ends; 6 voxels don't count."""
    found, text = fitted(truth)
    assert (found["low"], found["high"], found["tumors"]) == (1.74, 4.08, 3)
    assert "--set postprocess.shape.low=1.740 --set postprocess.shape.high=4.080" in text
    ratios = [tumor["ratio"] for case in found["cases"].values() for tumor in case]
    assert ratios == pytest.approx([24 / 15, 63 / 15, 8 / 3, 24 / 8])
    costs = {cost["prior"]: (cost["lost_tumors"], cost["lost_cases"], cost["lost_ml"]) for cost in found["priors"]}
    assert costs == {
        "shape": (3, 2, pytest.approx((64 + 6 + 15) * VOXEL_ML)),
        "shape, fitted": (3, 2, pytest.approx((60 + 64 + 6) * VOXEL_ML)),
        "kidneys": (1, 1, pytest.approx(15 * VOXEL_ML)),
        "overlap": (0, 0, 0),
        "distance": (1, 1, pytest.approx(15 * VOXEL_ML)),
        "dark": (1, 1, pytest.approx(60 * VOXEL_ML)),
    }
    tried = {cost["prior"]: (cost["tumors"], cost["cases"]) for cost in found["priors"]}
    assert tried.pop("dark") == (1, 1)
    assert set(tried.values()) == {(4, 3)}
    assert found["cases"]["case_00003"] == []
    rows = {line.split()[0]: line for line in text.splitlines() if " of " in line}
    assert "1 of 4" in rows["distance"]
    assert "1 of 3" in rows["distance"]
    assert "max_mm 10" in rows["distance"]
    assert "4 of 4 cases read" in text


def write_fold(folder: Path, *train: str) -> None:
    split = Split((Fold(train, ("case_00002",)),), KITS19)
    write_split(split, folder / "splits.json")


def test_only_the_training_cases_of_a_fold(truth: Path) -> None:
    write_fold(truth, "case_00000", "case_00001")
    found, _ = fitted(truth, "--split=splits.json", "--fold=0")
    assert (found["low"], found["high"]) == (1.73, 4.07)
    assert set(found["cases"]) == {"case_00000", "case_00001"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--fold=0",), "--split and --fold"),
        (("--split=splits.json",), "--split and --fold"),
        (("--split=splits.json", "--fold=1"), "there is no fold 1"),
        (("--split=splits.json", "--fold=0"), "has no labels of case_00009"),
        (("--labels=kits21",), "unknown labels 'kits21'"),
    ],
)
def test_calls_that_cannot_be_meant(truth: Path, options: tuple[str, ...], words: str) -> None:
    write_fold(truth, "case_00000", "case_00009")
    result = kitseg(truth, "fit-priors", "--data=data", "--jobs=1", *options)
    assert result.code == 2
    assert words in result.text


def test_a_broken_file_and_a_ct_on_another_grid_do_not_stop_the_others(truth: Path) -> None:
    broken = truth / "data/case_00002/segmentation.nii.gz"
    broken.write_bytes(broken.read_bytes()[:200])
    save(truth / "data/case_00003/imaging.nii.gz", np.zeros((20, 60, 61), np.int16), IPL)
    found, text = fitted(truth, code=1)
    assert (found["low"], found["high"], list(found["failed"])) == (1.73, 4.07, ["case_00002", "case_00003"])
    assert str(broken) in text
    assert "case_00003/segmentation.nii.gz: lies on another grid than its scan" in found["failed"]["case_00003"]
    assert "2 of 4 cases read" in text


def test_cysts_are_kidney_where_the_labels_have_them(truth: Path) -> None:
    path = truth / "data/case_00002/segmentation.nii.gz"
    labels = labels_with((3, 4, 5))
    labels[labels == 1] = 3
    save(path, labels, IPL)
    assert "case_00002" in fitted(truth, code=1)[0]["failed"]
    found, _ = fitted(truth, "--labels=kits23")
    assert found["cases"]["case_00002"][0]["stays"] == {"kidneys": True, "overlap": True, "distance": True}


def test_flat_label_maps_have_no_ct_but_in_a_folder_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    save(tmp_path / "data/patient.nii.gz", labels_with((3, 4, 5)), IPL)
    found, text = fitted(tmp_path)
    assert (found["low"], found["high"]) == (1.6, 1.6)
    assert "dark" not in {cost["prior"] for cost in found["priors"]}
    assert "dark: " in text
    (tmp_path / "masks").mkdir()
    (tmp_path / "data/patient.nii.gz").rename(tmp_path / "masks/patient.nii.gz")
    save(tmp_path / "data/patient.nii.gz", np.full((20, 60, 60), 90, np.int16), IPL)
    assert "dark" in {cost["prior"] for cost in fitted(tmp_path, "--masks=masks")[0]["priors"]}
    save(tmp_path / "data/patient.nii.gz", labels_with(), IPL)
    result = kitseg(tmp_path, "fit-priors", "--data=data", "--jobs=1")
    assert result.code == 1
    assert "no shape can be fitted" in result.text


# --- a method's priors -----------------------------------------------------------------------------------------------

KIDNEYS = {"_target_": "kitseg.postprocess.kidneys.KeepKidneys", "most": 1}
DARK = {"_target_": "kitseg.postprocess.intensity.RemoveLowHuTumors"}


CHANNELS = ("background", "kidney", "tumor")


def write_block(folder: Path, array: NDArray[np.float16], box: Box) -> None:
    """Write probabilities of the scan in the folder into ``p``."""
    scan = folder / "case_00000.nii.gz"
    volume = read_image(scan, "case_00000")
    found = Probabilities(array, CHANNELS, box, volume.geometry, volume.native, volume.case_id)
    blocks.write_block(folder / "p", found, scan, file_digest(scan))


@pytest.fixture
def inferred(tmp_path: Path) -> Path:
    """A folder ``p`` of probabilities: a kidney of 4 voxels, beside it a dark tumor, and one voxel elsewhere."""
    save(tmp_path / "case_00000.nii.gz", np.zeros((3, 4, 12), np.int16), IPL)
    array = np.zeros((3, 1, 1, 9), np.float16)
    array[0] = 1
    array[:, 0, 0, 1:5], array[:, 0, 0, 5], array[:, 0, 0, 8] = [[0], [1], [0]], [0, 0, 1], [0, 1, 0]
    write_block(tmp_path, array, Box((2, 1, 3), (3, 2, 12)))
    steps = {"kidneys": KIDNEYS, "shape": None, "dark": DARK}
    about = {"method": "two-phase", "stage": None, "model": {}, "versions": {}}
    blocks.claim_manifest(tmp_path / "p", {"channels": list(CHANNELS), **about, "postprocess": steps})
    return tmp_path


@pytest.mark.parametrize(
    ("without", "row"),
    [
        ((), [0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0]),
        (("dark",), [0, 0, 0, 0, 1, 1, 1, 1, 2, 0, 0, 0]),
        (("kidneys", "shape"), [0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 1]),
        (("all",), [0, 0, 0, 0, 1, 1, 1, 1, 2, 0, 0, 1]),
    ],
)
def test_priors_can_be_left_out(inferred: Path, without: tuple[str, ...], row: list[int]) -> None:
    result = kitseg(inferred, "postprocess", "p", "-o", "out", *(f"--without={name}" for name in without))
    assert result.code == 0, result.text
    labels = read_labels(inferred / "out/case_00000.nii.gz", "case_00000").array
    assert labels[2, 1].tolist() == row
    assert labels.sum() == sum(row)


def test_a_prior_that_is_not_there(inferred: Path) -> None:
    result = kitseg(inferred, "postprocess", "p", "-o", "out", "--without", "dark", "--without", "dork")
    assert result.code == 2
    assert "--without dork" in result.text
    assert "kidneys, shape, dark, all" in result.text
    assert not (inferred / "out").exists()


def test_nothing_found_is_all_background(inferred: Path) -> None:
    write_block(inferred, np.zeros((3, 0, 0, 0), np.float16), Box((0, 0, 0), (0, 0, 0)))
    assert kitseg(inferred, "postprocess", "p", "-o", "out").code == 0
    assert not read_labels(inferred / "out/case_00000.nii.gz", "case_00000").array.any()


def test_a_priors_settings_on_the_command_line() -> None:
    run = config.compose("two-phase", "paper", ["postprocess.dark=null", "postprocess.kidneys.min_ml=7"])
    assert build_steps(config.method_of(run).postprocess) == [KeepKidneys(min_ml=7)]


def test_a_run_keeps_the_order_of_its_priors(tmp_path: Path) -> None:
    """Read back from its file, a method cleans in the order in which it was composed."""
    (tmp_path / "config.yaml").write_text(trust.dump(config.compose("two-phase", "paper")), encoding="utf-8")
    assert list(config.method_of(config.read(tmp_path / "config.yaml")).postprocess) == ["kidneys", "dark"]
