"""Train a method: its stages in order, each with the output of earlier stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from kitseg.errors import InputError, UsageError
from kitseg.models.run_folder import move_aside
from kitseg.runtime.locks import folder_lock
from kitseg.training import rounds, synthesis
from kitseg.training.epochs import missing_epochs
from kitseg.training.fit import Training
from kitseg.training.initial import find_initial
from kitseg.training.plan import Plan, Unit, units
from kitseg.training.stage_inputs import check_cases, prepare
from kitseg.types import Case

Log = Callable[[str], None]


def trainings_of_fold(
    plan: Plan, cases: Sequence[Case], jobs: int, log: Log, stage: str | None = None
) -> Iterator[Training]:
    """The trainings of a fold's stages in order, or of one of them; see ``trainings``.

    cases: those that synthetic patients of validation are made from, ``jobs`` at a time.

    Raises:
        UsageError: an unknown stage, one whose earlier stage isn't trained yet, or other cases, see ``check_cases``.
    """
    synthesis.prepare(plan, cases, jobs)
    wanted = units(plan.method, plan.part, stage)
    check_cases(plan, wanted)
    yield from trainings(plan, wanted, log)


def trainings(plan: Plan, wanted: Sequence[Unit], log: Log) -> Iterator[Training]:
    """The unfinished trainings, in order; each must be finished before the next is requested.

    The folder of a training is locked, and its inputs are prepared, before it is yielded.
    """
    initial = _initial_weights(plan, log) if plan.initial else {}
    for unit in wanted:
        folder, spec = unit.folder(plan), unit.spec(plan)
        more = missing_epochs(plan.run, spec, folder) if folder.done.exists() else None
        if more == 0:
            log(f"{unit}: trained already")
            continue
        _check_earlier(plan, unit)
        with folder_lock(folder.path, "training"):
            if more is not None:
                _reopen(plan, unit, more, log)
            prepare(plan, unit)
            if spec.rounds is None:
                yield _training(plan, unit, initial.get(unit.stage), log)
            else:
                yield from _rounds(plan, unit, initial.get(unit.stage), log)


def _initial_weights(plan: Plan, log: Log) -> Mapping[str, Path]:
    """The checkpoint that each stage starts from; warns about validation cases that it was trained on."""
    found = find_initial(str(plan.initial), plan.method, plan.fold)
    if seen := sorted(set(plan.part.val) & set(found.cases)):
        names = ", ".join(seen[:5]) + (" …" if len(seen) > 5 else "")
        log(f"{plan.initial} was trained on validation cases of fold {plan.fold}: scores are biased ({names})")
    if found.note:
        log(found.note)
    return found.stages


def _reopen(plan: Plan, unit: Unit, more: int, log: Log) -> None:
    """Mark a finished training as unfinished, to resume from its last checkpoint; cross-validation is out of date."""
    folder = unit.folder(plan)
    if not folder.last.exists():
        remedy = "Restore it, or restart this stage with --restart --stage."
        raise InputError(folder.last, f"is missing, so {unit} can't be trained for {more} more epochs", remedy)
    log(f"{unit}: {more} more epochs; its regions and guides are unchanged")
    for path in plan.run.conclusions():
        move_aside(path)
    folder.done.unlink()


def _training(plan: Plan, unit: Unit, start: Path | None, log: Log) -> Training:
    """The training of a unit whose inputs are prepared."""
    spec, folder = unit.spec(plan), unit.folder(plan)
    seed = plan.config["seed"] + 1000 * plan.fold + 100 * (0 if unit.inner is None else unit.inner + 1)
    if unit.round:
        seed += unit.round
        start = rounds.best_weights(replace(unit, round=None).folder(plan))
    log(f"{unit}: {'resumes' if folder.begun else 'starts'} in {folder.path}")
    return Training(spec, folder, plan.store / str(spec.grid), seed, plan.config["keep_best"], plan.settings, start)


def _rounds(plan: Plan, unit: Unit, start: Path | None, log: Log) -> Iterator[Training]:
    """Trainings that each start from the best weights so far, until one brings no improvement."""
    folder, spec = unit.folder(plan), plan.method.stages[unit.stage]
    most = 0 if spec.rounds is None else spec.rounds.most
    while (number := rounds.next_round(folder, spec)) is not None:
        cases = rounds.prepare_round(folder, spec, number, plan.config["seed"] + plan.fold)
        if number:
            log(f"{unit}: {rounds.describe_rounds(folder)}; round {number} of at most {most}, on {cases} cases")
        yield _training(plan, replace(unit, round=number), start, log)
    log(f"{unit}: {rounds.describe_rounds(folder)}, which is kept")
    rounds.conclude(folder)


def _check_earlier(plan: Plan, unit: Unit) -> None:
    for name in plan.method.stages[unit.stage].inputs:
        if not plan.run.stage(plan.fold, name).done.exists():
            raise UsageError(
                f"stage {unit.stage} builds on stage {name}, whose training in {plan.run.path} is not finished. "
                f"Train it first with --stage {name}, or omit --stage"
            )
