"""Predictions against references by a challenge's rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kitseg.errors import InputError, KitsegError, UsageError, format_error
from kitseg.labels import CYST, TUMOR, to_kits19
from kitseg.runtime.resume import Work, results
from kitseg.runtime.sharding import Share
from kitseg.scoring.case import Metrics, score
from kitseg.scoring.detection import Detection
from kitseg.scoring.kits19 import kits19_scores, mean_scores
from kitseg.scoring.protocols import PROTOCOLS, Protocol
from kitseg.scoring.strata import SIZES, THICKNESSES, in_order, size_class, thickness_class
from kitseg.splits import held_out
from kitseg.types import Volume
from kitseg.volumes.download import parse_cases
from kitseg.volumes.kits import CLINICAL, case_name, find_labels, read_clinical
from kitseg.volumes.nifti import read_labels

PROTOCOL = "kits19"


@dataclass(frozen=True)
class Rules:
    """What to score by.

    convention: of the label maps; distances: with what needs the surfaces and the single tumors and so takes seconds,
    or Dice alone (for kits19).
    """

    protocol: Protocol
    convention: str
    distances: bool = True


@dataclass(frozen=True)
class Score:
    """A case's figures per class; ``missing`` where there was no prediction, ``error`` where it can't be scored.

    strata: the groups that its reference belongs to, by kind; cysts: whether the prediction and the reference hold
    label 3.
    """

    case: str
    classes: Mapping[str, Metrics]
    missing: bool = False
    error: str = ""
    strata: Mapping[str, str] = field(default_factory=dict)
    detection: Detection | None = None
    cysts: tuple[bool, bool] = (False, False)

    @property
    def dice(self) -> dict[str, float]:
        """Dice per class."""
        return {name: dice for name, figures in self.classes.items() if (dice := figures["dice"]) is not None}


@dataclass(frozen=True)
class ScoreGroup:
    """Cases that are scored apart: all of them, a fold's, or a stratum's; mean Dice per class."""

    kind: str
    name: str
    cases: int
    dice: Mapping[str, float]


@dataclass(frozen=True)
class Job:
    """A case to score: its files, and further groups that it belongs to."""

    case: str
    prediction: Path | None
    reference: Path
    clinical: Mapping[str, str]


def rules(protocol: str, convention: str | None) -> Rules:
    """The rules of a protocol, by its own label convention where none is given.

    Raises:
        UsageError: there is no such protocol.
    """
    if protocol not in PROTOCOLS:
        raise UsageError(f"there is no protocol '{protocol}'; there are {', '.join(PROTOCOLS)}")
    return Rules(PROTOCOLS[protocol], convention or PROTOCOLS[protocol].convention)


def find_jobs(predictions: Path, references: Path, required: Sequence[str] = ()) -> tuple[list[Job], list[str]]:
    """The cases in ``predictions``, or the ``required`` ones, where a missing one counts as background.

    And the references that are left out, since nothing was predicted for them and nobody required them.

    Raises:
        UsageError: no case to score, or a required case without a reference.
    """
    # absolute, because worker processes may stand in another folder
    found, truth = find_labels(predictions.absolute()), find_labels(references.absolute())
    cases = sorted(required) or sorted(found)
    if lacking := [case for case in cases if case not in truth]:
        remedy = "move them elsewhere, or name the cases to score with --cases"
        raise UsageError(f"{references} has no reference for {', '.join(lacking)}: {remedy}")
    clinical = read_clinical(references / CLINICAL)
    jobs = [Job(case, found.get(case), truth[case], clinical.get(case, {})) for case in cases]
    return jobs, [] if required else sorted(truth.keys() - found.keys())


def score_work(jobs: Sequence[Job], rules: Rules) -> list[Work[Score]]:
    """The work on each case; one that fails doesn't stop the others."""
    return [Work(job.case, (job.prediction, job.reference), partial(_safely, job, rules)) for job in jobs]


def evaluate(jobs: Sequence[Job], rules: Rules, workers: int, on_done: Callable[[], None]) -> list[Score]:
    """Score cases, several at a time; one that fails doesn't stop the others."""
    return results(score_work(jobs, rules), None, Share(), workers, lambda _: on_done()) or []


