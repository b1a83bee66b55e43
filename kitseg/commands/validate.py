"""Cross-validation: each fold's networks on the cases that they were not trained on, all scored together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kitseg import config
from kitseg.commands.case_record import quality_facts, read_record
from kitseg.commands.confidence import CONFIDENCE, write_confidence
from kitseg.commands.evaluate import Job, Rules, Score, Unscored, score_case
from kitseg.commands.infer import manifest_of
from kitseg.commands.intervals import INTERVALS, case_errors, write_intervals
from kitseg.commands.postprocess import facts_of, write_case
from kitseg.commands.score_files import score_content, write_scores
from kitseg.errors import InputError, KitsegError, UsageError
from kitseg.measurement.confidence import fit_temperature, sample
from kitseg.models.members import judge
from kitseg.models.model import Model, open_model
from kitseg.models.origin import computed_with, learned_from
from kitseg.models.postprocessing import build_steps, clean
from kitseg.models.run_folder import STAGE_INPUTS, Run, StageFolder, find_run, move_aside
from kitseg.runtime.console import print_plain
from kitseg.runtime.files import file_digest, identity
from kitseg.runtime.locks import folder_lock
from kitseg.runtime.outcomes import UNCHANGED, OnDone, Outcome, each
from kitseg.scoring.protocols import protocol_of
from kitseg.splits import Split, read_split, same_patient
from kitseg.types import Case
from kitseg.volumes import blocks
from kitseg.volumes.kits import labelled_cases
from kitseg.volumes.names import shorten
from kitseg.volumes.references import read_reference
from kitseg.volumes.scan import hu_digest, label_of, read_scan
from kitseg.volumes.tables import CLINICAL, read_clinical

LABELS = "predictions"
MACHINE = ("device", "deterministic", "engine")  # what a manifest states about the machine, beside versions


@dataclass(frozen=True)
class Validation:
    """What to validate.

    cases: the validation cases of each finished fold of the run; asked: the folds to predict; clinical: further groups
    of cases; hashes: of the scans that were read so far, so that each is read once.
    """

    run: Run
    split: Split
    cases: dict[int, list[Case]]
    asked: list[int]
    mirror: bool
    clinical: Mapping[str, Mapping[str, str]]
    hashes: dict[Path, str] = field(default_factory=dict)

    def probabilities(self, fold: int) -> Path:
        """Where a fold's probabilities go."""
        return self.run.fold_probabilities(fold, self.mirror)

    def hash_of(self, case: Case) -> str:
        """The hash of a case's scan."""
        if case.image not in self.hashes:
            self.hashes[case.image] = file_digest(case.image)
        return self.hashes[case.image]

    def is_done(self, fold: int, case: Case) -> bool:
        """Whether a case is predicted, from the scan as it is now, and its files are as they were written."""
        try:
            digest = self.hash_of(case)
        except InputError:  # the scan can't be read any more
            return False
        if not blocks.is_unchanged(self.probabilities(fold), case.id, digest):
            return False
        return read_record(self.record(case), self.made(fold, case)) is not None

    def made(self, fold: int, case: Case) -> dict[str, str]:
        """What a case's label map was made from."""
        return {
            "scan_sha256": self.hash_of(case),
            "block_sha256": blocks.block_digest(self.probabilities(fold), case.id),
        }

    def label(self, case: Case) -> Path:
        """A case's label map."""
        return self.run.validation(self.mirror) / LABELS / f"{case.id}.nii.gz"

    def record(self, case: Case) -> Path:
        """How a case's label map came about."""
        return self.run.validation(self.mirror) / LABELS / f"{case.id}.json"


