"""Which cases train, validate and test: one file that every command uses."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from kitseg.errors import InputError, KitsegError, UsageError
from kitseg.labels import Scheme, scheme_of
from kitseg.runtime.provenance import FileFormat
from kitseg.scoring.strata import thickness_class
from kitseg.types import Case, Traits

Patients = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class FoldPart:
    """Training cases and validation cases, each once."""

    train: tuple[str, ...]
    val: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_once(self.train)
        _check_once(self.val)


@dataclass(frozen=True)
class Fold(FoldPart):
    """An outer fold; ``inner`` splits its training cases again, for out-of-fold predictions between stages."""

    inner: tuple[FoldPart, ...] = ()


@dataclass(frozen=True)
class Split:
    """Outer folds with their nested folds, a test set that no fold sees, the seed, the label scheme of the cases.

    patients: the patients that a case shows, unless it is a patient of its own; convention: the name of the scheme in
    files of kitseg 0.1.
    """

    folds: tuple[Fold, ...]
    labels: Scheme | None = None
    test: tuple[str, ...] = ()
    seed: int = 0
    patients: Patients = field(default_factory=dict)
    convention: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        _check_once(self.test)
        if self.labels is None:
            if not self.convention:
                raise ValueError("it lacks labels")
            object.__setattr__(self, "labels", scheme_of(self.convention))

    @property
    def scheme(self) -> Scheme:
        """The label scheme of the cases."""
        return self.labels or scheme_of(self.convention)

    @property
    def cases(self) -> set[str]:
        """Every case of the split."""
        return {case for fold in self.folds for case in (*fold.train, *fold.val)} | set(self.test)

    def shown(self, cases: Iterable[str]) -> set[str]:
        """The patients that cases show."""
        return {patient for case in cases for patient in self.patients.get(case) or (case,)}

    def fold(self, number: int) -> Fold:
        """An outer fold. Raises UsageError: there is no such fold."""
        if not 0 <= number < len(self.folds):
            raise UsageError(f"there is no fold {number}: the split has folds 0 to {len(self.folds) - 1}")
        return self.folds[number]


_FORMAT = FileFormat(Split, 1, "It needs `schema`, `labels` and `folds`, a list of {train, val, inner}.")


def make_split(cases: Iterable[Traits], folds: int, inner: int, test: int, seed: int, scheme: Scheme) -> Split:
    """A random split by patient, in which every part holds the same mix of slice thickness and tumor volume.

    The patients are ordered by thickness class, then by tumor volume, and dealt out in blocks of as many neighbours as
    there are parts, so that each part gets one of every block. The order of ``cases`` doesn't matter. Raises
    UsageError: fewer than two folds; KitsegError: fewer than two patients to train with.
    """
    if folds < 2 or inner < 2 or test < 0:
        asked = f"{folds} folds, {inner} nested folds, {test} test cases"
        raise UsageError(f"can't split into {asked}: it takes 2 folds or more of each")
    rng, patients = random.Random(seed), _in_order(cases)
    held = _spread(patients, test, rng)
    rest = [patient for patient in patients if patient not in held]
    if len(rest) < 2:
        kept = f"{len(rest)} labelled patient(s) besides {len(held)} test patient(s)"
        raise KitsegError(f"{kept} can't be split into training and validation, which needs 2 or more: add cases")
    outer = []
    for train, val in _parts(rest, folds, rng):
        nested = [FoldPart(_names(t), _names(v)) for t, v in _parts(train, inner, rng)] if len(train) > 1 else []
        outer.append(Fold(_names(train), _names(val), tuple(nested)))
    known = {c.case: (c.patient,) for patient in patients for c in patient if c.patient != c.case}
    return Split(tuple(outer), scheme, _names(held), seed, known)


def with_copies(split: Split, fold: int, copies: Iterable[Case]) -> Split:
    """The split with registered copies among a fold's training cases.

    A nested fold trains on a copy too where it trains on every case that the copy was made from; none validates on one.
    Raises KitsegError: a copy was made from a case that isn't a training case of the fold.
    """
    copies, outer = list(copies), split.folds[fold]
    for copy in copies:
        if foreign := set(copy.sources) - set(outer.train):
            names = ", ".join(sorted(foreign))
            raise KitsegError(f"{copy.id} was made from {names}, not a training case of fold {fold}")

    def joined(train: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted({*train, *(copy.id for copy in copies if set(copy.sources) <= set(train))}))

    inner = tuple(replace(part, train=joined(part.train)) for part in outer.inner)
    folds = [*split.folds]
    folds[fold] = replace(outer, train=joined(outer.train), inner=inner)
    shown = {copy.id: copy.patients for copy in copies}
    return replace(split, folds=tuple(folds), patients={**split.patients, **shown})


def write_split(split: Split, path: Path) -> None:
    """Write the split file."""
    content = {key: value for key, value in asdict(split).items() if key != "convention"}
    _FORMAT.write(path, {**content, "labels": split.scheme.plain()})


def read_split(path: Path) -> Split:
    """Read a split file, one's own or a user's, and check it.

    Raises InputError: unreadable, another schema, a case or a patient on both sides, nested folds that aren't part of
    their outer one.
    """
    split = _FORMAT.read(path)
    if problem := _problem(split):
        raise InputError(path, problem, "Fix the file; each case and each patient belongs to one side.")
    return split


def _check_once(cases: Sequence[str]) -> None:
    if twice := sorted({case for case in cases if cases.count(case) > 1}):
        raise ValueError(f"{', '.join(twice)} listed twice")


_Patient = list[Traits]


def _in_order(cases: Iterable[Traits]) -> list[_Patient]:
    """The patients with their cases; by thickness class, tumor volume (each of the largest case) and name."""
    patients: dict[str, _Patient] = {}
    for case in sorted(cases, key=lambda c: (-c.tumor_ml, c.case)):
        patients.setdefault(case.patient, []).append(case)
    return sorted(patients.values(), key=lambda p: (thickness_class(p[0].thickness_mm), p[0].tumor_ml, p[0].patient))


def _spread(patients: Sequence[_Patient], count: int, rng: random.Random) -> list[_Patient]:
    """``count`` of the patients, one drawn from each of as many equal stretches."""
    edges = [len(patients) * i // count for i in range(count + 1)] if count else []
    return [rng.choice(patients[a:b]) for a, b in itertools.pairwise(edges) if a < b]


def _parts(patients: Sequence[_Patient], count: int, rng: random.Random) -> list[tuple[list[_Patient], list[_Patient]]]:
    """``count`` pairs of training and validation patients (fewer where there are fewer), each validated once."""
    count = min(count, len(patients))
    part: list[int] = []
    while len(part) < len(patients):
        part += rng.sample(range(count), count)
    chosen = list(zip(patients, part, strict=False))
    return [([p for p, n in chosen if n != i], [p for p, n in chosen if n == i]) for i in range(count)]


def _names(patients: Iterable[_Patient]) -> tuple[str, ...]:
    return tuple(sorted(case.case for patient in patients for case in patient))


def same_patient(split: Split, patients: Patients) -> str | None:
    """A line on the first patient that a split has on two sides; None where there is none.

    patients: the patients that a case shows, unless it is a patient of its own.
    """
    shown = replace(split, patients=patients).shown
    for i, fold in enumerate(split.folds):
        sides = {f"fold {i}": (fold.train, fold.val), "the test set": ((*fold.train, *fold.val), split.test)}
        sides |= {f"nested fold {j} of fold {i}": (part.train, part.val) for j, part in enumerate(fold.inner)}
        for where, (one, other) in sides.items():
            if both := shown(one) & shown(other):
                cases = sorted(case for case in (*one, *other) if shown([case]) & both)
                return f"{where} has patient {', '.join(sorted(both))} on two sides: {', '.join(cases)}"
    return None


def _problem(split: Split) -> str | None:
    if not split.folds:
        return "holds no folds"
    for i, fold in enumerate(split.folds):
        if not fold.train or not fold.val:
            return f"fold {i} has no training or no validation cases"
        for j, part in enumerate(fold.inner):
            if not part.train or not part.val or not {*part.train, *part.val} <= set(fold.train):
                return f"nested fold {j} of fold {i} isn't a split of that fold's training cases"
    return same_patient(split, split.patients)


def held_out(path: Path | None, fold: int | None) -> list[str]:
    """The test cases of a split file, or the validation cases of one of its folds; empty where no file is given.

    Raises UsageError: a fold without a split file, a fold that isn't there, or a split without test cases.
    """
    if path is None:
        if fold is not None:
            raise UsageError("--fold names a part of a split file; give the file with --split")
        return []
    split = read_split(path)
    cases = split.test if fold is None else split.fold(fold).val
    if not cases:
        raise UsageError(f"{path} has no test cases; --fold takes a fold's validation cases")
    return list(cases)
