"""Training plans: a configuration, a fold of a split, and the trainings of its stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from kitseg import config, trust
from kitseg.config import Config, Method, StageSpec
from kitseg.errors import UsageError
from kitseg.models.run_folder import Run, StageFolder, move_aside
from kitseg.runtime import console
from kitseg.runtime.device import Machine
from kitseg.runtime.files import write_text
from kitseg.runtime.locks import folder_lock
from kitseg.splits import Fold, FoldPart, Split, read_split, write_split
from kitseg.training import data_source
from kitseg.training.data_source import check_method, data_settings
from kitseg.training.epochs import only_more_epochs, record_raise
from kitseg.training.initial import find_initial
from kitseg.training.split import check_counts, claim_split, new_split, read_split_of, unseen_traits
from kitseg.training.trainer import DEFAULT, PRECISIONS, Settings, settings_of
from kitseg.types import Case
from kitseg.volumes.names import shorten
from kitseg.volumes.store import StoredCase, open_case

MOMENT = 30.0  # seconds to wait for another fold to write the run's files


@dataclass(frozen=True)
class Plan:
    """The trainings of a fold of a run.

    config: resolved; method, settings: its method and its ``trainer``; run: output; fold: an outer fold of ``split``;
    store: preprocessed cases; initial: the model whose weights the stages start from.
    """

    config: Config
    method: Method
    settings: Settings
    run: Run
    split: Split
    fold: int
    store: Path
    machine: Machine
    initial: str | None = None

    @property
    def part(self) -> Fold:
        """The outer fold."""
        return self.split.folds[self.fold]


@dataclass(frozen=True)
class Unit:
    """One training: a stage on the outer fold, or on a nested fold for out-of-fold predictions; or a round of it."""

    stage: str
    inner: int | None = None
    round: int | None = None

    def __str__(self) -> str:
        inner = "" if self.inner is None else f"/inner_{self.inner}"
        return self.stage + inner + ("" if self.round is None else f"/round_{self.round}")

    def folder(self, plan: Plan) -> StageFolder:
        """The folder of this training."""
        folder = plan.run.stage(plan.fold, self.stage)
        folder = folder if self.inner is None else folder.inner(self.inner)
        return folder if self.round is None else folder.round(self.round)

    def spec(self, plan: Plan) -> StageSpec:
        """The stage with the epochs of this training."""
        spec = plan.method.stages[self.stage]
        if self.round and spec.rounds is not None:
            return replace(spec, epochs=spec.rounds.epochs)
        if self.inner is not None and spec.nested_epochs is not None:
            return replace(spec, epochs=min(spec.epochs, spec.nested_epochs))
        return spec

    def part(self, plan: Plan) -> FoldPart:
        """The cases of this training."""
        return plan.part if self.inner is None else plan.part.inner[self.inner]


@dataclass(frozen=True)
class Start:
    """The request of a call of `kitseg train`, before anything is prepared."""

    config: Config
    run: Run
    fold: int
    split: Path
    store: Path
    machine: Machine
    initial: str | None = None

    @cached_property
    def method(self) -> Method:
        """The method that the configuration describes."""
        return config.method_of(self.config)

    @cached_property
    def settings(self) -> Settings:
        """The configuration's ``trainer``."""
        return settings_of(self.config)

    def check(self, stage: str | None = None, anew: bool = False, every_fold: bool = False) -> None:
        """Check the configuration, the split's labels and folds, the stage to train and the model to start from.

        anew: whether what there is of the run will be renamed before; every_fold: whether the split's other folds are
        trained, too.

        Raises:
            UsageError: an invalid value or part, a split of other labels or folds, or no such fold, stage or model.
            InputError: the model's weights are damaged.
        """
        _ = self.settings
        if data_settings(self.config) is not None:
            check_method(self.method)
        _check_stage(self.method, stage)
        for spec in self.method.stages.values():
            for part in ("intensity", "region", "sampler"):
                config.build(spec.parts[part])
            if spec.precision not in PRECISIONS:
                stated = f"stages.{spec.name}.precision is {spec.precision!r}"
                raise UsageError(f"{stated}; it must be one of {', '.join(PRECISIONS)}")
            if len(spec.inputs) > 1:
                raise UsageError(f"stages.{spec.name}.inputs names several stages, but a stage builds on one")
        if self.split.exists():
            split = read_split_of(self.split, self.method.labels)
            begun = config.read(self.run.config) if self.run.config.exists() and not anew else {}
            for number in range(len(split.folds)) if every_fold else [self.fold]:
                fold = split.fold(number)
                check_counts(self.split, split, fold, self.config, begun)
                check_nested(self.method, fold, None if anew else self.run.fold(number), stage)
        elif self.fold >= self.config["folds"]:
            raise UsageError(f"there is no fold {self.fold}: the split will have folds 0 to {self.config['folds'] - 1}")
        if self.initial:
            find_initial(self.initial, self.method, self.fold)

    def claim(self, cases: Sequence[Case], jobs: int) -> Plan:
        """The plan for these preprocessed cases; split and run are written, or checked against existing files."""
        claim_run(self.run, self.config, claim_split(self.split, cases, self.config, jobs))
        if problem := trust.record(self.config):
            console.print_plain(problem)
        return self._plan(read_split(self.run.split))

    def rehearse(self, cases: Sequence[Case], anew: bool = False) -> Plan:
        """The plan without writing anything, and without reading label maps.

        anew: whether what there is of the run would be renamed. Raises UsageError: see ``check_run``.
        """
        split = read_split(self.split) if self.split.exists() else None
        if self.run.config.exists() and not anew:
            check_run(self.run, self.config, split)
        return self._plan(split or new_split(unseen_traits(cases), self.config))

    def restart(self, stage: str | None, every_fold: bool = False) -> list[Path]:
        """Rename the old run: all of it if its configuration or split differs, or if every fold is restarted.

        Otherwise only the fold, or the stage with its dependent stages and cross-validation results. Returns new names.

        Raises:
            KitsegError: a training is running there.
        """
        if not self.run.config.exists():
            return []
        old = self.split.exists() and read_split(self.split) != read_split(self.run.split)
        old = old or bool(config.differences(config.read(self.run.config), self.config))
        if old or (every_fold and stage is None):
            return _moved_aside([self.run.path])
        folds = range(len(read_split(self.run.split).folds)) if every_fold else [self.fold]
        scores = self.run.conclusions()
        if stage is None:
            return _moved_aside([self.run.fold(self.fold), *scores])
        stages = [stage]
        for name, spec in self.method.stages.items():
            if set(spec.inputs) & set(stages):
                stages.append(name)
        trained = [self.run.stage(fold, name).path for fold in folds for name in stages]
        predicted = [self.run.fold_probabilities(fold, mirror) for fold in folds for mirror in (False, True)]
        return _moved_aside([*trained, *predicted, *scores])

    def _plan(self, split: Split) -> Plan:
        split.fold(self.fold)  # refuses one that isn't there
        return Plan(
            self.config, self.method, self.settings, self.run, split, self.fold, self.store, self.machine, self.initial
        )


