"""The progressive loop: train on, from the best weights so far, on a random part of the cases, until nothing improves.

Its whole state is what the finished rounds left in their folders, so a killed loop resumes with the unfinished round.
"""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path

from kitseg.config import StageSpec
from kitseg.models.run_folder import STAGE_INPUTS, TRAINED_STATE, StageFolder


def next_round(folder: StageFolder, spec: StageSpec) -> int | None:
    """The round to train now, 0 being the first training; None when the last one improved nothing or was the last."""
    scores = _scores(folder)
    most = 0 if spec.rounds is None else spec.rounds.most
    stuck = len(scores) > 1 and scores[-1] <= max(scores[:-1])
    return None if stuck or len(scores) > most else len(scores)


def prepare_round(folder: StageFolder, spec: StageSpec, number: int, seed: int) -> int:
    """Write where a round looks: all validation cases, and a random share of the training cases; how many these are."""
    content, round_ = STAGE_INPUTS.read(folder.places), folder.round(number)
    cases = sorted(content.train)
    if number and spec.rounds is not None:
        count = max(1, round(spec.rounds.share * len(cases)))
        cases = sorted(random.Random(f"{seed}/{number}").sample(cases, count))
    up = os.path.relpath(folder.path, round_.path)
    sides = {"train": {case: content.train[case] for case in cases}, "val": content.val}
    moved = {
        side: {case: replace(row, guide=row.guide and f"{up}/{row.guide}") for case, row in rows.items()}
        for side, rows in sides.items()
    }
    if not round_.places.exists():
        STAGE_INPUTS.write(round_.places, moved)
    return len(cases)


def best_weights(folder: StageFolder) -> Path:
    """The best checkpoint of the finished rounds."""
    return folder.round(_best(folder)).checkpoints()[0][0]


def describe_rounds(folder: StageFolder) -> str:
    """The finished rounds, as a text."""
    scores = _scores(folder)
    each = ", ".join(f"{score:.4f}" for score in scores)
    return f"validation scores by round {each}: the best is round {_best(folder)}"


def conclude(folder: StageFolder) -> None:
    """Record that the loop is done: the best round's checkpoints are the stage's."""
    best = _best(folder)
    found = TRAINED_STATE.read(folder.round(best).done)
    rows = [replace(row, file=f"round_{best}/{row.file}") for row in found.checkpoints]
    rounds = {"scores": _scores(folder), "best": best}
    TRAINED_STATE.write(folder.done, {"checkpoints": rows, "threshold": found.threshold, "rounds": rounds})


def _scores(folder: StageFolder) -> list[float]:
    """The best validation score of each finished round."""
    scores: list[float] = []
    while (done := folder.round(len(scores)).done).exists():
        scores.append(TRAINED_STATE.read(done).checkpoints[0].val_score or 0.0)
    return scores


def _best(folder: StageFolder) -> int:
    """The earliest round with the highest score."""
    scores = _scores(folder)
    return scores.index(max(scores))
