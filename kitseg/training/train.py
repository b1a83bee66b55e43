"""Training a method: its stages in order, each fed by the ones before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from kitseg.errors import UsageError
from kitseg.runtime.locks import folder_lock
from kitseg.training import rounds
from kitseg.training.ddp import RankCoordinator
from kitseg.training.fit import Training, fit
from kitseg.training.plan import Plan, Unit, units
from kitseg.training.stage_inputs import prepare

Log = Callable[[str], None]
RunUnit = Callable[[Plan, Unit], None]


def train(plan: Plan, stage: str | None, log: Log, run: RunUnit) -> None:
    """Train a fold's stages in order, or one of them.

    Raises:
        UsageError: a stage that isn't there, or whose earlier stage isn't trained yet.
    """
    method = plan.method
    if stage is not None and stage not in method.stages:
        raise UsageError(f"{method.name} has no stage '{stage}'; it has {', '.join(method.stages)}")
    train_units(plan, units(method, plan.part, stage), log, run)


def train_units(plan: Plan, wanted: Sequence[Unit], log: Log, run: RunUnit) -> None:
    """Train these in order, each as ``run`` does; what is trained already is left as it is."""
    for unit in wanted:
        folder = unit.folder(plan)
        if folder.done.exists():
            log(f"{unit}: trained already")
            continue
        _check_earlier(plan, unit)
        with folder_lock(folder.path, "training"):
            prepare(plan, unit)
            if plan.method.stages[unit.stage].rounds is None:
                _train_one(plan, unit, log, run)
            else:
                _train_rounds(plan, unit, log, run)


def fit_unit(plan: Plan, unit: Unit) -> None:
    """Train one unit whose places are prepared."""
    spec = plan.method.stages[unit.stage]
    seed = plan.config["seed"] + 1000 * plan.fold + 100 * (0 if unit.inner is None else unit.inner + 1)
    start = None
    if unit.round:
        spec, seed = rounds.shortened(spec), seed + unit.round
        start = rounds.best_weights(replace(unit, round=None).folder(plan))
    store = plan.store / str(spec.grid)
    fit(Training(spec, unit.folder(plan), store, seed, plan.config["keep_best"], start), plan.machine)


def on_all_ranks(coordinator: RankCoordinator) -> RunUnit:
    """A way to train a unit: one rank each on the machine's devices, and on those of the other nodes."""

    def run(plan: Plan, unit: Unit) -> None:
        coordinator.train([*plan.arguments, f"--fold={plan.fold}", f"--only={unit}"])

    return run


def _train_one(plan: Plan, unit: Unit, log: Log, run: RunUnit) -> None:
    folder = unit.folder(plan)
    log(f"{unit}: {'goes on' if folder.begun else 'starts'} in {folder.path}")
    run(plan, unit)


def _train_rounds(plan: Plan, unit: Unit, log: Log, run: RunUnit) -> None:
    """Fits that each start from the best weights so far, until one brings nothing."""
    folder, spec = unit.folder(plan), plan.method.stages[unit.stage]
    most = 0 if spec.rounds is None else spec.rounds.most
    while (number := rounds.next_round(folder, spec)) is not None:
        cases = rounds.prepare_round(folder, spec, number, plan.config["seed"] + plan.fold)
        if number:
            log(f"{unit}: {rounds.describe_rounds(folder)}; round {number} of at most {most}, on {cases} cases")
        _train_one(plan, replace(unit, round=number), log, run)
    log(f"{unit}: {rounds.describe_rounds(folder)}, which is kept")
    rounds.conclude(folder)


def _check_earlier(plan: Plan, unit: Unit) -> None:
    for name in plan.method.stages[unit.stage].inputs:
        if not plan.run.stage(plan.fold, name).done.exists():
            raise UsageError(
                f"stage {unit.stage} builds on stage {name}, which isn't trained to its end in {plan.run.path}: "
                f"train it first with --stage {name}, or leave --stage away"
            )
