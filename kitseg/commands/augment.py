"""Augmentation by registration: selection of pairs, parallel registration, and the split that includes the copies.

``<folder>/<reference>_from_<floating>/`` holds a copy: image and labels of the floating case in the shape of the
reference, and ``origin.json``. ``rejected/`` holds the reasons why other pairs gave none, ``fold_<k>.json`` the pairs
of a fold, and ``splits.json`` the run's split with the copies.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from joblib import delayed

from kitseg import __version__
from kitseg.errors import InputError, KitsegError, UsageError, format_error
from kitseg.labels import Scheme, find_scheme
from kitseg.models.run_folder import Run
from kitseg.patches.registration import Labelled, Settings, register_copy
from kitseg.patches.warp import problem
from kitseg.runtime.files import atomic_write, file_digest
from kitseg.runtime.outcomes import in_parallel
from kitseg.runtime.overwrite import refuse_overwrite
from kitseg.runtime.provenance import FileFormat
from kitseg.splits import Split, read_split, with_copies, write_split
from kitseg.types import Case
from kitseg.volumes.kits import COPY_ORIGIN, IMAGE, LABEL, ORIGIN, CopyOrigin, find_cases
from kitseg.volumes.nifti import PHANTOM_MARK, SYNTHETIC_MARK, mark_of, write_image, write_labels
from kitseg.volumes.scan import label_of, read_labelled

DIRECTIONS = ("partner-to-hard", "hard-to-partner")


@dataclass(frozen=True)
class PairSelection:
    """The selection of pairs: the ``worst`` cases, each with ``partners`` random others, and the direction."""

    worst: int
    partners: int
    direction: str
    seed: int

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise UsageError(f"unknown direction '{self.direction}'. Choose {' or '.join(DIRECTIONS)}")


@dataclass(frozen=True)
class Pair:
    """The floating case is warped to the anatomy of the reference."""

    reference: Case
    floating: Case

    @property
    def name(self) -> str:
        """The copy's name, the same for a pair in every fold."""
        return f"{self.reference.id}_from_{self.floating.id}"


@dataclass(frozen=True)
class Copied:
    """The outcome of a pair: ``kept``, ``rejected`` or ``failed``; ``new`` is False where it was done before.

    dice: overlap of the kidneys before and after registration.
    """

    name: str
    state: str
    new: bool
    reason: str = ""
    dice: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class _FoldPairs:
    fold: int
    pairs: tuple[str, ...]


_FOLD_PAIRS = FileFormat(_FoldPairs, 1)


def training_scans(split: Split, fold: int, cases: Iterable[Case]) -> dict[str, Case]:
    """A fold's training cases by id, without registered copies. Raises KitsegError: some are not among ``cases``."""
    by_id = {case.id: case for case in cases}
    if missing := sorted(set(split.folds[fold].train) - set(by_id)):
        raise KitsegError(f"cases {', '.join(missing)} of the run's split are missing. Give their folder with --data")
    return {name: by_id[name] for name in split.folds[fold].train if not by_id[name].sources}


def check_enough(count: int, choice: PairSelection) -> None:
    """Raises UsageError: a selection needs more training cases than there are."""
    if choice.worst + choice.partners > count:
        asked = f"--worst {choice.worst} and --partners {choice.partners}"
        raise UsageError(f"{asked} need {choice.worst + choice.partners} training cases, the fold has {count}")


def choose_pairs(ranked: Sequence[str], cases: Mapping[str, Case], choice: PairSelection) -> list[Pair]:
    """Pair each hard case with random partners that are not hard; depends on the seed and the hard case only.

    ranked: training cases, the hardest first. Raises UsageError: too few cases.
    """
    check_enough(len(ranked), choice)
    hard, rest = ranked[: choice.worst], sorted(ranked[choice.worst :])
    pairs = []
    for name in hard:
        for partner in random.Random(f"{choice.seed}/{name}").sample(rest, choice.partners):
            reference, floating = (name, partner) if choice.direction == DIRECTIONS[0] else (partner, name)
            pairs.append(Pair(cases[reference], cases[floating]))
    return pairs


def make_copies(
    pairs: Sequence[Pair], to: Path, scheme: Scheme, jobs: int, on_done: Callable[[Copied], None]
) -> list[Copied]:
    """Register each pair and write the copies that pass; a failure doesn't stop the others, and done pairs are skipped.

    A registration uses one thread, so as many run at a time as there are jobs. Raises KitsegError: a worker was killed.
    """
    to = to.absolute()  # worker processes may have another working folder
    tasks = (delayed(_make)(pair, to, scheme) for pair in pairs)
    return sorted(in_parallel(tasks, jobs, on_done, ordered=False), key=lambda outcome: outcome.name)


def undone(pairs: Sequence[Pair], to: Path, scheme: Scheme) -> int:
    """The number of pairs that are neither kept nor rejected yet."""
    done = 0
    for pair in pairs:
        with suppress(InputError):
            done += _done(pair, to, _wanted(pair, scheme)) is not None
    return len(pairs) - done


def write_request(to: Path, fold: int, choice: PairSelection, pairs: Sequence[Pair]) -> None:
    """Write the pairs of a fold. Raises UsageError: the folder holds a split or pairs that it didn't write."""
    refuse_overwrite(to / f"fold_{fold}.json", "pairs")
    if (to / "splits.json").exists() and not any(to.glob("fold_*.json")):
        raise UsageError(f"{to / 'splits.json'} is not a split of copies. Choose another folder with --output")
    content = {"fold": fold, **asdict(choice), "pairs": [pair.name for pair in pairs]}
    _FOLD_PAIRS.write(to / f"fold_{fold}.json", content)


