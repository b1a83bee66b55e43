"""Whose probabilities are averaged: a run, several runs, or what an ensemble file says.

An ensemble file (``kitseg choose`` writes one) is YAML: ``schema``, ``members`` (each a ``run``, relative to the file,
a ``weight`` and whether to ``mirror``) and ``postprocess``, the priors that clean the mean, in order.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from kitseg import config, ensemble
from kitseg.errors import InputError, KitsegError, UsageError
from kitseg.files import write_text
from kitseg.measure.quality import Experience
from kitseg.pipeline.experience import model_experience, together
from kitseg.pipeline.model import Model, open_model
from kitseg.runs import Run
from kitseg.types import Probabilities, Volume

SCHEMA = 1


@dataclass(frozen=True)
class Member:
    """A run (its folds averaged) or one fold of it, its weight, and whether each scan is also seen mirrored."""

    run: Path
    weight: float = 1.0
    mirror: bool = False


@dataclass(frozen=True)
class Ensemble:
    """Opened models with their weights, and the post-processing of their mean."""

    models: tuple[Model, ...]
    weights: tuple[float, ...]
    postprocess: Mapping[str, Any]

    def believe(self, scan: Volume) -> tuple[Probabilities, dict[str, float] | None]:
        """The weighted mean over the models and their folds, which share a model's weight; one at a time in memory.

        And how far they agree by class (see ``ensemble.Votes``), None where there is but one.
        """
        votes = ensemble.Votes()
        channels = ensemble.common_channels([tuple(model.method.outputs) for model in self.models])
        most = max(len(model.folds) for model in self.models)
        members = (
            (ensemble.convert(belief, channels), weight * most / len(model.folds))
            for model, weight in zip(self.models, self.weights, strict=True)
            for belief in model.predict(scan, model.method.outputs)
        )
        return ensemble.mean(votes.watch(members)), votes.agreement()

    def experience(self) -> Experience | None:
        """What the models saw in training, taken together; None where one of them doesn't say."""
        return together([model_experience(model.run) for model in self.models])

    def origin(self) -> list[dict[str, Any]]:
        """Which models made a result."""
        pairs = zip(self.models, self.weights, strict=True)
        return [{**origin(model), "weight": weight} for model, weight in pairs]

    def describe(self) -> str:
        """The models, a line each, and what can't be checked."""
        unchecked = "contrast phase and spacing are not checked: the model doesn't say what it was trained with"
        return "\n".join([*map(describe, self.models), *([] if self.experience() else [unchecked])])


def open_ensemble(
    paths: Sequence[Path],
    device: str,
    weights: Sequence[float] = (),
    mirror: bool = False,
    engine: str = "auto",
    precision: str = "auto",
) -> Ensemble:
    """Open runs, folds of runs, and ensemble files; the post-processing is the first one's.

    engine, precision: see ``open_model``.

    Raises:
        UsageError: no run, or weights that don't fit. InputError: a damaged file, or a run that isn't trained.
    """
    shares = list(weights) if weights else [1.0] * len(paths)
    if len(shares) != len(paths) or not ensemble.can_weigh(shares):
        raise UsageError(f"{len(paths)} models need as many weights that aren't negative, not {shares}")
    members, recipes = [], []
    for path, share in zip(paths, shares, strict=True):
        found, recipe = read_ensemble(path) if path.is_file() else ([Member(path)], None)
        members += [replace(m, weight=share * m.weight, mirror=mirror or m.mirror) for m in found]
        recipes.append(recipe)
    models = tuple(
        open_model(member.run, device, mirror=member.mirror, engine=engine, precision=precision) for member in members
    )
    steps = models[0].method.postprocess if recipes[0] is None else recipes[0]
    return Ensemble(models, tuple(member.weight for member in members), steps)


