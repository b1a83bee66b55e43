"""Score predictions against references by a challenge's protocol."""

from __future__ import annotations

import filecmp
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kitseg.commands.case_record import is_predicted, recorded_learning, recorded_models, scheme_beside, stated_beside
from kitseg.errors import InputError, KitsegError, UsageError, format_error
from kitseg.labels import CYST, TUMOR, UNKNOWN, Scheme, scheme_of
from kitseg.runtime.files import file_digest
from kitseg.runtime.resume import Task
from kitseg.scoring.case import CaseScore, Metrics, dice_scores, score
from kitseg.scoring.detection import Detection
from kitseg.scoring.kits19 import mean_scores
from kitseg.scoring.protocols import PROTOCOLS, Protocol
from kitseg.scoring.strata import THICKNESSES, in_order, size_of_volume, thickness_class
from kitseg.splits import held_out, read_split
from kitseg.types import Volume
from kitseg.volumes.check import refuse_scans
from kitseg.volumes.download import KITS23, SOURCES, parse_cases
from kitseg.volumes.kits import find_labels
from kitseg.volumes.names import case_name, pair, shorten
from kitseg.volumes.nifti import read_labels
from kitseg.volumes.references import Shown, labels_digest, read_reference
from kitseg.volumes.scan import check_grid
from kitseg.volumes.tables import CLINICAL, PATIENTS, read_clinical, read_patients


@dataclass(frozen=True)
class Rules:
    """The scoring rules.

    scheme: of the references, and of predictions where ``scheme_beside`` finds none; distances: whether to compute
    surface distances and detection, which takes seconds, or only Dice.
    """

    protocol: Protocol
    scheme: Scheme
    distances: bool = True


@dataclass(frozen=True)
class Score:
    """A case's metrics per class; ``missing`` where there was no prediction, ``error`` where it can't be scored.

    strata: the groups that its reference belongs to, by kind; detection, cyst_detection: of each tumor and cyst; cysts:
    whether the prediction and the reference hold cysts; strange: whether the prediction holds values that are no
    labels; itself: whether prediction and reference are one file, or hold the same bytes; learned_from: the models of
    the prediction that learned from the scan, by its record; doubts: about the reference's place in the patient;
    reference: the hash of its labels, the same whatever the format of its file; models: those of the prediction, by its
    record; prediction: the hash of its file; shown: what that shows; swapped: whether networks made the reference, and
    not the prediction.
    """

    case: str
    classes: Mapping[str, Metrics]
    missing: bool = False
    error: str = ""
    strata: Mapping[str, str] = field(default_factory=dict)
    detection: Detection | None = None
    cysts: tuple[bool, bool] = (False, False)
    cyst_detection: Detection | None = None
    strange: bool = False
    itself: bool = False
    learned_from: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    reference: str = ""
    models: tuple[str, ...] = ()
    prediction: str = ""
    shown: Shown | None = None
    swapped: bool = False

    @property
    def dice(self) -> dict[str, float]:
        """Dice per class."""
        return {name: dice for name, metrics in self.classes.items() if (dice := metrics["dice"]) is not None}


@dataclass(frozen=True)
class ScoreGroup:
    """A group of the cases that could be scored: all of them, a fold's, or a stratum's; mean Dice per class."""

    kind: str
    name: str
    cases: int
    dice: Mapping[str, float]


@dataclass(frozen=True)
class Job(Task):
    """A case to score: its files, None for a missing prediction, and the clinical groups that it belongs to."""

    prediction: Path | None
    reference: Path
    clinical: Mapping[str, str] = field(default_factory=dict)

    @property
    def files(self) -> tuple[Path, ...]:
        """The reference, and the prediction with what states how it is read."""
        return (self.reference, *([self.prediction, *stated_beside(self.prediction)] if self.prediction else []))


def rules(protocol: str, scheme: Scheme | None, split: Path | None = None) -> Rules:
    """The rules of a protocol for references of a scheme.

    Without a scheme it is the protocol's, or a split file's where that has the same ids, and perhaps other regions, or
    where the protocol's doesn't read its ids alike.

    Raises:
        UsageError: an unknown protocol. InputError: the split file can't be used.
    """
    if protocol not in PROTOCOLS:
        raise UsageError(f"unknown protocol '{protocol}'. Choose from {', '.join(PROTOCOLS)}")
    usual = scheme_of(PROTOCOLS[protocol].labels)
    if scheme is None and split:
        known = read_split(split).scheme
        scheme = known if known.ids == usual.ids or not known.is_read_by(usual) else None
    return Rules(PROTOCOLS[protocol], scheme or usual)


