"""Which weights the trainings of a run begin with: those of one model, or random ones."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import kitseg
from method_runs import untrained

from kitseg import config, trust
from kitseg.config import Config
from kitseg.errors import UsageError
from kitseg.models.run_folder import BEGINNING, Beginning, Run, StageFolder, move_aside
from kitseg.models.weights import read_weights
from kitseg.runtime.device import Machine
from kitseg.runtime.files import file_digest
from kitseg.splits import Fold, Split
from kitseg.stages.model import build_model
from kitseg.training.initial import find_initial
from kitseg.training.plan import Plan, Unit
from kitseg.training.train import check_initial
from kitseg.training.trainer import settings_of

MODELS = ("theirs.ckpt", "other.ckpt")
PAGE = Path(__file__).parents[1] / "docs/how-to/fine-tune.md"


@cache
def made() -> Config:
    return config.compose("two-phase", "tiny")


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Fold 0 of a run of two-phase in which nothing has begun, and two checkpoints to start from."""
    monkeypatch.chdir(tmp_path)
    for name in MODELS:
        Path(name).write_text(name)
    split = Split((Fold(("a",), ("b",)), Fold(("b",), ("a",))), config.stated_scheme(()))
    run, machine = Run(tmp_path / "runs/mine"), Machine("cpu")
    return Plan(made(), config.method_of(made()), settings_of(made()), run, split, 0, tmp_path, machine)


def call(plan: Plan, model: str | None, stage: str = "", fold: int = 0) -> str:
    """What a training of a stage, or of all, in this call is refused with; empty where it may begin."""
    units = [Unit(name) for name in plan.method.stages if stage in ("", name)]
    try:
        initial = dict.fromkeys(plan.method.stages, Path(model)) if model else {}
        check_initial(replace(plan, initial=model, fold=fold), units, initial)
    except UsageError as error:
        return str(error)
    return ""


