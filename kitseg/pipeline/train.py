"""Training a method: its stages in order, each fed by the ones before it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kitseg import __version__, config
from kitseg.config import Config, Method, StageSpec
from kitseg.errors import KitsegError, UsageError
from kitseg.files import write_json, write_text
from kitseg.inference.chain import Predictor, run_on_grid
from kitseg.pipeline.fit import Machine, fit, rank, write_regions
from kitseg.pipeline.model import build_stage, torch_device, trained_stage
from kitseg.runs import SCHEMA, Run, StageFolder, move_aside
from kitseg.screen import bar
from kitseg.splits import Fold, Part, Split, make_split, read_split, write_split
from kitseg.types import Box
from kitseg.volumes.store import StoredCase, grid_name, open_case

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to train and where.

    config: resolved; run: where it goes; fold: an outer fold of ``split``; store: preprocessed cases;
    arguments: the command line that starts one more rank of the same training.
    """

    config: Config
    run: Run
    split: Split
    fold: int
    store: Path
    machine: Machine
    arguments: tuple[str, ...] = ()

    @property
    def method(self) -> Method:
        """The method that the configuration describes."""
        return config.method_of(self.config)

    @property
    def part(self) -> Fold:
        """The outer fold."""
        return self.split.folds[self.fold]


@dataclass(frozen=True)
class Unit:
    """One training: a stage on the outer fold, or on an inner one for out-of-fold predictions."""

    stage: str
    inner: int | None = None

    def __str__(self) -> str:
        return self.stage if self.inner is None else f"{self.stage}/inner_{self.inner}"

    @classmethod
    def parse(cls, text: str) -> Unit:
        """The inverse of ``str``."""
        stage, _, inner = text.partition("/inner_")
        return cls(stage, int(inner) if inner else None)

    def folder(self, plan: Plan) -> StageFolder:
        """Where this training lives."""
        outer = plan.run.stage(plan.fold, self.stage)
        return outer if self.inner is None else outer.inner(self.inner)

    def part(self, plan: Plan) -> Part:
        """The cases of this training."""
        return plan.part if self.inner is None else plan.part.inner[self.inner]


@dataclass(frozen=True)
class Start:
    """What a call of `kitseg train` asks for, before anything is prepared."""

    config: Config
    run: Run
    fold: int
    split: Path
    store: Path
    machine: Machine
    repeat: tuple[str, ...] = ()

    def claim(self, cases: Iterable[str]) -> Plan:
        """The plan for these preprocessed cases; split and run are written, or checked against what is there."""
        claim_run(self.run, self.config, claim_split(self.split, cases, self.config))
        return self.plan()

    def rehearse(self, cases: Iterable[str]) -> Plan:
        """The plan without writing anything."""
        split = read_split(self.split) if self.split.exists() else new_split(cases, self.config)
        return self._plan(split)

    def plan(self) -> Plan:
        """The plan of a run that is claimed already."""
        return self._plan(read_split(self.run.split))

    def wait(self) -> Plan:
        """The same for a rank that isn't the first: when the first has prepared everything."""
        while not self.run.config.exists():
            time.sleep(0.5)
        return self.plan()

    def restart(self, stage: str | None) -> Path | None:
        """Move the old run aside: the whole of it where its configuration or split differs.

        Otherwise the fold alone, or the stage with the later ones that build on it.

        Raises:
            UsageError: there are several ranks already.
        """
        if "WORLD_SIZE" in os.environ:
            raise UsageError("--restart can't be used under torchrun: move the old run aside by hand")
        if not self.run.config.exists():
            return None
        other_split = self.split.exists() and read_split(self.split) != read_split(self.run.split)
        if other_split or config.differences(config.read(self.run.config), self.config):
            return move_aside(self.run.path)
        if stage is None:
            return move_aside(self.run.path / f"fold_{self.fold}")
        for later in _dependent(config.method_of(self.config), stage):
            move_aside(self.run.stage(self.fold, later).path)
        return move_aside(self.run.stage(self.fold, stage).path)

    def _plan(self, split: Split) -> Plan:
        if self.fold >= len(split.folds):
            raise UsageError(f"there is no fold {self.fold}: {len(split.folds)} folds, from 0 on")
        return Plan(self.config, self.run, split, self.fold, self.store, self.machine, self.repeat)


def _dependent(method: Method, stage: str) -> list[str]:
    """The stages that build on a stage, directly or not."""
    found = [stage]
    for name, spec in method.stages.items():
        if set(spec.inputs) & set(found):
            found.append(name)
    return found[1:]


def new_split(cases: Iterable[str], configuration: Config) -> Split:
    """A split as the configuration asks for."""
    keys = ("folds", "inner_folds", "test_cases", "seed", "convention")
    return make_split(cases, *(configuration[key] for key in keys))


def claim_split(path: Path, cases: Iterable[str], configuration: Config) -> Split:
    """The split file, written now where there is none yet.

    Raises:
        KitsegError: the file is damaged, of another convention, or names cases that aren't there.
    """
    there = set(cases)
    if not path.exists():
        write_split(new_split(there, configuration), path)
    split = read_split(path)
    if split.convention != configuration["convention"]:
        wanted = configuration["convention"]
        raise UsageError(f"{path} is of label convention {split.convention}, the configuration of {wanted}")
    if missing := sorted(split.cases - there):
        raise KitsegError(f"{path} names {', '.join(missing)}, which the data folder lacks. Add them or mend the file.")
    return split


