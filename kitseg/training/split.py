"""The split file: created once from the cases' labels, then used by all commands."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from joblib import delayed

from kitseg.config import Config
from kitseg.errors import KitsegError, UsageError
from kitseg.labels import TUMOR, Scheme, scheme_of
from kitseg.runtime.console import bar
from kitseg.runtime.outcomes import in_parallel, result_or_error
from kitseg.scoring.strata import THICKNESSES, thickness_class
from kitseg.splits import Fold, Split, make_split, read_split, same_patient, write_split
from kitseg.types import Case, Traits
from kitseg.volumes.nifti import canonical_geometry, read_geometry
from kitseg.volumes.references import read_reference
from kitseg.volumes.scan import check_grid, label_of, read_scan

Reader = Callable[..., Traits]  # of a case and its scheme
#: What a configuration states of a split file that is to be written, unless a user changes it.
USUAL = {"folds": 5, "nested_folds": 3, "test_cases": 0}


def read_traits(case: Case, scheme: Scheme) -> Traits:
    """A labelled case's tumor volume and slice distance, from its label map.

    Raises:
        InputError: no label, or one that can't be read.
    """
    label = read_reference(label_of(case), case.id, scheme)
    tumor_ml = int((label.array == TUMOR).sum()) * label.geometry.voxel_ml
    patient = case.patients[0] if case.patients else case.id
    return Traits(case.id, patient, tumor_ml, label.geometry.spacing[0])


def read_whole(case: Case, scheme: Scheme) -> Traits:
    """The same, after a check of the CT: it is read, and an InputError is raised unless it lies on the labels' grid."""
    geometry = read_scan(case).geometry
    traits = read_traits(case, scheme)
    check_grid(label_of(case), canonical_geometry(read_geometry(label_of(case))), geometry)
    return traits


def new_split(traits: Iterable[Traits], configuration: Config) -> Split:
    """Create a split with the settings of the configuration."""
    folds, nested, test, seed = (configuration[key] for key in ("folds", "nested_folds", "test_cases", "seed"))
    return make_split(traits, folds, nested, test, seed, scheme_of(configuration["labels"]))


def unseen_traits(cases: Iterable[Case]) -> list[Traits]:
    """The traits of scans that are known without reading them: their patients."""
    return [Traits(case.id, (case.patients or (case.id,))[0], 0, 0) for case in _scans(cases)]


def look_at(
    cases: Sequence[Case], scheme: Scheme, jobs: int, on_done: Callable[[], None], read: Reader = read_whole
) -> tuple[list[Traits], list[str]]:
    """The traits of the scans among the cases, read in parallel, and the errors of unreadable cases.

    Raises:
        KitsegError: memory, disk or the system failed, which is not the fault of a case.
    """
    tasks = (delayed(result_or_error)(partial(read, scheme=scheme), case) for case in _scans(cases))
    found = in_parallel(tasks, jobs, lambda _: on_done())
    return [one for one in found if isinstance(one, Traits)], [one for one in found if not isinstance(one, Traits)]


def read_split_of(path: Path, scheme: Scheme) -> Split:
    """Read the split file of a training with this label scheme. Raises UsageError: the file's has other ids."""
    split = read_split(path)
    if split.scheme.ids != scheme.ids:
        raise UsageError(f"{path} has the labels {split.scheme}, the training {scheme}. Give the same --labels")
    return split


def check_counts(path: Path, split: Split, fold: Fold, configuration: Config, begun: Config) -> None:
    """Make sure that a split file which is there has the folds and test cases that a user states.

    begun: the configuration of the run, where there is one; what it states, too, is left alone.

    Raises:
        UsageError: it has others, which would be used in silence.
    """
    test, train, both = (len(split.shown(cases)) for cases in (split.test, fold.train, (*fold.train, *fold.val)))
    there = {"folds": len(split.folds), "nested_folds": len(fold.inner), "test_cases": test}
    most = {"folds": both, "nested_folds": train if train > 1 else 0, "test_cases": configuration["test_cases"]}
    for key, usual in USUAL.items():
        stated = configuration[key]
        if stated not in (usual, begun.get(key)) and min(stated, most[key]) != there[key]:
            problem = f"{path} has {key}={there[key]}, not {stated}: it was written before"
            raise UsageError(f"{problem}. Leave the setting out, or give another --split, which is written with it")


def claim_split(path: Path, cases: Sequence[Case], configuration: Config, jobs: int) -> Split:
    """Read the split file, or create it if it doesn't exist.

    Raises:
        KitsegError: the file is damaged, of another label scheme, names missing cases, or has a patient on two sides.
    """
    scheme = scheme_of(configuration["labels"])
    if not path.exists():
        with bar("split", len(_scans(cases))) as step:
            traits, errors = look_at(cases, scheme, jobs, step, read_traits)
        if errors:
            raise KitsegError(errors[0])
        write_split(new_split(traits, configuration), path)
    split = read_split_of(path, scheme)
    if missing := sorted(split.cases - {case.id for case in cases}):
        raise KitsegError(
            f"{path}: cases {', '.join(missing)} are missing in the data folder, or can't be preprocessed. "
            "Add or fix them, or fix the file."
        )
    shown = {case.id: case.patients for case in cases if case.patients}
    if problem := same_patient(split, {**split.patients, **shown}):
        raise KitsegError(f"{path}: {problem}. Fix the file, or delete it to create a new one.")
    return split


def report_split(split: Split, traits: Iterable[Traits]) -> list[tuple[Any, ...]]:
    """One row per fold's validation cases and for the test set: name, cases, median tumor ml, cases by thickness."""
    by_case = {case.case: case for case in traits}
    parts = {f"fold {i}": fold.val for i, fold in enumerate(split.folds)}
    parts |= {"test": split.test} if split.test else {}
    rows = []
    for name, cases in parts.items():
        found = [by_case[case] for case in cases]
        classes = [thickness_class(case.thickness_mm) for case in found]
        counts = [classes.count(i) for i in range(len(THICKNESSES))]
        rows.append((name, len(cases), statistics.median(case.tumor_ml for case in found), *counts))
    return rows


def _scans(cases: Iterable[Case]) -> list[Case]:
    """The cases that aren't registered copies of others."""
    return [case for case in cases if not case.sources]
