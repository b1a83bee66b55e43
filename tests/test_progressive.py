"""Progressive is trained in rounds, each from the best weights so far; a killed loop resumes."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import kitseg, kitseg_process, once
from method_runs import history, method_of, quick, read, run_of, stage_folder, train, working_folder
from test_going_on import kill_when

from kitseg.stages.model import build_model

pytestmark = pytest.mark.slow
#: Five training cases and one to validate; rounds long enough to be killed in.
ROUNDS = ("--epochs=2", "--set=folds=6", "--set=size.pixels=32", "--set=size.rounds=2", "--set=size.round_epochs=4")


@pytest.fixture(scope="session")
def scans(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Path:
    """A working folder with six labelled scans and no run."""
    return once(tmp_path_factory, "progressive-scans", lambda folder: check(working_folder(folder, phantoms, cases=6)))


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, scans: Path) -> Path:
    """A working folder with a training that nothing interrupted."""

    def make(folder: Path) -> None:
        (folder / "data").symlink_to(scans / "data")
        (folder / "printed.txt").write_text(train(folder, "progressive", *ROUNDS))

    return once(tmp_path_factory, "progressive-whole", make)


def check(folder: Path) -> None:
    assert len(list((folder / "data").iterdir())) == 6


def segment(folder: Path) -> Path:
    return stage_folder(folder, "progressive", "segment")


def scores_of(folder: Path) -> list[float]:
    """The best validation score of each round, by its history."""
    rounds = sorted(segment(folder).glob("round_*"))
    assert [path.name for path in rounds] == [f"round_{number}" for number in range(len(rounds))]
    return [max(row["val/score"] for row in history(path / "history.csv")) for path in rounds]


def weights(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


def check_the_loop(folder: Path, most: int) -> None:
    """Every round but the first and the last improved; the last one didn't, or was the last allowed."""
    scores = scores_of(folder)
    improved = [score > max(scores[:number]) for number, score in enumerate(scores) if number]
    assert 1 <= len(improved) <= most
    assert all(improved[:-1])
    assert len(improved) == most or not improved[-1]
    done = read(segment(folder) / "done.json")
    assert done["rounds"]["scores"] == pytest.approx(scores)
    best = scores.index(max(scores))
    assert done["rounds"]["best"] == best
    assert done["checkpoints"][0]["val_score"] == pytest.approx(scores[best])
    for row in done["checkpoints"]:
        assert re.match(rf"round_{best}/best/.*\.ckpt$", row["file"])
        assert (segment(folder) / row["file"]).exists()


def test_the_rounds_go_on_until_one_brings_nothing(whole: Path) -> None:
    check_the_loop(whole, most=2)


def test_a_round_starts_from_the_best_weights(scans: Path, tmp_path: Path) -> None:
    """Without a learning rate no weight moves: each round holds what the first began with."""
    (tmp_path / "data").symlink_to(scans / "data")
    still = "--set=stages.segment.module.optimizer.lr=0"
    train(tmp_path, "progressive", "--set=folds=6", "--set=size.pixels=32", still)
    names = dict(build_model(method_of(tmp_path, "progressive").stages["segment"]).named_parameters())
    first, *others = (weights(path / "last.ckpt") for path in sorted(segment(tmp_path).glob("round_*")))
    assert names
    assert others
    for other in others:
        assert all(torch.equal(first[f"model.{name}"], other[f"model.{name}"]) for name in names)
    check_the_loop(tmp_path, most=1)


def test_a_training_killed_in_a_round_ends_with_the_same_weights(whole: Path, scans: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(scans / "data")
    process = kitseg_process(tmp_path, "train", *quick("progressive"), *ROUNDS)
    kill_when((segment(tmp_path) / "round_1" / "last.ckpt").exists, process)
    assert (segment(tmp_path) / "round_0" / "done.json").exists()
    assert not (segment(tmp_path) / "round_1" / "done.json").exists()
    drawn = read(segment(tmp_path) / "round_1" / "places.json")

    printed = train(tmp_path, "progressive", *ROUNDS)
    assert "segment/round_1: resumes" in printed
    assert "segment/round_0: " not in printed
    assert read(segment(tmp_path) / "round_1" / "places.json") == drawn
    assert without_hashes(segment(tmp_path)) == without_hashes(segment(whole))
    for number in range(len(scores_of(whole))):
        one, other = (segment(folder) / f"round_{number}" for folder in (whole, tmp_path))
        assert (one / "history.csv").read_text() == (other / "history.csv").read_text()
        before, after = weights(one / "last.ckpt"), weights(other / "last.ckpt")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert not list(tmp_path.rglob(".partial*"))


def test_a_finished_loop_is_left_alone(whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (whole / run_of("progressive")).rglob("*") if path.is_file()}
    again = kitseg(whole, "train", *quick("progressive"), *ROUNDS)
    assert again.code == 0, again.text
    assert "segment: trained already" in again.text
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_two_processes_go_on_with_the_rounds(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in [key for key in os.environ if key.startswith("PYTEST")]:
        monkeypatch.delenv(key)
    shutil.copytree(whole, tmp_path, symlinks=True, dirs_exist_ok=True)
    (segment(tmp_path) / "done.json").unlink()
    last = sorted(segment(tmp_path).glob("round_*"))[-1]
    shutil.rmtree(last)
    command = ("train", *quick("progressive"), *ROUNDS, "--device=cpu", "--processes=2")
    done = kitseg(tmp_path, *command)
    assert done.code == 0, done.text
    assert "2 × CPU" in done.text
    assert "segment/round_0: " not in done.text
    assert done.text.count(f"segment/{last.name}: starts") == 1
    check_the_loop(tmp_path, most=2)
    assert last.name != "round_0"
    one, other = (read(segment(folder) / last.name / "places.json") for folder in (whole, tmp_path))
    assert one == other
    names = ["best", "curves.png", "done.json", "history.csv", "last.ckpt", "places.json", "tensorboard"]
    for path in segment(tmp_path).glob("round_*"):
        first = path.name == "round_0"  # later ones record the weights that they start from
        assert sorted({file.name for file in path.iterdir()} - {"initial.json"}) == names
        assert (path / "initial.json").exists() != first
        assert len(history(path / "history.csv")) == (2 if first else 4)


def without_hashes(folder: Path) -> Any:
    """What ``done.json`` says, but for the hashes of files that hold the same weights."""
    done = read(folder / "done.json")
    return {**done, "checkpoints": [{**row, "sha256": None} for row in done["checkpoints"]]}
