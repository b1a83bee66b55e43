"""Cross-validation: each fold's networks on the cases that they never saw, all scored together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kitseg import config
from kitseg.errors import UsageError
from kitseg.pipeline.clean import build_steps, clean, save_labels
from kitseg.pipeline.evaluate import Score, score_case, write_scores
from kitseg.pipeline.infer import manifest_of
from kitseg.pipeline.model import Model, open_model
from kitseg.pipeline.outcome import OnDone, Outcome, each
from kitseg.runs import Run, find_run, move_aside
from kitseg.splits import Split, read_split
from kitseg.types import Case
from kitseg.volumes.blocks import MANIFEST, claim_manifest, read_manifest, write_block
from kitseg.volumes.kits import CLINICAL, labelled_cases, read_clinical
from kitseg.volumes.nifti import file_digest, read_image

SCORES, LABELS = "scores.json", "predictions"


@dataclass(frozen=True)
class Validation:
    """What to validate: the finished folds of a run, each with its validation cases."""

    run: Run
    split: Split
    folds: dict[int, list[Case]]
    mirror: bool
    clinical: Mapping[str, Mapping[str, str]]

    @property
    def labels(self) -> Path:
        """Where the label maps go."""
        return self.run.validation(self.mirror) / LABELS

    @property
    def scores(self) -> Path:
        """Where the scores go."""
        return self.run.validation(self.mirror) / SCORES


def plan_validation(path: Path, data: Sequence[Path], mirror: bool) -> Validation:
    """The finished folds of a run, or one fold of it, and their validation cases.

    Raises:
        UsageError: not a run, no finished fold, or a validation case that isn't there. InputError: a damaged kits.json.
    """
    run, fold = find_run(path)
    split, last = read_split(run.split), list(config.method_of(config.read(run.config)).stages)[-1]
    finished = [number for number in run.folds(last) if fold in (None, number)]
    if not finished:
        raise UsageError(f"{path} has no finished fold; `kitseg train --fold all` trains them all")
    by_id = {case.id: case for case in labelled_cases(data)}
    wanted = {number: split.folds[number].val for number in finished}
    if missing := sorted({case for val in wanted.values() for case in val} - by_id.keys()):
        raise UsageError(f"{', '.join(missing)} of {run.split} can't be found; give their folder with --data")
    clinical = {case: row for folder in data for case, row in read_clinical(folder / CLINICAL).items()}
    return Validation(run, split, {n: [by_id[case] for case in val] for n, val in wanted.items()}, mirror, clinical)


def predict_folds(validation: Validation, device: str, on_done: OnDone) -> list[Outcome]:
    """Probabilities and label maps of every validation case by the fold that never saw it; what is done is kept."""
    outcomes = []
    for fold, cases in validation.folds.items():
        model = open_model(validation.run.fold(fold), device, mirror=validation.mirror)
        outcomes += _predict_fold(
            model, cases, validation.run.beliefs(fold, validation.mirror), validation.labels, on_done
        )
    return outcomes


def score_folds(validation: Validation, on_done: Callable[[], None]) -> list[Score]:
    """Score the label maps of all validated folds and write them."""
    clinical, convention = validation.clinical, validation.split.convention
    scores, folds = [], {}
    for fold, cases in validation.folds.items():
        for case in cases:
            found = validation.labels / f"{case.id}.nii.gz"
            there = found if found.exists() else None
            scores.append(score_case(case.id, there, case.label or case.image, convention, clinical.get(case.id, {})))
            folds[case.id] = fold
            on_done()
    write_scores(validation.scores, scores, convention, folds)
    return scores


def _predict_fold(model: Model, cases: Sequence[Case], to: Path, labels: Path, on_done: OnDone) -> list[Outcome]:
    steps, manifest = build_steps(model.method.postprocess), manifest_of(model, None, model.method.outputs)
    if not (to / MANIFEST).exists() or read_manifest(to)["model"]["sha256"] != manifest["model"]["sha256"]:
        move_aside(to)
        claim_manifest(to, manifest)
    by_id = {case.id: case for case in cases}

    def work(name: str) -> Outcome:
        case, result = by_id[name], labels / f"{name}.nii.gz"
        if (to / f"{name}.json").exists() and result.exists():
            return Outcome(name, note="predicted already", result=result)
        scan = read_image(case.image, name)
        found = model.believe(scan)
        outcome = save_labels(labels, name, clean(found, scan, steps), found)
        write_block(to, found, case.image, file_digest(case.image))
        return outcome

    return each(list(by_id), work, on_done)