def write_augmented_split(run: Run, to: Path, cases: Iterable[Case]) -> dict[int, list[str]]:
    """``splits.json``: the run's split with the copies of each fold's pairs, where they weren't rejected.

    cases: the scans that copies are made from. A copy whose scans or labels were replaced since, such as that of
    another fold than the last call's, is left out.

    Returns:
        The copies that were left out, by fold.

    Raises:
        KitsegError: the folder's copies were made for another split.
    """
    split, outdated, by_id = read_split(run.split), dict[int, list[str]](), {case.id: case for case in cases}
    digest = cache(file_digest)
    for path in sorted(to.glob("fold_*.json")):
        asked = _FOLD_PAIRS.read(path)
        made = {name: COPY_ORIGIN.read(to / name / ORIGIN) for name in asked.pairs if (to / name / ORIGIN).exists()}
        if old := [name for name, origin in made.items() if not _is_current(origin, by_id, digest)]:
            outdated[asked.fold] = old
        copies = [case for name in made if name not in old for case in find_cases(to / name)]
        try:
            split = with_copies(split, asked.fold, copies)
        except (KitsegError, IndexError) as error:
            raise InputError(path, f"belongs to another split ({error})", "Choose another folder with -o.") from error
    write_split(split, to / "splits.json")
    return outdated


def _is_current(origin: CopyOrigin, cases: Mapping[str, Case], digest: Callable[[Path], str]) -> bool:
    try:
        now = tuple(digest(file) for source in origin.sources for file in cases[source].files)
    except (KeyError, InputError):  # one of its scans is gone
        return False
    return origin.made_from in ((), now)


def _make(pair: Pair, to: Path, scheme: Scheme) -> Copied:
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        wanted = _wanted(pair, scheme)
        return _done(pair, to, wanted) or _copy(pair, to, wanted)
    except Exception as error:  # the other pairs continue, whatever the error
        return Copied(pair.name, "failed", True, format_error(pair.name, error))


def _wanted(pair: Pair, scheme: Scheme) -> dict[str, Any]:
    """The settings and files of a copy, as ``CopyOrigin`` records them. Raises InputError: an unreadable file."""
    made_from = tuple(map(file_digest, (*pair.reference.files, *pair.floating.files)))
    return {"settings": asdict(Settings()), "labels": scheme.line, "made_from": made_from}


def _done(pair: Pair, to: Path, wanted: Mapping[str, Any]) -> Copied | None:
    """The outcome of an earlier call for a pair, with the same settings, scans and labels."""
    for path in (to / pair.name / ORIGIN, to / "rejected" / f"{pair.name}.json"):
        if found := COPY_ORIGIN.find(path, wanted):
            dice = (found.dice_before, found.dice_after)
            return Copied(pair.name, "rejected" if found.reason else "kept", False, found.reason or "", dice)
    return None


def _copy(pair: Pair, to: Path, wanted: Mapping[str, Any]) -> Copied:
    """Register a pair and write the copy, or the reason why it is rejected."""
    begun, name = time.perf_counter(), pair.name
    if (to / name / ORIGIN).exists():  # of other scans or labels
        shutil.rmtree(to / name)
    reference, floating = (_read(case, find_scheme(wanted["labels"])) for case in (pair.reference, pair.floating))
    copy = register_copy(reference, floating, Settings())
    reason = problem(copy.quality)
    patients = {patient for case in (pair.reference, pair.floating) for patient in case.patients or (case.id,)}
    facts = {
        "sources": [pair.reference.id, pair.floating.id],
        "patients": sorted(patients),
        **wanted,
        **asdict(copy.quality),
        "reason": reason,
        "seconds": round(time.perf_counter() - begun, 1),
        "versions": {"kitseg": __version__, "SimpleITK": sitk.Version_VersionString(), "numpy": np.__version__},
    }
    rejected = to / "rejected" / f"{name}.json"
    if reason is not None:
        COPY_ORIGIN.write(rejected, facts)
        return Copied(name, "rejected", True, reason)
    if (to / name).exists():
        raise InputError(to / name, "exists and was not written by kitseg", "Choose another folder with --output.")
    with atomic_write(to / name) as partial:
        partial.mkdir()
        marks = {mark_of(case.image) for case in (pair.reference, pair.floating)}
        mark = next((mark for mark in (PHANTOM_MARK, SYNTHETIC_MARK) if mark in marks), "")
        write_image(partial / IMAGE, copy.image, reference.image.native, mark)
        write_labels(partial / LABEL, copy.label, reference.image.native, mark, find_scheme(facts["labels"]))
        COPY_ORIGIN.write(partial / ORIGIN, facts)
    rejected.unlink(missing_ok=True)
    return Copied(name, "kept", True, dice=(copy.quality.dice_before, copy.quality.dice_after))


def _read(case: Case, scheme: Scheme) -> Labelled:
    """A labelled scan.

    Raises InputError: no label, one on another grid than its image or without a kidney, or an unreadable file.
    """
    image, label = read_labelled(case, scheme)
    if not label.array.any():
        raise InputError(label_of(case), "holds no kidney", "Leave the case out of the training, or fix its labels.")
    return Labelled(image, label)
