"""Training a method: its stages in order, each fed by the ones before it."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from kitseg.errors import KitsegError, UsageError
from kitseg.pipeline import rounds
from kitseg.pipeline.fit import Training, fit
from kitseg.pipeline.machine import rank
from kitseg.pipeline.places import prepare
from kitseg.pipeline.plan import Plan, Unit, units

Say = Callable[[str], None]


def train(plan: Plan, stage: str | None, say: Say) -> None:
    """Train a fold's stages in order, or one of them.

    Raises:
        UsageError: a stage that isn't there, or whose earlier stage isn't trained yet.
    """
    method = plan.method
    if stage is not None and stage not in method.stages:
        raise UsageError(f"{method.name} has no stage '{stage}'; it has {', '.join(method.stages)}")
    train_units(plan, units(method, plan.part, stage), say)


def train_units(plan: Plan, wanted: Sequence[Unit], say: Say) -> None:
    """Train these in order; what is trained already is left as it is."""
    ports = itertools.count(1)
    for unit in wanted:
        if unit.folder(plan).done.exists():
            say(f"{unit}: trained already")
            continue
        _check_earlier(plan, unit)
        if rank() == 0:
            prepare(plan, unit)
        if plan.method.stages[unit.stage].rounds is None:
            _train_one(plan, unit, next(ports), say)
        else:
            _train_rounds(plan, unit, ports, say)


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


def _train_one(plan: Plan, unit: Unit, port: int, say: Say) -> None:
    """One fit, in this process or in one for each rank."""
    folder = unit.folder(plan)
    if rank() == 0:
        say(f"{unit}: {'goes on' if folder.last.exists() else 'starts'} in {folder.path}")
    if plan.machine.world > 1:
        _start_ranks(plan, unit, port)
    else:
        fit_unit(plan, unit)


def _train_rounds(plan: Plan, unit: Unit, ports: Iterator[int], say: Say) -> None:
    """Fits that each start from the best weights so far, until one brings nothing."""
    folder, spec = unit.folder(plan), plan.method.stages[unit.stage]
    most = 0 if spec.rounds is None else spec.rounds.most
    while (number := rounds.next_round(folder, spec)) is not None:
        if rank() == 0:
            cases = rounds.prepare_round(folder, spec, number, plan.config["seed"] + plan.fold)
            if number:
                say(f"{unit}: {rounds.describe(folder)}; round {number} of at most {most}, on {cases} cases")
        _train_one(plan, replace(unit, round=number), next(ports), say)
    if rank() == 0:
        say(f"{unit}: {rounds.describe(folder)}, which is kept")
        rounds.conclude(folder)


def _start_ranks(plan: Plan, unit: Unit, port: int) -> None:
    """Start a process for this fit: one fit a process.

    Lightning starts the other ranks from this command; under torchrun each rank does this, and each unit meets at a
    port of its own.
    """
    environment = dict(os.environ)
    if "MASTER_PORT" in environment:
        meet = int(environment["MASTER_PORT"]) + port
        environment |= {"MASTER_PORT": str(meet), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    command = [sys.executable, "-m", "kitseg", "train", *plan.arguments, "--only", str(unit)]
    code = subprocess.run(command, env=environment, check=False).returncode
    if code:
        raise KitsegError(f"{unit}: a rank ended with exit code {code}; its own message stands above")


def _check_earlier(plan: Plan, unit: Unit) -> None:
    for name in plan.method.stages[unit.stage].inputs:
        if not plan.run.stage(plan.fold, name).done.exists() and rank() == 0:
            raise UsageError(
                f"stage {unit.stage} builds on stage {name}, which isn't trained to its end in {plan.run.path}: "
                f"train it first with --stage {name}, or leave --stage away"
            )