def test_a_dry_run_refuses_what_the_run_refuses(phantoms: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(phantoms / "data")
    for name in ("runs/dual-unet-tiny", "other"):
        (tmp_path / name).mkdir(parents=True)
        untrained(tmp_path / name)
    asked = ("train", "--method=dual-unet", "--size=tiny", "--set=size.width=4", "--device=cpu", "--dry-run")
    for option, words in (
        ("--seed=7", "was made with another configuration"),
        ("--init-from=other", "began with random weights, not with other"),
    ):
        refused = kitseg(tmp_path, *asked, option)
        assert (refused.code, words in " ".join(refused.text.split())) == (2, True), refused.text


def begin(folder: StageFolder, model: str | None) -> None:
    folder.path.mkdir(parents=True)
    folder.last.touch()
    if model:
        BEGINNING.write(folder.initial, Beginning(model, file_digest(Path(model))))


def test_a_run_that_began_with_a_model_is_trained_with_it(plan: Plan) -> None:
    assert call(plan, "theirs.ckpt") == ""
    assert BEGINNING.read(plan.run.initial).checkpoint == "theirs.ckpt"
    begin(plan.run.stage(0, "coarse"), "theirs.ckpt")
    assert call(plan, "theirs.ckpt") == ""
    for stage, fold in (("", 0), ("coarse", 0), ("fine", 0), ("coarse", 1)):
        assert "began with the weights of theirs.ckpt, not of other.ckpt" in call(plan, "other.ckpt", stage, fold)
    Path("moved.ckpt").write_bytes(Path("theirs.ckpt").read_bytes())
    assert call(plan, "moved.ckpt", fold=1) == "", "the same weights elsewhere"
    assert "began with the weights of theirs.ckpt. Give it as --init-from again" in call(plan, None)  # fine is to begin
    assert "began with the weights of theirs.ckpt" in call(plan, None, "coarse", fold=1)
    assert call(plan, None, "coarse") == ""  # it resumes from its own weights


def test_a_run_that_began_with_random_weights_takes_no_model(plan: Plan) -> None:
    assert call(plan, None) == ""
    begin(plan.run.stage(0, "coarse"), None)
    assert call(plan, None) == ""
    for fold, stage in ((0, "coarse"), (0, "fine"), (1, "coarse")):
        assert "began with random weights, not with theirs.ckpt" in call(plan, "theirs.ckpt", stage, fold)


@pytest.mark.parametrize("model", [None, "other.ckpt"])
def test_a_restarted_fold_may_begin_with_another_model(plan: Plan, model: str | None) -> None:
    assert call(plan, "theirs.ckpt") == ""
    begin(plan.run.stage(0, "coarse"), "theirs.ckpt")
    move_aside(plan.run.fold(0))
    assert call(plan, model) == ""
    assert plan.run.initial.exists() == bool(model)
    begin(plan.run.stage(0, "coarse"), model)
    assert [path.parent for path in plan.run.beginnings()] == ([plan.run.stage(0, "coarse").path] if model else [])


def test_what_a_call_left_that_ended_before_it_began(plan: Plan) -> None:
    """The record of the model is written before the first checkpoint."""
    assert call(plan, "theirs.ckpt") == ""
    folder = plan.run.stage(0, "coarse")
    begin(folder, "theirs.ckpt")
    folder.last.unlink()
    assert call(plan, None) == ""
    assert not plan.run.initial.exists()
    assert not folder.initial.exists()


def test_a_run_of_an_earlier_version_has_records_of_its_trainings_alone(plan: Plan) -> None:
    begin(plan.run.stage(0, "coarse"), "theirs.ckpt")
    assert call(plan, "theirs.ckpt") == ""
    assert "began with the weights of theirs.ckpt" in call(plan, None)


def test_later_rounds_begin_with_the_runs_own_weights(plan: Plan) -> None:
    stage = plan.run.stage(0, "coarse")
    begin(stage.round(0), None)
    begin(stage.round(1), "other.ckpt")  # of round 0
    assert plan.run.beginnings() == []
    assert call(plan, None) == ""
    begin(stage.inner(0).round(0), "theirs.ckpt")
    assert plan.run.beginnings() == [stage.inner(0).round(0).initial]


def test_the_methods_page_states_what_each_stage_began_with(plan: Plan, tmp_path: Path) -> None:
    begin(plan.run.stage(0, "fine").round(1), "other.ckpt")  # no other model: of its own round 0
    plan.run.config.write_text(trust.dump(plan.config))
    for model, words in (
        (None, "from random weights (seed 0): coarse, fine."),
        ("theirs.ckpt", "random weights (seed 0): fine; from weights of another model (initial.json): coarse."),
    ):
        begin(plan.run.stage(0 if model else 1, "coarse"), model)
        done = kitseg(tmp_path, "report", "runs/mine")
        assert (done.code, words in (tmp_path / "report/methods.html").read_text()) == (0, True), done.text


def test_the_built_in_network_fits_the_training_that_the_page_states() -> None:
    command = next(text for text in re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL) if "builtin" in text)
    words = shlex.split(command.replace("\\\n", " "))
    size, labels = (words[words.index(option) + 1] for option in ("--size", "--labels"))
    method = config.method_of(config.compose("resenc", size, [f"labels={labels}"]))
    found = find_initial("builtin", method, 0)
    assert (list(found.stages), found.note) == (["kidneys", "masses"], "")
    for name, path in found.stages.items():
        weights = read_weights(path, torch.device("cpu"))
        with torch.device("meta"):
            own = build_model(method.stages[name]).state_dict()
        assert {key: value.shape for key, value in weights.items()} == {key: value.shape for key, value in own.items()}
    theirs = config.method_of(config.read(found.stages["masses"].parents[3] / "config.yaml")).stages
    for name, stage in method.stages.items():
        assert (stage.parts["region"], stage.parts["sampler"]) == (
            theirs[name].parts["region"],
            theirs[name].parts["sampler"],
        )
    plain = config.method_of(config.compose("resenc", "small", [f"labels={labels}"]))
    assert "kidneys and masses learned on another grid" in find_initial("builtin", plain, 0).note