def claim_run(run: Run, configuration: Config, split: Split) -> None:
    """Write what the run is, or make sure that it is the same as before.

    Raises:
        UsageError: the folder holds a run of another configuration or split.
    """
    if run.config.exists():
        changed = config.differences(config.read(run.config), configuration)
        if changed:
            remedy = "Use --restart to move the old run aside, or --name for a run of its own."
            raise UsageError(f"{run.path} was made with another configuration. {remedy}\n  " + "\n  ".join(changed))
        if read_split(run.split) != split:
            raise UsageError(f"{run.path} was trained with another split: {run.split}. Use that one, or --restart.")
        return
    write_split(split, run.split)
    write_text(run.config, config.dump(configuration))


def units(method: Method, part: Fold, stage: str | None = None) -> list[Unit]:
    """The trainings of a fold in order, or those of one stage."""
    found = []
    for name in method.stages:
        found.append(Unit(name))
        if any(name in later.inputs and later.guide == "inner" for later in method.stages.values()):
            found += [Unit(name, i) for i in range(len(part.inner))]
    return [unit for unit in found if stage in (None, unit.stage)]


def train(plan: Plan, stage: str | None, say: Say) -> None:
    """Train a fold's stages in order, or one of them.

    Raises:
        UsageError: a stage that isn't there, or whose earlier stage isn't trained yet.
    """
    method = plan.method
    if stage is not None and stage not in method.stages:
        raise UsageError(f"{method.name} has no stage '{stage}'; it has {', '.join(method.stages)}")
    for number, unit in enumerate(units(method, plan.part, stage)):
        folder = unit.folder(plan)
        if folder.done.exists():
            say(f"{unit}: trained already")
            continue
        _check_earlier(plan, unit)
        if rank() == 0:
            say(f"{unit}: {'goes on' if folder.last.exists() else 'starts'} in {folder.path}")
            _prepare(plan, unit)
        if plan.machine.world > 1:
            _start_ranks(plan, unit, number)
        else:
            fit_unit(plan, unit)


def fit_unit(plan: Plan, unit: Unit) -> None:
    """Train one unit whose regions are prepared."""
    spec = plan.method.stages[unit.stage]
    store = plan.store / grid_name(spec.spacing)
    seed = plan.config["seed"] + 1000 * plan.fold + 100 * (0 if unit.inner is None else unit.inner + 1)
    fit(spec, unit.folder(plan), store, seed, plan.config["keep_best"], plan.machine)


def _start_ranks(plan: Plan, unit: Unit, number: int) -> None:
    """Start a process for this fit: one fit a process.

    Lightning starts the other ranks from this command; under torchrun each rank does this, and each unit meets at a
    port of its own.
    """
    environment = dict(os.environ)
    if "MASTER_PORT" in environment:
        port = int(environment["MASTER_PORT"]) + 1 + number
        environment |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
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


def _prepare(plan: Plan, unit: Unit) -> None:
    """Write the region of each case and what the run learned from."""
    folder, part = unit.folder(plan), unit.part(plan)
    spec = plan.method.stages[unit.stage]
    if not folder.regions.exists():
        train = _regions(plan, spec, part.train, "train")
        write_regions(folder, train, _regions(plan, spec, part.val, "val"))
    if not plan.run.info.exists():
        cases = [_open(plan, spec, case) for case in sorted(plan.split.cases - set(plan.split.test))]
        phantom = any(case.phantom for case in cases)
        write_json(plan.run.info, SCHEMA, {"kitseg": __version__, "phantom": phantom, "cases": [c.id for c in cases]})


def _regions(plan: Plan, spec: StageSpec, cases: Sequence[str], side: str) -> dict[str, Box | None]:
    """The boxes of a stage's cases.

    For validation from the earlier stage's own predictions; for training from predictions of its inner folds, or from
    the labels, which also stand in where the earlier stage found nothing.
    A training case without any foreground has no region to learn from and is left out.
    """
    region = config.build(spec.parts["region"])
    if not spec.inputs:
        return {case: region(_open(plan, spec, case).grid, None, None) for case in cases}
    earlier = plan.method.stages[spec.inputs[0]]
    guided = side == "val" or spec.guide == "inner"
    predictors = _predictors(plan, earlier, cases, side == "train") if guided else {}
    found: dict[str, Box | None] = {}
    with bar(f"{spec.name}: where to look ({side})", len(cases)) as step:
        for case in cases:
            stored = _open(plan, spec, case)
            box = None
            if case in predictors:
                seen = _open(plan, earlier, case)
                guide = run_on_grid(seen.image, seen.grid, predictors[case], earlier.heads[-1], {})
                box = region(stored.grid, guide.labels(), guide.grid)
            if box is None and side == "train":
                box = region(stored.grid, np.asarray(stored.label), stored.grid)
            if box is not None or side == "val":
                found[case] = box
            step()
    return found


def _predictors(plan: Plan, earlier: StageSpec, cases: Iterable[str], inner: bool) -> dict[str, Predictor]:
    """Who predicts a case without having learned from it."""
    outer = plan.run.stage(plan.fold, earlier.name)
    module = build_stage(earlier).to(torch_device(plan.machine.device)).eval()
    if not inner:
        predictor = trained_stage(earlier, module, outer)
        return dict.fromkeys(cases, predictor)
    parts = enumerate(plan.part.inner)
    return {case: trained_stage(earlier, module, outer.inner(i)) for i, part in parts for case in part.val}


def _open(plan: Plan, spec: StageSpec, case: str) -> StoredCase:
    return open_case(plan.store / grid_name(spec.spacing) / case)
