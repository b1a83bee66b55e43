"""Predictions against references by the KiTS19 rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kitseg.errors import InputError, KitsegError, UsageError
from kitseg.files import write_json
from kitseg.labels import TUMOR, to_kits19
from kitseg.scoring.kits19 import kits19_scores, mean_scores
from kitseg.scoring.strata import SIZES, THICKNESSES, in_order, size_class, thickness_class
from kitseg.splits import held_out
from kitseg.types import Volume
from kitseg.volumes.download import parse_cases
from kitseg.volumes.kits import CLINICAL, case_name, find_labels, read_clinical
from kitseg.volumes.nifti import read_labels

SCHEMA = 1
PROTOCOL = "kits19"


@dataclass(frozen=True)
class Score:
    """A case's Dice per class; ``missing`` where there was no prediction, ``error`` where it can't be scored.

    strata: the groups that its reference belongs to, by kind.
    """

    case: str
    dice: Mapping[str, float]
    missing: bool = False
    error: str = ""
    strata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """Cases that are scored apart: all of them, a fold's, or a stratum's; mean Dice per class."""

    kind: str
    name: str
    cases: int
    dice: Mapping[str, float]


def evaluate(predictions: Path, references: Path, convention: str, required: Sequence[str] = ()) -> list[Score]:
    """Score the cases in ``predictions``, or the ``required`` ones, where a missing one counts as background.

    Raises:
        UsageError: no case to score, or a required case without a reference.
    """
    found, truth = find_labels(predictions), find_labels(references)
    cases = sorted(required) or sorted(found)
    if lacking := [case for case in cases if case not in truth]:
        raise UsageError(f"{references} has no reference for {', '.join(lacking)}")
    clinical = read_clinical(references / CLINICAL)
    return [score_case(case, found.get(case), truth[case], convention, clinical.get(case, {})) for case in cases]


def score_case(
    case: str, prediction: Path | None, reference: Path, convention: str, clinical: Mapping[str, str]
) -> Score:
    """Score one case; a prediction that is missing or can't be used counts as background.

    clinical: further groups that the case belongs to.
    """
    try:
        truth = read_labels(reference, case, convention)
    except KitsegError as error:
        return Score(case, {}, error=str(error))
    nothing = Score(
        case, _dice(np.zeros_like(truth.array), truth.array, convention), strata={**_strata(truth), **clinical}
    )
    if prediction is None:
        return replace(nothing, missing=True)
    try:
        found = read_labels(prediction, case, None)
        if not found.geometry.same_as(truth.geometry, tolerance=0.1):
            problem = f"lies on another grid than {reference} (shape or affine)"
            raise InputError(prediction, problem, "Save it with the shape and affine of the scan.")
        return replace(nothing, dice=_dice(found.array, truth.array, convention))
    except KitsegError as error:
        return replace(nothing, error=f"{error} It counts as background.")


def write_scores(path: Path, scores: Sequence[Score], convention: str, folds: Mapping[str, int] | None = None) -> None:
    """Write the scores as JSON; ``folds``: in which fold each case was validated."""
    content: dict[str, Any] = {"protocol": PROTOCOL, "convention": convention}
    content["cases"] = {s.case: _by_class(s.dice) for s in scores if s.dice}
    content["mean"] = _by_class(mean_dice(scores))
    content["strata"] = {s.case: dict(s.strata) for s in scores if s.strata}
    content["folds"] = dict(folds or {})
    content["groups"] = [{**asdict(group), "dice": dict(group.dice)} for group in groups(scores, folds or {})]
    content["missing"] = [score.case for score in scores if score.missing]
    content["failed"] = {score.case: score.error for score in scores if score.error}
    write_json(path, SCHEMA, content)


def mean_dice(scores: Sequence[Score]) -> dict[str, float]:
    """Mean Dice per class over the scored cases; empty where none could be scored."""
    scored = {score.case: score.dice for score in scores if score.dice}
    return mean_scores(scored) if scored else {}


def groups(scores: Sequence[Score], folds: Mapping[str, int]) -> list[Group]:
    """The scores of all cases, of each fold's, and of each stratum's, strata of a kind in their natural order."""
    belongs = {s.case: {**({"fold": f"{folds[s.case]}"} if s.case in folds else {}), **s.strata} for s in scores}
    kinds = dict.fromkeys(kind for groups in belongs.values() for kind in groups)
    found = [Group("all", "all", len(scores), mean_dice(scores))]
    for kind in kinds:
        for name in sorted({groups[kind] for groups in belongs.values() if kind in groups}, key=in_order):
            members = [score for score in scores if belongs[score.case].get(kind) == name]
            found.append(Group(kind, name, len(members), mean_dice(members)))
    return found


def _by_class(dice: Mapping[str, float]) -> dict[str, dict[str, float]]:
    return {name: {"dice": value} for name, value in dice.items()}


def _strata(truth: Volume) -> dict[str, str]:
    """The groups of a reference by the volume of its tumor and by its slices."""
    tumor_ml = int((to_kits19(truth.array) == TUMOR).sum()) * truth.geometry.voxel_ml
    thickness = thickness_class(truth.geometry.spacing[0])
    return {"tumor size": SIZES[size_class(tumor_ml)], "slices": THICKNESSES[thickness]}


def _dice(found: NDArray[np.uint8], truth: NDArray[np.uint8], convention: str) -> dict[str, float]:
    """KiTS19 Dice; cysts are kidney where the convention has them, and any other strange value is background."""
    if convention == "kits23":
        found, truth = to_kits19(found), to_kits19(truth)
    return kits19_scores(found, truth)


def required_cases(numbers: str | None, split: Path | None, fold: int | None) -> list[str]:
    """The cases that must be there: from ``--cases 210-299``, a split file's test set, or a fold's validation cases.

    Raises:
        UsageError: both are given, or the split has no such cases.
    """
    if numbers and split:
        raise UsageError("--cases and --split both say what must be there; give one of them")
    if numbers:
        return [case_name(number) for number in parse_cases(numbers)]
    return held_out(split, fold)
