"""Where each stage looks at each case, and what it is told there by the stage before it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kitseg import __version__, config
from kitseg.config import StageSpec
from kitseg.inference.chain import Output, Predictor, run_on_grid
from kitseg.links.regions import RegionContext
from kitseg.models.model import build_input_transform, open_stage
from kitseg.models.run_folder import SCHEMA, STAGE_INPUTS, StageFolder, StageInputRow
from kitseg.models.training_domain import training_facts
from kitseg.patches.datamodule import StageCases
from kitseg.patches.subjects import StageInput
from kitseg.runtime.console import bar
from kitseg.runtime.device import torch_device
from kitseg.runtime.files import atomic_write, write_json
from kitseg.training.plan import Plan, Unit, open_stored
from kitseg.types import Box

Places = Mapping[str, StageInput]


def prepare(plan: Plan, unit: Unit) -> None:
    """Write where a training looks at its cases, and what the run learned from."""
    folder, part = unit.folder(plan), unit.part(plan)
    spec = plan.method.stages[unit.stage]
    if not folder.places.exists():
        train = _find(plan, unit, part.train, "train")
        write_places(folder, train, _find(plan, unit, part.val, "val"))
    if not plan.run.info.exists():
        cases = (open_stored(plan, spec, case) for case in sorted(plan.split.cases - set(plan.split.test)))
        write_json(plan.run.info, SCHEMA, {"kitseg": __version__, **training_facts(cases)})


def write_places(folder: StageFolder, train: Places, val: Places) -> None:
    """Write where a stage looks at each case; guides are named by their path from the stage's folder."""

    def plain(places: Places) -> dict[str, Any]:
        return {case: _plain(place, folder) for case, place in places.items()}

    write_json(folder.places, SCHEMA, {"train": plain(train), "val": plain(val)})


def read_places(folder: StageFolder, store: Path) -> StageCases:
    """The stored cases of a stage and where it looks at each."""
    content = STAGE_INPUTS.read(folder.places)
    train, val = (
        {store / case: _place(row, folder) for case, row in rows.items()} for rows in (content.train, content.val)
    )
    return StageCases(train, val)


def _plain(place: StageInput, folder: StageFolder) -> dict[str, Any]:
    box, guide = place.box, place.guide
    return {
        "box": None if box is None else [*box.start, *box.stop],
        "guide": None if guide is None else os.path.relpath(guide, folder.path),
    }


def _place(row: StageInputRow, folder: StageFolder) -> StageInput:
    guide = None if row.guide is None else folder.path / row.guide
    return StageInput(None if row.box is None else Box(row.box[:3], row.box[3:]), guide)


def _find(plan: Plan, unit: Unit, cases: Sequence[str], side: str) -> dict[str, StageInput]:
    """The places of a stage's cases.

    For validation from the earlier stage's own predictions; for training from predictions of its inner folds, or from
    the labels, which also stand in where the earlier stage found nothing.
    A training case without any foreground has no region to learn from and is left out.
    """
    spec = plan.method.stages[unit.stage]
    region = config.build(spec.parts["region"])
    if not spec.inputs:
        scans = ((case, open_stored(plan, spec, case)) for case in cases)  # one at a time: each keeps files open
        return {case: StageInput(region(RegionContext(scan.grid, hu=scan.image))) for case, scan in scans}
    earlier = plan.method.stages[spec.inputs[0]]
    guided = side == "val" or spec.guide == "out_of_fold"
    predictors = _predictors(plan, earlier, cases, side == "train") if guided else {}
    found: dict[str, StageInput] = {}
    with bar(f"{spec.name}: where to look ({side})", len(cases)) as step:
        for case in cases:
            output = _output(plan, earlier, case, predictors.get(case))
            scan = open_stored(plan, spec, case)
            box = None if output is None else region(RegionContext(scan.grid, output.labels(), output.grid, scan.image))
            if box is None and side == "train":
                box = region(RegionContext(scan.grid, np.asarray(scan.label), scan.grid, scan.image))
            if box is not None or side == "val":
                found[case] = StageInput(box, _guide(plan, unit, case, output, side == "train"))
            step()
    return found


def _output(plan: Plan, earlier: StageSpec, case: str, predictor: Predictor | None) -> Output | None:
    """What the earlier stage believes of a case; None where nobody is asked."""
    if predictor is None:
        return None
    seen = open_stored(plan, earlier, case)
    return run_on_grid(seen.image, seen.grid, predictor, earlier.heads[-1], {})


def _guide(plan: Plan, unit: Unit, case: str, output: Output | None, training: bool) -> Path | None:
    """Write what a stage with a link is told about a case; in training its mask comes from the label."""
    spec = plan.method.stages[unit.stage]
    link = build_input_transform(spec).link
    if link is None or (training and not link.in_training):
        return None
    label = np.asarray(open_stored(plan, spec, case).label)
    probability = (label > 0).astype(np.float32) if output is None else output.foreground()
    foreground = label > 0 if training or output is None else output.labels() > 0
    path = unit.folder(plan).guide(case)
    with atomic_write(path) as partial, partial.open("wb") as file:
        np.save(file, link.guide(probability, foreground))
    return path


def _predictors(plan: Plan, earlier: StageSpec, cases: Iterable[str], inner: bool) -> dict[str, Predictor]:
    """Who predicts a case without having learned from it."""
    outer = plan.run.stage(plan.fold, earlier.name)
    stage = open_stage(earlier, torch_device(plan.machine.device))
    if not inner:
        return dict.fromkeys(cases, stage.trained_in(outer))
    judges = [stage.trained_in(outer.inner(number)) for number in range(len(plan.part.inner))]
    return {case: judge for judge, part in zip(judges, plan.part.inner, strict=True) for case in part.val}