@dataclass(frozen=True)
class Unscored:
    """What isn't scored: references without a prediction that aren't required, and predictions without a reference."""

    references: tuple[str, ...] = ()
    predictions: tuple[str, ...] = ()


def find_jobs(predictions: Path, references: Path, required: Sequence[str] = ()) -> tuple[list[Job], Unscored]:
    """The cases in ``predictions``, or the ``required`` ones, where a missing one counts as background; and the others.

    Raises UsageError: no case has a reference, or a required one has none.
    """
    # absolute, because worker processes may have another working directory
    found, truth = find_labels(predictions.absolute()), find_labels(references.absolute())
    refuse_scans(predictions, found)
    refuse_scans(references, truth)
    known = pair(required or found, truth)
    lacking = sorted(set(required or found) - known.keys())
    if lacking and (required or not known):
        remedy = "Give the folder that holds them, or select the cases to score with --cases"
        raise UsageError(f"{references} has no reference for {shorten(lacking)}. {remedy}")
    cases, clinical = sorted(known.values()), read_clinical(references / CLINICAL)
    predicted, named = (pair(cases, others) for others in (found, clinical))
    jobs = [
        Job(case, found.get(predicted.get(case, "")), truth[case], clinical.get(named.get(case, ""), {}))
        for case in cases
    ]
    return jobs, Unscored(() if required else tuple(sorted(truth.keys() - set(cases))), tuple(lacking))


def patients_of(jobs: Sequence[Job], references: Path) -> dict[str, str]:
    """The patients of cases by ``patients.csv`` beside the references. Raises InputError: it names no reference."""
    table = read_patients(references / PATIENTS)
    if table and not pair(find_labels(references), table):
        raise InputError(references / PATIENTS, "names none of the references", "Fix the names, or move the file away.")
    return {case: table[name] for case, name in pair([job.case for job in jobs], table).items()}


def score_case(job: Job, rules: Rules) -> Score:
    """Score one case; a prediction that is missing or can't be used counts as background. Never raises."""
    try:
        truth = read_reference(job.reference, job.case, rules.scheme)
        found, problem, digest, shown = np.zeros_like(truth.array), "", "", None
        try:
            if job.prediction is not None:
                digest = file_digest(job.prediction)
                own_scheme = scheme_beside(job.prediction) or rules.scheme
                prediction = read_labels(job.prediction, job.case, own_scheme, strict=False)
                check_grid(job.prediction, prediction.geometry, truth.geometry, str(job.reference))
                found, shown = prediction.array, Shown.of(prediction)
        except KitsegError as error:
            problem = f"{str(error).removesuffix('.')}. It counts as background."
        if rules.distances:
            scored = score(found, truth.array, truth.geometry.spacing, rules.protocol, rules.scheme)
        else:
            quick = dice_scores(found, truth.array, rules.protocol, rules.scheme)
            scored = CaseScore({name: {"dice": dice} for name, dice in quick.items()})
        return Score(
            job.case,
            scored.metrics,
            job.prediction is None,
            problem,
            {**_strata(truth), **job.clinical},
            scored.detection,
            (bool((found == CYST).any()), bool((truth.array == CYST).any())),
            scored.cysts,
            bool((found == UNKNOWN).any()),
            job.prediction is not None and not problem and filecmp.cmp(job.prediction, job.reference, shallow=False),
            recorded_learning(job.prediction) if job.prediction else (),
            truth.native.doubts,
            labels_digest(truth),
            recorded_models(job.prediction) if job.prediction else (),
            digest,
            shown,
            job.prediction is not None and is_predicted(job.reference) and not is_predicted(job.prediction),
        )
    except Exception as error:  # the other cases continue, whatever the error
        return Score(job.case, {}, error=format_error(job.case, error))


def mean_dice(scores: Sequence[Score]) -> dict[str, float]:
    """Mean Dice per class over the scored cases; empty where none could be scored."""
    scored = {score.case: score.dice for score in scores if score.dice}
    return mean_scores(scored) if scored else {}


