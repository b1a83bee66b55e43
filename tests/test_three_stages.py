"""Stages that build on a stage that builds on another: which networks predict what a stage learns from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kitseg import config
from kitseg.method import StageSpec
from kitseg.models.run_folder import STAGE_INPUTS, Run, StageFolder
from kitseg.runtime.device import Machine
from kitseg.splits import Fold, FoldPart, Split
from kitseg.training import stage_inputs
from kitseg.training.plan import Plan, Unit, units
from kitseg.training.stage_inputs import prepare
from kitseg.training.trainer import settings_of
from kitseg.types import Geometry

INNER = (FoldPart(("b", "c"), ("a",)), FoldPart(("a",), ("b", "c")))
GRID = Geometry((4, 64, 64), np.diag([1.0, 1, 1, 1]))


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """two-phase with a third stage, which learns from out-of-fold predictions of the second one."""
    made = config.compose("two-phase", "tiny")
    method = config.method_of(made)
    third = replace(method.stages["fine"], name="third", inputs=("fine",), guide="out_of_fold")
    split = Split((Fold(("a", "b", "c"), ("d",), INNER),), config.stated_scheme(()))
    three = replace(method, stages={**method.stages, "third": third})
    return Plan(made, three, settings_of(made), Run(tmp_path / "run"), split, 0, tmp_path, Machine("cpu"))


@dataclass(frozen=True)
class Trained:
    """A stage by the folder of its training."""

    spec: StageSpec
    folder: str = ""

    def trained_in(self, folder: StageFolder) -> Trained:
        return replace(self, folder=str(folder.path).partition("fold_0/")[2])


@pytest.fixture
def asked(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Each prediction that a preparation asks for: the case, the training, and the outputs that it builds on."""
    label, found = np.zeros(GRID.shape, np.uint8), list[tuple[str, ...]]()
    label[:, 20:40, 20:40] = 1
    images = {case: 200 * label.astype(np.int16) for case in "abcd"}

    def run(image: Any, grid: Geometry, stage: Trained, head: str, earlier: dict[str, Any]) -> None:
        (case,) = (name for name, array in images.items() if array is image)
        found.append((case, stage.folder, *earlier))

    def stored(plan: Plan, spec: StageSpec, case: str) -> SimpleNamespace:
        return SimpleNamespace(id=case, image=images[case], label=label, grid=GRID, made_from="")

    monkeypatch.setattr(stage_inputs, "open_stage", lambda spec, device: Trained(spec))
    monkeypatch.setattr(stage_inputs, "open_stored", stored)
    monkeypatch.setattr(stage_inputs, "run_on_grid", run)
    monkeypatch.setattr(stage_inputs, "_record_facts", lambda *_: None)
    return found


def test_every_stage_before_out_of_fold_predictions_has_nested_folds(plan: Plan) -> None:
    names = [str(unit) for unit in units(plan.method, plan.part)]
    assert names == ["coarse", "coarse/inner_0", "coarse/inner_1", "fine", "fine/inner_0", "fine/inner_1", "third"]


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        (Unit("coarse"), []),
        (Unit("fine"), [("d", "coarse")]),
        (Unit("fine", 0), [("a", "coarse/inner_0")]),  # coarse has learned from a
        (
            Unit("third"),
            [
                *[("a", "coarse/inner_0"), ("a", "fine/inner_0", "coarse")],
                *[("b", "coarse/inner_1"), ("b", "fine/inner_1", "coarse")],
                *[("c", "coarse/inner_1"), ("c", "fine/inner_1", "coarse")],
                *[("d", "coarse"), ("d", "fine", "coarse")],
            ],
        ),
    ],
)
def test_no_case_is_predicted_by_a_network_that_learned_from_it(
    plan: Plan, asked: list[tuple[str, ...]], unit: Unit, expected: list[tuple[str, ...]]
) -> None:
    prepare(plan, unit)
    assert asked == expected
    part, places = unit.part(plan), STAGE_INPUTS.read(unit.folder(plan).places)
    assert (tuple(places.train), tuple(places.val)) == (part.train, part.val)
