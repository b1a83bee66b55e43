"""Which training cases a method finds hard: ranked by the Dice of networks that were not trained on them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kitseg import config
from kitseg.errors import UsageError
from kitseg.labels import to_kits19
from kitseg.method import Method, StageSpec
from kitseg.models.chain import run_on_grid
from kitseg.models.run_folder import find_run
from kitseg.models.stage import open_stage
from kitseg.runtime.console import bar
from kitseg.runtime.device import Machine, torch_device
from kitseg.runtime.provenance import FileFormat
from kitseg.scoring.kits19 import kits19_scores
from kitseg.training.data_source import data_settings
from kitseg.training.fit import fit
from kitseg.training.plan import Plan, Start, Unit, open_stored
from kitseg.training.train import Log, began_with, trainings


@dataclass(frozen=True)
class Ranked:
    """A training case's Dice on the stage's grid, by a nested fold that validated on it; ``dice``: the mean of both."""

    case: str
    kidney: float
    tumor: float
    dice: float


@dataclass(frozen=True)
class _Ranking:
    stage: str
    checkpoints: list[str]
    cases: list[str]
    ranking: list[Ranked]


_RANKING = FileFormat(_Ranking, 1)


def ranking_stage(method: Method) -> StageSpec:
    """The stage whose nested folds judge the training cases: the first that finds kidney and tumor on its own.

    Raises:
        UsageError: the method has none.
    """
    for stage in method.stages.values():
        if not stage.inputs and {"kidney", "tumor"} <= set(stage.channels):
            return stage
    raise UsageError(
        f"{method.name} has no first stage that finds kidney and tumor, so it can't rank cases; rank them with another "
        "method, such as two-phase: the copies serve every method"
    )


def fold_plan(run: Path, fold: int, store: Path, device: str) -> Plan:
    """A fold of an existing run, to rank with it.

    Raises:
        UsageError: no run, no such fold, or a method that can't rank.
    """
    found, _ = find_run(run)
    plan = Start(config.read(found.config), found, fold, found.split, store, Machine(device)).rehearse(())
    if data_settings(plan.config) is not None:
        raise UsageError(f"{run} learned from synthetic patients, so it can't rank cases")
    if not plan.part.inner:
        raise UsageError(f"fold {fold} has no nested folds, so no network can judge its training cases")
    ranking_stage(plan.method)
    return plan


def rank_cases(plan: Plan, cases: Collection[str], path: Path, log: Log) -> list[Ranked]:
    """The hardest training case first. Inner folds that aren't trained yet are trained now.

    Args:
        plan: the run and its fold.
        cases: those to rank; the others of the fold, such as copies, are left out.
        path: where the ranking is written; read again while the checkpoints and the cases are the same.
        log: receives a line on what is trained.

    Raises:
        UsageError: no stage can rank.
    """
    spec = ranking_stage(plan.method)
    wanted = [Unit(spec.name, number) for number in range(len(plan.part.inner))]
    log(f"ranking the training cases of fold {plan.fold} by {len(wanted)} nested folds of stage {spec.name}")
    finished = all(unit.folder(plan).done.exists() for unit in wanted)  # then the model may be gone
    start = plan if finished else replace(plan, initial=began_with(plan.run) or None)
    for training in trainings(start, wanted, log):
        fit(training, plan.machine)
    judges = [digest for unit in wanted for _, digest in unit.folder(plan).checkpoints()]
    state = {"stage": spec.name, "checkpoints": judges, "cases": sorted(cases)}
    if old := _RANKING.find(path, state):
        return old.ranking
    with bar("rank", len(cases)) as step:
        ranked = [row for unit in wanted for row in _judge(plan, spec, unit, cases, step)]
    ranked.sort(key=lambda row: (row.dice, row.case))
    _RANKING.write(path, {**state, "ranking": ranked})
    return ranked


def _judge(plan: Plan, spec: StageSpec, unit: Unit, cases: Collection[str], step: Callable[[], None]) -> list[Ranked]:
    """The cases that one nested fold validated on."""
    predictor = open_stage(spec, torch_device(plan.machine.device)).trained_in(unit.folder(plan))
    found = []
    for case in unit.part(plan).val:
        if case in cases:
            stored = open_stored(plan, spec, case)
            output = run_on_grid(stored.image, stored.grid, predictor, spec.heads[-1], {})
            dice = kits19_scores(to_kits19(output.labels()), to_kits19(np.asarray(stored.label)))
            found.append(Ranked(case, **dice, dice=(dice["kidney"] + dice["tumor"]) / 2))
            step()
    return found