def groups(scores: Sequence[Score], folds: Mapping[str, int]) -> list[ScoreGroup]:
    """The scores of all cases, of each fold's, and of each stratum's, strata of a kind in their natural order.

    A case that can't be scored, such as one whose reference can't be read, is in no group.
    """
    scores = [score for score in scores if score.classes]
    belongs = {s.case: {**({"fold": f"{folds[s.case]}"} if s.case in folds else {}), **s.strata} for s in scores}
    kinds = dict.fromkeys(kind for groups in belongs.values() for kind in groups)
    found = [ScoreGroup("all", "all", len(scores), mean_dice(scores))]
    for kind in kinds:
        for name in sorted({groups[kind] for groups in belongs.values() if kind in groups}, key=in_order):
            members = [score for score in scores if belongs[score.case].get(kind) == name]
            found.append(ScoreGroup(kind, name, len(members), mean_dice(members)))
    return found


def notes(scores: Sequence[Score], rules: Rules, unscored: Unscored) -> list[str]:
    """Notes on the scores: what they can't be trusted for, references without a prediction, how cysts were counted."""
    scored = [score for score in scores if score.classes]
    found, true = (sum(score.cysts[side] for score in scored) for side in (0, 1))
    lines, strange = [], sum(score.strange for score in scored)
    if same := [score.case for score in scored if score.itself]:
        what = (
            f"{len(same)} of {len(scores)} predictions are the reference file itself or a copy of it ({shorten(same)})"
        )
        lines.append(f"{what}: these scores measure nothing; give the folder of the predictions")
    if swapped := [score.case for score in scored if score.swapped]:
        what = f"{len(swapped)} references are predictions of kitseg, whose predictions are not ({shorten(swapped)})"
        lines.append(f"{what}: give the folder of the predictions first, then that of the references")
    if learned := [score.case for score in scored if score.learned_from]:
        what = f"the networks learned from the scans of {len(learned)} of {len(scores)} cases ({shorten(learned)})"
        lines.append(f"{what}: these scores are no measure for new scans")
    if len(by_model := Counter(" + ".join(score.models) for score in scored if score.models)) > 1:
        counts = ", ".join(f"{name} ({count})" for name, count in sorted(by_model.items()))
        lines.append(f"the predictions are of different models: {counts}; predict again into another folder")
    if alone := unscored.predictions:
        lines.append(f"{len(alone)} predictions without a reference are not scored ({shorten(alone)})")
    if alone := unscored.references:
        names = shorten(alone)
        remedy = "--split includes them, as background; so does --cases with numbers of the challenge"
        lines.append(f"{len(alone)} references without a prediction are not scored ({names}); {remedy}")
    if rules.protocol.knows_cysts(rules.scheme) and scored and not found:
        there = f"the references of {true} of {len(scored)} cases do" if true else "nor does a reference"
        lines.append(
            f"no prediction has cysts, {there}: for a model without cysts, mass equals tumor; "
            "for references as in KiTS19, where cysts are kidney, use --labels kits19"
        )
    if rules.scheme.cyst is None and rules.protocol.labels == "kits23":
        lines.append("the references have no cysts, which are kidney there, so mass is the same as tumor")
    if names := ", ".join(rules.protocol.other_regions(rules.scheme)):
        lines.append(f"{names}: {rules.protocol.name}'s class is scored, not the region of that name in the labels")
    if doubted := [score for score in scored if score.doubts]:
        cases = shorten([score.case for score in doubted])
        lines.append(f"{len(doubted)} references are doubtful in place ({cases}): {doubted[0].doubts[0]}")
    if strange:
        lines.append(
            f"values that are no labels, in the predictions of {strange} cases, are background: {rules.scheme}"
        )
    return lines


def required_cases(numbers: str | None, split: Path | None, fold: int | None, protocol: str = "kits19") -> list[str]:
    """The required cases: from ``--cases 210-299``, a split file's test set, or a fold's validation cases.

    Raises UsageError: both are given, or the split has no such cases.
    """
    if numbers and split:
        raise UsageError("--cases and --split exclude each other. Give one of them")
    if numbers:
        return [case_name(number) for number in parse_cases(numbers, SOURCES.get(protocol, KITS23))]
    return held_out(split, fold)


def _strata(truth: Volume) -> dict[str, str]:
    """The groups of a reference by the volume of its tumor and by its slices."""
    tumor_ml = int((truth.array == TUMOR).sum()) * truth.geometry.voxel_ml
    thickness = thickness_class(truth.geometry.spacing[0])
    return {"tumor size": size_of_volume(tumor_ml), "slices": THICKNESSES[thickness]}
