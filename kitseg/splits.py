"""Which cases train, validate and test: one file that every verb uses."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kitseg.errors import InputError, KitsegError, UsageError
from kitseg.files import write_json
from kitseg.labels import CONVENTIONS

SCHEMA = 1


@dataclass(frozen=True)
class Part:
    """Cases to learn from and cases to be scored on."""

    train: tuple[str, ...]
    val: tuple[str, ...]


@dataclass(frozen=True)
class Fold(Part):
    """An outer fold; ``inner`` splits its training cases again, for out-of-fold predictions between stages."""

    inner: tuple[Part, ...]


@dataclass(frozen=True)
class Split:
    """Outer folds with their inner folds, a test set that no fold sees, the seed, the labels' convention."""

    folds: tuple[Fold, ...]
    test: tuple[str, ...]
    seed: int
    convention: str

    @property
    def cases(self) -> set[str]:
        """Every case of the split."""
        return {case for fold in self.folds for case in (*fold.train, *fold.val)} | set(self.test)


def make_split(cases: Iterable[str], folds: int, inner: int, test: int, seed: int, convention: str) -> Split:
    """A random split by case; the order of ``cases`` doesn't matter.

    Raises:
        UsageError: fewer than two folds, or an unknown convention. KitsegError: fewer than two cases to learn from.
    """
    shuffled = sorted(cases)
    random.Random(seed).shuffle(shuffled)
    held, rest = shuffled[:test], shuffled[test:]
    if folds < 2 or inner < 2 or test < 0 or convention not in CONVENTIONS:
        asked = f"{folds} folds, {inner} inner folds, {test} test cases, label convention '{convention}'"
        raise UsageError(f"no split of {asked}: it takes 2 folds or more of each, and a known convention")
    if len(rest) < 2:
        raise KitsegError(f"{len(rest)} labelled case(s) can't be split into training and validation: add cases")
    outer = []
    for part in _parts(rest, folds):
        nested = _parts(list(part.train), inner) if len(part.train) > 1 else []
        outer.append(Fold(part.train, part.val, tuple(nested)))
    return Split(tuple(outer), tuple(sorted(held)), seed, convention)


def write_split(split: Split, path: Path) -> None:
    """Write the split file, aside first."""
    write_json(path, SCHEMA, asdict(split))


def read_split(path: Path) -> Split:
    """Read a split file, one's own or a user's, and check it.

    Raises:
        InputError: unreadable, another schema, a case on both sides, inner folds that aren't part of their outer one.
    """
    try:
        raw = json.loads(path.read_text())
        folds = tuple(
            Fold(**_sides(fold), inner=tuple(Part(**_sides(part)) for part in fold.get("inner", ())))
            for fold in raw["folds"]
        )
        split = Split(folds, _cases(raw.get("test", [])), int(raw.get("seed", 0)), raw["convention"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        remedy = "It needs `schema`, `convention` and `folds`, a list of {train, val, inner}."
        raise InputError(path, f"is no split file ({type(error).__name__}: {error})", remedy) from error
    if raw.get("schema") != SCHEMA:
        raise InputError(path, f"has schema {raw.get('schema')}, this version reads {SCHEMA}", "Write it anew.")
    problem = _problem(split)
    if problem:
        raise InputError(path, problem, "Mend the file; each case belongs to one side.")
    return split


def _sides(part: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    return {side: _cases(part[side]) for side in ("train", "val")}


def _cases(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(case, str) for case in value) or len(set(value)) < len(value):
        raise ValueError(f"{value!r} is not a list of case names, each once")
    return tuple(value)


def _parts(cases: Sequence[str], count: int) -> list[Part]:
    """``count`` parts (fewer where there are fewer cases), each case once in a validation side."""
    count = min(count, len(cases))
    sides = [sorted(cases[i::count]) for i in range(count)]
    return [Part(tuple(sorted(set(cases) - set(val))), tuple(val)) for val in sides]


def _problem(split: Split) -> str | None:
    if not split.folds:
        return "holds no folds"
    if split.convention not in list(CONVENTIONS):
        return f"names the label convention '{split.convention}', not one of {', '.join(CONVENTIONS)}"
    for i, fold in enumerate(split.folds):
        both = set(fold.train) & set(fold.val) | set(split.test) & {*fold.train, *fold.val}
        if both:
            return f"fold {i} has {', '.join(sorted(both))} on two sides"
        if not fold.train or not fold.val:
            return f"fold {i} has no training or no validation cases"
        for j, part in enumerate(fold.inner):
            if not _is_inside(part, fold.train):
                return f"inner fold {j} of fold {i} isn't a split of that fold's training cases"
    return None


def _is_inside(part: Part, cases: Sequence[str]) -> bool:
    """Whether both sides hold cases, none of them twice, all of them among ``cases``."""
    train, val = set(part.train), set(part.val)
    return bool(train and val) and not train & val and train | val <= set(cases)


def held_out(path: Path | None, fold: int | None) -> list[str]:
    """The test cases of a split file, or the validation cases of one of its folds; empty where no file is given.

    Raises:
        UsageError: a fold without a split file, a fold that isn't there, or a split without test cases.
    """
    if path is None:
        if fold is not None:
            raise UsageError("--fold says which part of a split file; give the file with --split")
        return []
    split = read_split(path)
    if fold is not None and not 0 <= fold < len(split.folds):
        raise UsageError(f"{path} has no fold {fold}: {len(split.folds)} folds, from 0 on")
    cases = split.test if fold is None else split.folds[fold].val
    if not cases:
        raise UsageError(f"{path} has no test cases; --fold takes a fold's validation cases")
    return list(cases)
