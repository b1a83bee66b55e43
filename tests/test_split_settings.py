"""A split file that is there decides: settings that contradict it, and stages that need more of it, are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import SMALLEST, kitseg

from kitseg import config, trust
from kitseg.training.split import USUAL
from kitseg.types import Geometry
from kitseg.volumes.nifti import write_image, write_labels

TRAIN, INNER = ["a", "a2", "b"], [{"train": ["b"], "val": ["a", "a2"]}, {"train": ["a", "a2"], "val": ["b"]}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with a split of two folds and a test case; patient a was scanned twice."""
    write(tmp_path, {"train": TRAIN, "val": ["c"], "inner": INNER}, {"train": ["c"], "val": TRAIN})
    return tmp_path


def write(folder: Path, *folds: dict[str, Any]) -> None:
    split = {"schema": 1, "convention": "kits19", "folds": folds, "test": ["d"], "patients": {"a": ["a"], "a2": ["a"]}}
    (folder / "splits.json").write_text(json.dumps(split))


def refused(folder: Path, *options: str) -> str:
    """What a training is refused with, before any case is looked for; empty where it is not."""
    done = kitseg(folder, "train", "--dry-run", *options)
    text = " ".join(done.text.split())
    return "" if "data" in text.split(":")[0] else text


@pytest.mark.parametrize(
    ("setting", "there"), [("folds=3", "folds=2"), ("test_cases=2", "test_cases=1"), ("nested_folds=4", "")]
)
def test_settings_that_the_split_contradicts(folder: Path, setting: str, there: str) -> None:
    """Of four nested folds asked for there are two, because there are no more patients to train with."""
    text = refused(folder, "--size=tiny", f"--set={setting}")
    assert (f"splits.json has {there}, not {setting[-1]}" in text) is bool(there), text
    if not there:
        write(folder, {"train": TRAIN, "val": ["c"], "inner": INNER[:1]})
        assert "splits.json has nested_folds=1, not 4" in refused(folder, "--size=tiny", f"--set={setting}")


@pytest.mark.parametrize("options", [(), ("--set=folds=2", "--set=test_cases=1"), ("--set=nested_folds=2",)])
def test_settings_that_the_split_was_written_with(folder: Path, options: tuple[str, ...]) -> None:
    assert refused(folder, "--size=tiny", *options) == ""


def test_a_run_that_began_with_a_setting_that_had_no_effect_resumes(folder: Path) -> None:
    run = folder / "runs/two-phase-tiny/config.yaml"
    run.parent.mkdir(parents=True)
    run.write_text(trust.dump(config.compose("two-phase", "tiny", ["test_cases=2"])))
    assert refused(folder, "--size=tiny", "--set=test_cases=2") == ""
    assert "has test_cases=1, not 2" in refused(folder, "--size=tiny", "--set=test_cases=2", "--restart")
    assert "has test_cases=1, not 3" in refused(folder, "--size=tiny", "--set=test_cases=3")


def test_what_is_usual_is_what_the_configuration_states() -> None:
    stated = yaml.safe_load((Path(__file__).parents[1] / "conf/kitseg.yaml").read_text())
    assert {key: stated[key] for key in USUAL} == USUAL


def test_predictions_of_nested_folds_that_are_not_there(folder: Path) -> None:
    """Without them the second stage would learn from the labels, in silence."""
    train = ("--method=two-phase", "--size=paper")
    assert refused(folder, *train) == ""
    words = "stage fine learns from predictions of nested folds, but none holds out c."
    assert words in refused(folder, *train, "--fold=1")
    assert refused(folder, *train, "--fold=1", "--set=stages.fine.guide=labels") == ""
    write(folder, {"train": TRAIN, "val": ["c"], "inner": INNER[:1]})
    assert "none holds out b." in refused(folder, *train)
    begun = folder / "runs/two-phase-paper/fold_0/fine/places.json"
    begun.parent.mkdir(parents=True)
    begun.touch()
    assert refused(folder, *train) == "", "a training that has begun goes on"
    assert "none holds out b." in refused(folder, *train, "--restart")
    assert begun.exists()


def test_with_all_folds_the_nested_ones_of_each_are_looked_at_before_the_first_is_trained(folder: Path) -> None:
    train = ("--method=two-phase", "--size=paper", "--fold=all")
    assert "none holds out c." in refused(folder, *train)
    inner = [{"train": ["c"], "val": ["e"]}, {"train": ["e"], "val": ["c"]}]
    write(folder, {"train": TRAIN, "val": ["c"], "inner": INNER}, {"train": ["c", "e"], "val": TRAIN, "inner": inner})
    assert refused(folder, *train) == ""


def test_copies_that_the_split_does_not_have_are_named(tmp_path: Path) -> None:
    """`train --data data --data augmented` without the split that `augment` wrote learned from none of them."""
    native = Geometry((4, 16, 16), np.diag([-3.0, -3, -3, 1])[[2, 1, 0, 3]])
    label = np.zeros(native.shape, np.uint8)
    label[1:3, 4:12, 4:12] = 1
    for name in ("data/a", "data/b", "data/new", "augmented/a_from_b"):
        write_image(tmp_path / name / "imaging.nii.gz", 100 * label.astype(np.int16) - 20, native)
        write_labels(tmp_path / name / "segmentation.nii.gz", label, native)
    origin = {"schema": 1, "patients": ["a", "b"], "sources": ["a", "b"]}
    (tmp_path / "augmented/a_from_b/origin.json").write_text(json.dumps(origin))
    write(tmp_path, {"train": ["a"], "val": ["b"]}, {"train": ["b"], "val": ["a"]})
    both = ("--data=data", "--data=augmented", "--stage=coarse")
    done = kitseg(tmp_path, "train", "--dry-run", *SMALLEST, *both)
    text = " ".join(done.text.split())
    assert done.code == 0, text
    assert "1 labelled cases are not in splits.json: new; train with a new --split" in text
    assert "1 registered copies are not in splits.json: a_from_b; `kitseg augment` wrote a split with them" in text