def score_case(case: str, prediction: Path | None, reference: Path, rules: Rules, clinical: Mapping[str, str]) -> Score:
    """Score one case; a prediction that is missing or can't be used counts as background.

    clinical: further groups that the case belongs to.
    """
    try:
        truth = read_labels(reference, case, rules.convention)
    except KitsegError as error:
        return Score(case, {}, error=str(error))
    missing, problem = prediction is None, ""
    found = np.zeros_like(truth.array)
    if prediction is not None:
        try:
            found = _on_grid(prediction, case, reference, truth)
        except KitsegError as error:
            problem = f"{error} It counts as background."
    scored = _score(found, truth, rules)
    cysts = (bool((found == CYST).any()), bool((truth.array == CYST).any()))
    return replace(scored, missing=missing, error=problem, strata={**_strata(truth), **clinical}, cysts=cysts)


def mean_dice(scores: Sequence[Score]) -> dict[str, float]:
    """Mean Dice per class over the scored cases; empty where none could be scored."""
    scored = {score.case: score.dice for score in scores if score.dice}
    return mean_scores(scored) if scored else {}


def groups(scores: Sequence[Score], folds: Mapping[str, int]) -> list[ScoreGroup]:
    """The scores of all cases, of each fold's, and of each stratum's, strata of a kind in their natural order."""
    belongs = {s.case: {**({"fold": f"{folds[s.case]}"} if s.case in folds else {}), **s.strata} for s in scores}
    kinds = dict.fromkeys(kind for groups in belongs.values() for kind in groups)
    found = [ScoreGroup("all", "all", len(scores), mean_dice(scores))]
    for kind in kinds:
        for name in sorted({groups[kind] for groups in belongs.values() if kind in groups}, key=in_order):
            members = [score for score in scores if belongs[score.case].get(kind) == name]
            found.append(ScoreGroup(kind, name, len(members), mean_dice(members)))
    return found


def notes(scores: Sequence[Score], rules: Rules, unscored: Sequence[str] = ()) -> list[str]:
    """What a reader of the scores must know: references without a prediction, and how cysts (label 3) were counted."""
    scored = [score for score in scores if score.classes]
    found, true = (sum(score.cysts[side] for score in scored) for side in (0, 1))
    said, own = [], rules.protocol.convention
    if unscored:
        names = ", ".join(unscored[:5]) + (" and so on" if len(unscored) > 5 else "")
        said.append(f"{len(unscored)} references have no prediction and are not scored ({names}); --cases counts them")
    if scored and rules.convention == "kits23" and own == "kits23" and not found:
        there = f"the references of {true} of {len(scored)} cases do" if true else "nor does a reference"
        said.append(
            f"no prediction holds cysts (label 3), {there}: the mass of a model without cysts is its tumor alone; "
            "for references as KiTS19's, where cysts are kidney, give --convention kits19"
        )
    if rules.convention == "kits19" and own == "kits23":
        said.append("label convention kits19: cysts are kidney in the references, so mass is the same as tumor")
    if rules.convention == "kits19" and found:
        said.append(f"label 3 in the predictions of {found} cases is background: convention kits19 doesn't know it")
    return said


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


def _safely(job: Job, rules: Rules) -> Score:
    try:
        return score_case(job.case, job.prediction, job.reference, rules, job.clinical)
    except Exception as error:  # whatever it is, the other cases go on
        return Score(job.case, {}, error=format_error(job.case, error))


def _on_grid(prediction: Path, case: str, reference: Path, truth: Volume) -> NDArray[np.uint8]:
    """Read a prediction that lies on the reference's grid.

    Raises:
        InputError: it doesn't, or it can't be read.
    """
    found = read_labels(prediction, case, None, strict=False)
    if not found.geometry.same_as(truth.geometry, tolerance=0.1):
        problem = f"lies on another grid than {reference} (shape or affine)"
        raise InputError(prediction, problem, "Save it with the shape and affine of the scan.")
    return found.array


def _score(found: NDArray[np.uint8], truth: Volume, rules: Rules) -> Score:
    if rules.distances:
        scored = score(found, truth.array, truth.geometry.spacing, rules.protocol, rules.convention)
        return Score(truth.case_id, scored.metrics, detection=scored.detection)
    own, true = (rules.protocol.adopt(labels, rules.convention) for labels in (found, truth.array))
    return Score(truth.case_id, {name: {"dice": dice} for name, dice in kits19_scores(own, true).items()})


def _strata(truth: Volume) -> dict[str, str]:
    """The groups of a reference by the volume of its tumor and by its slices."""
    tumor_ml = int((to_kits19(truth.array) == TUMOR).sum()) * truth.geometry.voxel_ml
    thickness = thickness_class(truth.geometry.spacing[0])
    return {"tumor size": SIZES[size_class(tumor_ml)], "slices": THICKNESSES[thickness]}