def write_ensemble(
    path: Path, members: Sequence[Member], postprocess: Mapping[str, Any], why: Mapping[str, Any]
) -> None:
    """Write an ensemble file; ``why``: the figures that it was chosen by."""
    rows = [
        {"run": os.path.relpath(m.run, path.absolute().parent), "weight": m.weight, "mirror": m.mirror} for m in members
    ]
    content = {"schema": SCHEMA, "members": rows, "postprocess": dict(postprocess), "chosen": dict(why)}
    write_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def read_ensemble(path: Path) -> tuple[list[Member], Mapping[str, Any]]:
    """The members and the post-processing of an ensemble file.

    Raises:
        InputError: unreadable, of another schema, or not what ``write_ensemble`` writes.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']}, this version reads {SCHEMA}")
        members = [
            Member(path.parent / row["run"], float(row.get("weight", 1)), _yes_or_no(row.get("mirror", False)))
            for row in content["members"]
        ]
        steps = dict(content["postprocess"] or {})
        if odd := [name for name, step in steps.items() if not _is_prior(step)]:
            raise ValueError(f"postprocess: {', '.join(odd)} is no prior of kitseg.postprocess")
        if not ensemble.can_weigh([member.weight for member in members]):
            raise ValueError("it needs members, with weights that aren't negative")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        remedy = "Write it with `kitseg choose`, or give a run's folder."
        raise InputError(path, f"is no ensemble file ({type(error).__name__}: {reason})", remedy) from error
    return members, steps


def _yes_or_no(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"mirror is true or false, not {value!r}")
    return value


def _is_prior(step: Any) -> bool:
    return isinstance(step, dict) and str(step.get("_target_")).startswith("kitseg.postprocess.")


def describe(model: Model) -> str:
    """The model in a line, with a word where it learned from phantoms."""
    phantoms = "; it learned from phantoms, not from patients" if model_facts(model)["phantom"] else ""
    mirrored = "; each scan also mirrored" if model.mirror else ""
    folds = ", ".join(map(str, model.folds))
    where = f"{model.device} with {computed_with(model)}"
    return f"model: {model.run.path} ({model.method.name}, fold {folds}) on {where}{phantoms}{mirrored}"


def computed_with(model: Model) -> str:
    """What runs a model's networks, and in which precision."""
    return "; ".join(dict.fromkeys(map(str, model.engines.values())))


def choose_run(runs: Path) -> Run:
    """The only finished run that learned from patients' scans.

    Raises:
        UsageError: there is none, or there are several.
    """
    folders = (path for path in sorted(runs.glob("*")) if not re.search(r"\.old-\d+$", path.name))
    finished = [run for run in map(Run, folders) if run.config.exists() and _is_finished(run)]
    real = [run for run in finished if not model_facts(run)["phantom"]]
    if len(real) == 1:
        return real[0]
    if real:
        raise UsageError("several runs are finished; pick one with --model: " + ", ".join(str(r.path) for r in real))
    hint = (
        f" ({', '.join(str(run.path) for run in finished)} learned from phantoms: name it with --model)"
        if finished
        else ""
    )
    raise UsageError(f"{runs} holds no finished run{hint}; train one with `kitseg train`, or give --model")


def model_facts(model: Model | Run) -> dict[str, Any]:
    """What a run says of its training: whether it learned from phantoms, with which version."""
    run = model.run if isinstance(model, Model) else model
    info = run.read_info()
    return {"phantom": info["phantom"], "trained_with": info["kitseg"]}


def origin(model: Model) -> dict[str, Any]:
    """Which model made a result."""
    return {
        "path": str(model.run.path),
        "folds": model.folds,
        "mirror": model.mirror,
        "engine": computed_with(model),
        "sha256": model.digest(),
        **model_facts(model),
    }


def _is_finished(run: Run) -> bool:
    try:
        last = list(config.method_of(config.read(run.config)).stages)[-1]
        return bool(run.folds(last)) and run.info.exists()
    except KitsegError:
        return False
