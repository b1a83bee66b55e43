"""Train a method: its stages in order, each with the output of earlier stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from kitseg.errors import InputError, UsageError
from kitseg.models.run_folder import BEGINNING, Beginning, Run, move_aside
from kitseg.runtime.files import file_digest
from kitseg.runtime.locks import folder_lock
from kitseg.training import rounds, synthesis
from kitseg.training.epochs import missing_epochs
from kitseg.training.fit import Training
from kitseg.training.initial import find_initial
from kitseg.training.plan import Plan, Unit, check_nested, units
from kitseg.training.stage_inputs import check_cases, prepare
from kitseg.types import Case

Log = Callable[[str], None]


def trainings_of_fold(
    plan: Plan, cases: Sequence[Case], jobs: int, log: Log, stage: str | None = None
) -> Iterator[Training]:
    """The trainings of a fold's stages in order, or of one of them; see ``trainings``.

    cases: those that synthetic patients of validation are made from, ``jobs`` at a time.

    Raises:
        UsageError: an unknown stage, one whose earlier stage isn't trained yet, a split without the nested folds that
            it needs, or other cases, see ``check_cases``.
    """
    check_nested(plan.method, plan.part, plan.run.fold(plan.fold), stage)
    synthesis.prepare(plan, cases, jobs)
    wanted = units(plan.method, plan.part, stage)
    check_cases(plan, wanted)
    yield from trainings(plan, wanted, log)


def trainings(plan: Plan, wanted: Sequence[Unit], log: Log) -> Iterator[Training]:
    """The unfinished trainings, in order; each must be finished before the next is requested.

    The folder of a training is locked, and its inputs are prepared, before it is yielded.
    """
    initial = _initial_weights(plan, log) if plan.initial else {}
    check_initial(plan, wanted, initial)
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


def check_initial(plan: Plan, wanted: Sequence[Unit], initial: Mapping[str, Path]) -> None:
    """Make sure that all trainings of a run begin with the weights of one model, or all with random weights.

    initial: the checkpoint that each stage is to begin with. The model is recorded when the run begins.

    Raises:
        UsageError: the run began with another model, with random weights, or with a model where none is given now and
            a training is to begin.
    """
    run, folders = plan.run, [unit.folder(plan).first for unit in wanted]
    if not run.begun:
        if plan.initial:
            return BEGINNING.write(run.initial, Beginning(plan.initial))
        for path in (run.initial, *run.beginnings()):  # of a call that ended before it began
            path.unlink(missing_ok=True)
        return
    remedy = "or give this training a --name of its own"
    known = began_with(run)
    if plan.initial and not known:
        raise UsageError(f"{run.path} began with random weights, not with {plan.initial}. Omit --init-from, {remedy}")
    if known and not plan.initial and not all(folder.begun or folder.done.exists() for folder in folders):
        raise UsageError(f"{run.path} began with the weights of {known}. Give it as --init-from again, {remedy}")
    if plan.initial and plan.initial != known:
        weights = {BEGINNING.read(path).sha256 for path in run.beginnings()}
        if not weights.intersection(map(file_digest, initial.values())):
            raise UsageError(f"{run.path} began with the weights of {known}, not of {plan.initial}. Give it, {remedy}")


def began_with(run: Run) -> str:
    """The model whose weights a run began with; a checkpoint in runs of earlier versions, empty for random weights."""
    records = [run.initial] if run.initial.exists() else run.beginnings()
    return BEGINNING.read(records[0]).checkpoint if records else ""


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