def plan_validation(path: Path, data: Sequence[Path], mirror: bool, masks: Path | None = None) -> Validation:
    """The finished folds of a run, or one fold of it, and their validation cases.

    Raises UsageError: not a run, no finished fold, a case that several folds validate, a missing validation case, or
    one that a network was trained on; KitsegError: a patient on two sides; InputError: a damaged file.
    """
    run, fold = find_run(path)
    split, last = read_split(run.split), list(config.method_of(config.read(run.config)).stages)[-1]
    finished = [number for number in run.folds(last) if number < len(split.folds)]
    asked = [number for number in finished if fold in (None, number)]
    if not asked:
        raise UsageError(f"{path} has no finished fold; `kitseg train --fold all` trains them all")
    counts = Counter(case for number in asked for case in split.folds[number].val)
    if twice := sorted(case for case, count in counts.items() if count > 1):
        what = f"several folds of {run.split} validate {shorten(twice)}, but a case has one label map"
        raise UsageError(f"{what}. Validate the folds one by one, such as {run.fold(asked[0])}")
    by_id = {case.id: case for case in labelled_cases(data, masks)}
    shown = {case.id: case.patients for case in by_id.values() if case.patients}
    patients = {**split.patients, **shown}
    if problem := same_patient(split, patients):
        raise KitsegError(f"{run.split}: {problem}. Correct patients.csv, or train again with another split")
    for number in asked:
        _check_unseen(run, number, split)
        if missing := sorted(set(split.folds[number].val) - by_id.keys()):
            raise UsageError(f"{', '.join(missing)} of {run.split} can't be found; give their folder with --data")
    cases = {n: [by_id[name] for name in split.folds[n].val if name in by_id] for n in finished}
    if odd := [name for number in asked for name in other_references(run.stage(number, last), cases[number])]:
        print_plain(
            f"references of {shorten(odd)} are other label maps than in training; --masks names the folder of those"
        )
    clinical = {case: row for folder in data for case, row in read_clinical(folder / CLINICAL).items()}
    return Validation(run, replace(split, patients=patients), cases, asked, mirror, clinical)


def other_references(stage: StageFolder, cases: Sequence[Case]) -> list[str]:
    """The validation cases whose reference is not the label map that a training had, as far as it states that."""
    rows = STAGE_INPUTS.read(stage.places).val if stage.places.exists() else {}
    odd = []
    for case in cases:
        known = rows[case.id].made_from.split()[1:] if case.id in rows else []
        with suppress(InputError):
            if known and not file_digest(label_of(case)).startswith(known[0]):
                odd.append(case.id)
    return odd


def predict_folds(validation: Validation, device: str, on_done: OnDone) -> list[Outcome]:
    """Probabilities and label maps of every validation case, by the fold that was not trained on it.

    Finished ones are kept.
    """
    outcomes = []
    with folder_lock(validation.run.validation(validation.mirror), "out-of-fold predictions"):
        for fold in validation.asked:
            model = open_model(validation.run.fold(fold), device, mirror=validation.mirror)
            outcomes += _predict_fold(validation, fold, model, on_done)
    return outcomes


def folds_to_score(validation: Validation) -> dict[str, int]:
    """The fold of each case to score: of the folds asked for, and of those that were predicted whole before."""

    def is_whole(fold: int) -> bool:
        cases, wanted = validation.cases[fold], validation.split.folds[fold].val
        return len(cases) == len(wanted) and all(validation.is_done(fold, case) for case in cases)

    folds = sorted(fold for fold in validation.cases if fold in validation.asked or is_whole(fold))
    return {case.id: fold for fold in folds for case in validation.cases[fold]}


