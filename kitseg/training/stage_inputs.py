"""The region of each case that a stage works on, and the guides from the stage before it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from kitseg import __version__, config
from kitseg.config import StageSpec
from kitseg.errors import UsageError
from kitseg.links.regions import RegionContext
from kitseg.method import needed
from kitseg.models.chain import Output, run_on_grid
from kitseg.models.run_folder import (
    RUN_INFO,
    STAGE_INPUTS,
    UNKNOWN,
    RunInfo,
    StageFolder,
    StageInputFile,
    StageInputRow,
    SynthesisRow,
)
from kitseg.models.stage import TrainedStage, build_input_transform, open_stage
from kitseg.models.training_domain import training_facts
from kitseg.patches.datamodule import StageCases
from kitseg.patches.subjects import StageInput
from kitseg.patches.synthetic import SyntheticSource
from kitseg.runtime.console import bar
from kitseg.runtime.device import torch_device
from kitseg.runtime.files import atomic_write
from kitseg.runtime.locks import folder_lock
from kitseg.splits import FoldPart
from kitseg.training.data_source import data_settings
from kitseg.training.initial import learned_before
from kitseg.training.plan import MOMENT, Plan, Unit, open_stored
from kitseg.training.synthesis import synthesis_row, validation_cases
from kitseg.types import Box
from kitseg.volumes.names import shorten
from kitseg.volumes.store import StoredCase, open_case


def check_cases(plan: Plan, wanted: Sequence[Unit]) -> None:
    """Make sure that the cases are those that finished and interrupted trainings have learned from.

    Raises:
        UsageError: the scan or the label map of one was replaced since.
    """
    made_from = cache(lambda grid, case: open_case(plan.store / grid / case).made_from)
    for unit in wanted:
        folder, grid = unit.folder(plan), str(plan.method.stages[unit.stage].grid)
        if not folder.places.exists():
            continue
        places = STAGE_INPUTS.read(folder.places)
        rows = places.train if places.synthesis else {**places.train, **places.val}
        if other := [case for case, row in rows.items() if row.made_from and row.made_from != made_from(grid, case)]:
            problem = f"learned from other scans or label maps of {shorten(other)} than there are now"
            remedy = "Give the same --data and --masks, put the files back, use --restart, or --name for a new run"
            raise UsageError(f"{folder.path} {problem}. {remedy}")


def prepare(plan: Plan, unit: Unit) -> None:
    """Write the regions and guides of a training's cases, and the facts of all cases that the run is trained on."""
    folder, part, spec = unit.folder(plan), unit.part(plan), plan.method.stages[unit.stage]
    if not (folder.places.exists() and plan.run.info.exists()):
        _record_facts(plan, spec)
    if not folder.places.exists():
        before = [name for name in needed(plan.method.stages, unit.stage) if name != unit.stage]
        device = torch_device(plan.machine.device)
        inputs = _Inputs(plan, unit, [open_stage(plan.method.stages[name], device) for name in before])
        found = inputs.find(part.train, "train"), inputs.find(validation_cases(plan, part.val), "val")
        write_places(folder, *found, synthesis_row(plan, spec))


def _record_facts(plan: Plan, spec: StageSpec) -> None:
    """Write the facts of the run's cases as they are now; scans that it learned from before stay among them."""
    cases = (open_stored(plan, spec, case) for case in sorted(plan.split.cases - set(plan.split.test)))
    facts = training_facts(cases, plan.split.folds)
    facts["synthetic"] |= data_settings(plan.config) is not None
    own = RunInfo(__version__, facts["phantom"], synthetic=facts["synthetic"]).made_up
    before = [learned_before(plan.initial, len(plan.split.folds))] if plan.initial else []
    with folder_lock(plan.run.path, "configuration", wait=MOMENT):
        before += [plan.run.read_info()] if plan.run.info.exists() else []
        for info in before:
            facts["hu_known"] &= info is not None and info.hu_known
            if info is None:
                facts["also"] = sorted({*facts["also"], *([UNKNOWN] if own else [])})
                continue
            facts["also"] = sorted({*facts["also"], *info.also, info.made_up or "patients"} - {own or "patients"})
            for sha256, folds in info.learned.items():
                facts["learned"][sha256] = sorted({*facts["learned"].get(sha256, ()), *folds})
        RUN_INFO.write(plan.run.info, {"kitseg": __version__, **facts})


def write_places(
    folder: StageFolder,
    train: Mapping[str, StageInput],
    val: Mapping[str, StageInput],
    synthesis: SynthesisRow | None = None,
) -> None:
    """Write the regions and guides of a stage's cases; guides are named by their path from the stage's folder."""

    def plain(found: StageInput) -> StageInputRow:
        box, guide = found.box, found.guide
        return StageInputRow(
            (*box.start, *box.stop) if box else None,
            os.path.relpath(guide, folder.path) if guide else None,
            found.made_from,
        )

    learned, validated = ({case: plain(found) for case, found in side.items()} for side in (train, val))
    STAGE_INPUTS.write(folder.places, StageInputFile(learned, validated, synthesis))


