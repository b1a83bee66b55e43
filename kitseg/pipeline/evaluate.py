"""Predictions against references by the KiTS19 rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kitseg.errors import InputError, KitsegError, UsageError
from kitseg.files import write_json
from kitseg.labels import to_kits19
from kitseg.scoring.kits19 import kits19_scores, mean_scores
from kitseg.splits import held_out
from kitseg.volumes.download import parse_cases
from kitseg.volumes.kits import case_name, find_labels
from kitseg.volumes.nifti import read_labels

SCHEMA = 1
PROTOCOL = "kits19"


@dataclass(frozen=True)
class Score:
    """A case's Dice per class; ``missing`` where there was no prediction, ``error`` where it can't be scored."""

    case: str
    dice: dict[str, float]
    missing: bool = False
    error: str = ""


def evaluate(predictions: Path, references: Path, convention: str, required: Sequence[str] = ()) -> list[Score]:
    """Score the cases in ``predictions``, or the ``required`` ones, where a missing one counts as background.

    Raises:
        UsageError: no case to score, or a required case without a reference.
    """
    found, truth = find_labels(predictions), find_labels(references)
    cases = sorted(required) or sorted(found)
    if lacking := [case for case in cases if case not in truth]:
        raise UsageError(f"{references} has no reference for {', '.join(lacking)}")
    return [_score(case, found.get(case), truth[case], convention) for case in cases]


def write_scores(path: Path, scores: Sequence[Score], convention: str) -> None:
    """Write the scores as JSON."""
    cases = {s.case: {name: {"dice": dice} for name, dice in s.dice.items()} for s in scores if s.dice}
    mean = {name: {"dice": dice} for name, dice in mean_dice(scores).items()}
    content: dict[str, Any] = {"protocol": PROTOCOL, "convention": convention, "cases": cases, "mean": mean}
    content["missing"] = [score.case for score in scores if score.missing]
    content["failed"] = {score.case: score.error for score in scores if score.error}
    write_json(path, SCHEMA, content)


def mean_dice(scores: Sequence[Score]) -> dict[str, float]:
    """Mean Dice per class over the scored cases; empty where none could be scored."""
    scored = {score.case: score.dice for score in scores if score.dice}
    return mean_scores(scored) if scored else {}


def _score(case: str, prediction: Path | None, reference: Path, convention: str) -> Score:
    try:
        truth = read_labels(reference, case, convention)
    except KitsegError as error:
        return Score(case, {}, error=str(error))
    nothing = _dice(np.zeros_like(truth.array), truth.array, convention)
    if prediction is None:
        return Score(case, nothing, missing=True)
    try:
        found = read_labels(prediction, case, None)
        if not found.geometry.same_as(truth.geometry, tolerance=0.1):
            problem = f"lies on another grid than {reference} (shape or affine)"
            raise InputError(prediction, problem, "Save it with the shape and affine of the scan.")
        return Score(case, _dice(found.array, truth.array, convention))
    except KitsegError as error:
        return Score(case, nothing, error=f"{error} It counts as background.")


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