def _moved_aside(paths: Sequence[Path]) -> list[Path]:
    """Rename a folder that no running training writes to."""
    for folder in sorted({lock.parent for path in paths for lock in path.rglob(".kitseg*.lock")}):
        with folder_lock(folder, "training"):
            pass
    return [new for path in paths if (new := move_aside(path))]


def claim_run(run: Run, configuration: Config, split: Split) -> None:
    """Write the run's configuration and split, or check them against existing ones; folds may start concurrently.

    A configuration that only raises epochs replaces the old one, and is recorded.

    Raises:
        UsageError: the folder contains a run of another configuration or split.
    """
    with folder_lock(run.path, "configuration", wait=MOMENT):
        if not run.config.exists():
            write_split(split, run.split)
            return write_text(run.config, trust.dump(configuration))
        if old := check_run(run, configuration, split):
            if not run.first.exists():
                write_text(run.first, run.config.read_text(encoding="utf-8"))
            record_raise(run, old, configuration)
            write_text(run.config, trust.dump(configuration))


def check_run(run: Run, configuration: Config, split: Split | None) -> Config | None:
    """The configuration of a run that is there, where this one raises its epochs; None where both are the same.

    split: None where it isn't there yet.

    Raises:
        UsageError: they differ in something else, or the run has another split.
    """
    old = {"trainer": DEFAULT, "data": data_source.DEFAULT, **config.read(run.config)}
    changed = config.differences(old, configuration)
    if changed and not only_more_epochs(old, configuration):
        remedy = "Use --restart to rename the old run, or --name for a new run."
        raise UsageError(f"{run.path} was made with another configuration. {remedy}", details=changed)
    if split and read_split(run.split) != split:
        raise UsageError(f"{run.path} was trained with another split: {run.split}. Use that one, or --restart.")
    return old if changed else None


def _check_stage(method: Method, stage: str | None) -> None:
    if stage is not None and stage not in method.stages:
        raise UsageError(f"{method.name} has no stage '{stage}'. Choose from {', '.join(method.stages)}")


def units(method: Method, part: Fold, stage: str | None = None) -> list[Unit]:
    """The trainings of a fold in order, or those of one stage. Raises UsageError: an unknown stage."""
    _check_stage(method, stage)
    nested = set[str]()  # those whose nested folds predict what another one learns from, or one before such a one
    for later in reversed([*method.stages.values()]):
        if later.guide == "out_of_fold" or later.name in nested:
            nested.update(later.inputs)
    inner = {name: range(len(part.inner)) if name in nested else () for name in method.stages}
    found = [Unit(name, number) for name in method.stages for number in (None, *inner[name])]
    return [unit for unit in found if stage in (None, unit.stage)]


def check_nested(method: Method, part: Fold, folder: Path | None, stage: str | None) -> None:
    """Make sure that nested folds hold out each training case, where a stage learns from predictions of these.

    folder: of the outer fold, in which stages that have begun are left alone, None: none has; stage: to train, with
    those that build on it; None: all.

    Raises:
        UsageError: some cases are in none, so that the stage would learn from their labels.
    """
    learned = [frozenset(nested.train) for nested in part.inner]
    left = [case for case in part.train if all(case in cases for cases in learned)]
    for spec in method.stages.values():
        begun = folder is not None and StageFolder(folder / spec.name).places.exists()
        asked = stage in (None, spec.name, *spec.inputs) and not begun
        if left and asked and spec.inputs and spec.guide == "out_of_fold":
            problem = f"stage {spec.name} learns from predictions of nested folds, but none holds out {shorten(left)}"
            remedy = (
                f"Add them to `inner` of the split's fold, or use the labels: --set stages.{spec.name}.guide=labels"
            )
            raise UsageError(f"{problem}. {remedy}")


def open_stored(plan: Plan, spec: StageSpec, case: str) -> StoredCase:
    """A preprocessed case on a stage's grid."""
    return open_case(plan.store / str(spec.grid) / case)