def read_places(folder: StageFolder, store: Path) -> StageCases:
    """The stored cases of a stage with their regions and guides. Raises InputError: missing or damaged."""

    def parsed(place: StageInputRow) -> StageInput:
        box = place.box and Box(place.box[:3], place.box[3:])
        return StageInput(box, folder.path / place.guide if place.guide else None, place.made_from)

    places = STAGE_INPUTS.read(folder.places)
    train, val = ({store / case: parsed(row) for case, row in side.items()} for side in (places.train, places.val))
    if (row := places.synthesis) is None:
        return StageCases(train, val)
    known = {**vars(row), "shapes": row.shapes and store.parent / row.shapes}
    if not known.pop("neighbours"):
        known["without"] = (*row.without, "neighbours")
    return StageCases(train, val, SyntheticSource(tuple(train), **known))


def unseen_by(inner: Sequence[FoldPart], cases: Iterable[str]) -> dict[str, int]:
    """The nested fold whose networks weren't trained on a case; registered copies are in no validation part."""
    return {case: number for case in cases for number, part in enumerate(inner) if case not in part.train}


class _Inputs:
    """Finds the inputs of a stage's cases, with the stages that it builds on, in order, where there are any."""

    def __init__(self, plan: Plan, unit: Unit, earlier: Sequence[TrainedStage]) -> None:
        self.plan, self.unit, self.earlier = plan, unit, earlier
        self.spec = plan.method.stages[unit.stage]
        self.region = config.build(self.spec.parts["region"])
        self.link = build_input_transform(self.spec).link

    def find(self, cases: Sequence[str], side: str) -> dict[str, StageInput]:
        """The region and guide of each case.

        For validation from the earlier stage's predictions, by networks that weren't trained on the case; for training
        from such predictions of its nested folds, or from the labels, which also stand in where the earlier stage found
        nothing. A training case without any foreground has no region to learn from and is left out.
        """
        predictors = self._predictors(cases, side) if side == "val" or self.spec.guide == "out_of_fold" else {}
        found: dict[str, StageInput] = {}
        with bar(f"{self.spec.name}: regions ({side})", len(cases), shown=bool(self.earlier)) as step:
            for case in cases:
                scan = open_stored(self.plan, self.spec, case)
                output = self._output(case, predictors[case]) if case in predictors else None
                if (box := self._box(scan, output, side)) is not None or side == "val":
                    found[case] = StageInput(box, self._guide(scan, output, side), scan.made_from)
                step()
        return found

    def _predictors(self, cases: Iterable[str], side: str) -> dict[str, list[TrainedStage]]:
        """The trained earlier stages that weren't trained on each case."""
        if not self.earlier:
            return {}
        if side == "val":
            return dict.fromkeys(cases, self._trained(self.unit.inner))
        judges = [self._trained(number) for number in range(len(self.plan.part.inner))]
        return {case: judges[number] for case, number in unseen_by(self.plan.part.inner, cases).items()}

    def _trained(self, inner: int | None) -> list[TrainedStage]:
        """The earlier stages as trained on the outer fold, or on a nested one."""
        folders = [self.plan.run.stage(self.plan.fold, stage.spec.name) for stage in self.earlier]
        own = [folder if inner is None else folder.inner(inner) for folder in folders]
        return [stage.trained_in(folder) for stage, folder in zip(self.earlier, own, strict=True)]

    def _output(self, case: str, predictors: Sequence[TrainedStage]) -> Output:
        """The prediction of a case by the stage that this one builds on."""
        found: dict[str, Output] = {}
        for stage in predictors:
            seen, name = open_stored(self.plan, stage.spec, case), stage.spec.name
            found[name] = run_on_grid(seen.image, seen.grid, stage, stage.spec.heads[-1], found)
        return found[self.spec.inputs[0]]

    def _box(self, scan: StoredCase, output: Output | None, side: str) -> Box | None:
        context = RegionContext(scan.grid, hu=scan.image)
        labelled = replace(context, guide=scan.label, guide_grid=scan.grid) if self.earlier else context
        found = replace(context, guide=output.labels(), guide_grid=output.grid) if output else labelled
        box: Box | None = self.region(found)
        return self.region(labelled) if box is None and side == "train" else box

    def _guide(self, scan: StoredCase, output: Output | None, side: str) -> Path | None:
        """Write the guide of a stage with a link; in training its mask comes from the label."""
        if self.link is None or (side == "train" and not self.link.in_training):
            return None
        label = np.asarray(scan.label)
        probability = (label > 0).astype(np.float32) if output is None else output.foreground()
        foreground = label > 0 if side == "train" or output is None else output.labels() > 0
        path = self.unit.folder(self.plan).guide(scan.id)
        with atomic_write(path) as partial, partial.open("wb") as file:
            np.save(file, self.link.guide(probability, foreground))
        return path
