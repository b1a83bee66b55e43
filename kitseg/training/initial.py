"""Initial weights of a training: from a run, a fold, a bundle, a checkpoint file, or a model folder of nnU-Net."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kitseg import config
from kitseg.config import Method, StageSpec
from kitseg.errors import InputError, UsageError
from kitseg.models.members import only_member
from kitseg.models.run_folder import BEGINNING, Run, RunInfo, StageFolder, find_run
from kitseg.models.weights import read_weights, sound_checkpoints
from kitseg.runtime import console
from kitseg.runtime.files import file_digest
from kitseg.splits import read_split
from kitseg.stages.model import StageModel
from kitseg.training.nnunet import find_nnunet, stage_for

CHECKPOINTS = (".ckpt", ".safetensors")
SHOWN = 5  # names of weights on the screen; the run's record lists all


@dataclass(frozen=True)
class InitialWeights:
    """The checkpoint that each stage starts from, and the cases that it was trained on, if known.

    note: how what it was trained on differs from what the stages will see; empty where it doesn't.
    """

    stages: Mapping[str, Path]
    cases: Collection[str] = ()
    note: str = ""


def find_initial(model: str, method: Method, fold: int) -> InitialWeights:
    """The weights for a method's stages: a run's stages of the same names, or one checkpoint file for each.

    Of a run with several finished folds, ``fold`` is used if it is finished, else the first. A model of nnU-Net starts
    the last stage with such a network.

    Raises:
        UsageError: no model, several, or none with such a stage. InputError: damaged weights.
    """
    path = Path(model)
    if path.suffix in CHECKPOINTS and path.is_file():
        return InitialWeights(dict.fromkeys(method.stages, path))
    if (theirs := find_nnunet(model)) is not None:
        stage = stage_for(method.stages)
        theirs.check(stage)
        return InitialWeights({stage.name: theirs.checkpoint(fold)}, note=theirs.difference(stage))
    member, _ = only_member(model)
    run, given = find_run(member.run)
    used = _folds_used(run, given, list(method.stages), fold)
    if not used:
        raise UsageError(f"--init-from {model}: it has no trained stage named {' or '.join(method.stages)}")
    stages = {name: sound_checkpoints(run.stage(number, name))[0] for name, number in used.items()}
    note = _difference(run, {name: method.stages[name] for name in stages})
    return InitialWeights(stages, _training_cases(run, set(used.values())), note)


def learned_before(model: str, count: int) -> RunInfo | None:
    """The facts of the model that initial weights are from, where they are known.

    learned: with those of ``count`` folds that they start instead of the model's own.
    """
    path = Path(model)
    if (path.suffix in CHECKPOINTS and path.is_file()) or find_nnunet(model) is not None:
        return None
    run, given = find_run(only_member(model)[0].run)
    info, names = run.read_info(), list(config.method_of(config.read(run.config)).stages)
    starts = [set(_folds_used(run, given, names, fold).values()) for fold in range(count)]
    learned = {
        sha256: tuple(number for number, used in enumerate(starts) if used.intersection(folds))
        for sha256, folds in info.learned.items()
    }
    return replace(info, learned=learned)


def _folds_used(run: Run, given: int | None, stages: Sequence[str], fold: int) -> dict[str, int]:
    """The fold of a run whose network each stage of a fold starts from, of those stages that it has trained."""
    used = {}
    for name in stages:
        there = [given] if given is not None and run.stage(given, name).done.exists() else run.folds(name)
        if there:
            used[name] = fold if fold in there else there[0]
    return used


def start_from(module: StageModel, path: Path, folder: StageFolder, loud: bool) -> None:
    """Load those weights of a checkpoint that match by name and shape.

    loud: print the matching and missing weights, and write them to the training's ``initial.json``.

    Raises:
        InputError: no weights match, or the file is damaged; no code in it is executed.
    """
    own, theirs = module.state_dict(), find_nnunet(str(path.parent))
    found = read_weights(path, torch.device("cpu")) if theirs is None else theirs.weights(path, module.channels)
    taken = {name: found[name] for name in own if name in found and found[name].shape == own[name].shape}
    if not taken:
        raise InputError(path, "contains no weights that match this stage by name and shape", "Choose another model.")
    module.load_state_dict({**own, **taken})
    if not loud:
        return
    fresh = {
        name: f"{tuple(found[name].shape)} there, {tuple(value.shape)} here" if name in found else "not there"
        for name, value in own.items()
        if name not in taken
    }
    unused = sorted(found.keys() - own.keys())
    record: dict[str, Any] = {"checkpoint": str(path), "sha256": file_digest(path), "taken": len(taken)}
    BEGINNING.write(folder.initial, {**record, "fresh": fresh, "unused": unused})
    console.print_plain(f"{folder.path.name}: {len(taken)} of {len(own)} weights from {path}")
    for title, names in (("start fresh", [f"{name} ({why})" for name, why in fresh.items()]), ("not used", unused)):
        if names:
            more = f" and {len(names) - SHOWN} more (initial.json)" if len(names) > SHOWN else ""
            console.print_plain(f"  {title}: {', '.join(names[:SHOWN])}{more}")


def _difference(run: Run, stages: Mapping[str, StageSpec]) -> str:
    """A line on the stages that a run trained on another grid or intensity scaling; empty where there are none."""
    theirs = config.method_of(config.read(run.config)).stages
    odd = [
        name
        for name, spec in stages.items()
        if (theirs[name].grid, theirs[name].parts["intensity"]) != (spec.grid, spec.parts["intensity"])
    ]
    return f"{run.config}: {' and '.join(odd)} learned on another grid or from HU scaled otherwise" if odd else ""


def _training_cases(run: Run, folds: Collection[int]) -> set[str]:
    """The cases that networks of these folds were trained on; a bundle states only those of all folds."""
    if not run.split.exists():
        return set(run.read_info().cases)
    split = read_split(run.split)
    return {case for fold in folds for case in split.folds[fold].train}