def score_folds(validation: Validation, folds: Mapping[str, int], on_done: Callable[[], None]) -> list[Score]:
    """Score the label maps of all validated folds and write the scores; a case without one counts as background.

    And the intervals of their measurements, and what their expected Dice follows from (``commands.confidence``).
    """
    scheme = validation.split.scheme
    rules, scores, errors, jobs = Rules(protocol_of(scheme), scheme, distances=False), [], [], []
    samples = []
    by_id = {case.id: case for cases in validation.cases.values() for case in cases}
    for name, fold in folds.items():
        case = by_id[name]
        there = validation.label(case) if validation.is_done(fold, case) else None
        groups = validation.clinical.get(name, {})
        job = Job(name, there, case.label or case.image, groups)
        scores.append(score_case(job, rules))
        errors.append(case_errors(job, rules))
        jobs.append(job)
        if there and not scores[-1].error:
            truth = read_reference(job.reference, name, scheme).array
            samples += sample(blocks.read_block(validation.probabilities(fold), name), truth)
        on_done()
    to = validation.run.validation(validation.mirror)
    patients = {case: whose[0] for case, whose in validation.split.patients.items() if whose}
    write_scores(validation.run.scores(validation.mirror), score_content(scores, rules, folds, Unscored(), patients))
    write_intervals(to / INTERVALS, errors, patients)
    write_confidence(to / CONFIDENCE, list(zip(jobs, scores, strict=True)), patients, fit_temperature(samples))
    return scores


def _check_unseen(run: Run, fold: int, split: Split) -> None:
    """Refuse a fold whose networks were trained on other cases than those of the run's split.

    Raises UsageError: it was.
    """
    for path in sorted(run.fold(fold).glob("*/**/places.json")):
        trained = STAGE_INPUTS.read(path).train
        if foreign := sorted(set(trained) - set(split.folds[fold].train)):
            raise UsageError(f"{path.parent} was trained on {', '.join(foreign)}, which {run.split} holds out")


def _is_kept(validation: Validation, fold: int, manifest: Mapping[str, Any]) -> bool:
    """Whether a fold's probabilities are kept: computed alike, or all by the same weights on another machine."""
    to = validation.probabilities(fold)
    try:
        before = blocks.read_manifest(to)
    except InputError:  # missing, or of an earlier version
        return False
    if identity(before) == identity(manifest):
        return True
    done = all(validation.is_done(fold, case) for case in validation.cases[fold])
    if not done or _without_machine(before) != _without_machine(manifest):
        return False
    print_plain(f"{to}: computed on another machine or by another version; it is kept")
    return True


def _without_machine(manifest: Mapping[str, Any]) -> str:
    """What identifies the weights and the kitseg that made outputs, on any machine."""
    model = {key: value for key, value in manifest["model"].items() if key not in MACHINE}
    return identity({**manifest, "model": model, "versions": manifest["versions"].get("kitseg")})


def _predict_fold(validation: Validation, fold: int, model: Model, on_done: OnDone) -> list[Outcome]:
    to = validation.probabilities(fold)
    steps, manifest = build_steps(model.method.postprocess), manifest_of(model, None)
    if to.exists() and not _is_kept(validation, fold, manifest):
        why = "not finished on this machine and version, or of other weights"
        print_plain(f"{to}: {why}; it is now {move_aside(to)}")
    if not (to / blocks.MANIFEST).exists():
        blocks.claim_manifest(to, manifest)

    def work(case: Case) -> Outcome:
        if validation.is_done(fold, case):
            return Outcome(case.id, note=UNCHANGED, result=validation.label(case))
        scan = read_scan(case)
        found = model.predict_proba(scan)
        validation.record(case).unlink(missing_ok=True)
        digest, hu_sha256 = validation.hash_of(case), hu_digest(scan)
        learned = learned_from([model], digest, hu_sha256)
        engines = [computed_with(model)]  # now, because one may have left a network to PyTorch
        blocks.write_block(to, found, case.image, digest, (), learned, engines)
        labels, domain = clean(found, scan, steps), model.run.read_info().experience
        judged = judge(labels, found, scan, None, domain, model.method.labels)
        facts = {
            "scan": case.image.name,
            "hu_sha256": hu_sha256,
            "learned_from": learned,
            "quality": quality_facts(judged.quality),
            "signs": judged.signs,
            **facts_of(manifest, engines=engines),
        }
        return write_case(validation.label(case).parent, labels, found, facts, validation.made(fold, case))

    return each(validation.cases[fold], work, on_done)
