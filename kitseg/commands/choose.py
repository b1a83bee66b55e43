"""Choose the ensemble of runs and its post-processing on the runs' out-of-fold predictions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from joblib import delayed

from kitseg import config, ensemble
from kitseg.errors import KitsegError, UsageError, format_error
from kitseg.labels import Scheme
from kitseg.models.digests import digests, run_digest
from kitseg.models.ensemble_file import Member, write_ensemble
from kitseg.models.postprocessing import build_steps, clean
from kitseg.models.run_folder import Run, find_run
from kitseg.runtime.files import file_digest
from kitseg.runtime.outcomes import in_parallel
from kitseg.scoring.case import dice_scores
from kitseg.scoring.kits19 import mean_scores
from kitseg.scoring.protocols import protocol_of
from kitseg.splits import read_split
from kitseg.types import Case
from kitseg.volumes.blocks import MANIFEST, read_block, read_manifest, recorded_scan_digest
from kitseg.volumes.scan import read_labelled

ALL_SUBSETS_UP_TO = 5  # members; with more, only subsets of up to three and all members

Steps = tuple[str, ...]


@dataclass(frozen=True)
class Validated:
    """A run's out-of-fold probabilities; folders: of each case; postprocess: the method's own."""

    member: Member
    folders: Mapping[str, Path]
    postprocess: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Its name in a table."""
        path = self.member.run.resolve()
        name = f"{path.parent.name}/{path.name}" if path.name.startswith("fold_") else path.name
        return name + (" mirrored" if self.member.mirror else "")


@dataclass(frozen=True)
class Recipe:
    """Members to average, by their place in the list, and the priors that clean the mean, in order."""

    members: tuple[int, ...]
    steps: Steps


@dataclass(frozen=True)
class Search:
    """The search space: members, the references of the cases that all of them have, the priors by name.

    tried: mean Dice of each recipe by class, and under ``mean`` that of the challenge's classes, by which it ranks.
    """

    members: Sequence[Validated]
    cases: Sequence[Case]
    scheme: Scheme
    priors: Mapping[str, Any]
    tried: dict[Recipe, dict[str, float]] = field(default_factory=dict)

    def own(self, member: int) -> Steps:
        """A member's own post-processing, as names of the search's priors."""
        own = self.members[member]
        return tuple(_key(self.priors, own, name) for name in own.postprocess)


def open_search(paths: Sequence[Path], cases: Sequence[Case]) -> Search:
    """The validated runs among the paths, plain and mirrored.

    Raises UsageError: a run that isn't validated, or that has other cases or another label scheme than the first.
    """
    members, splits = [], []
    for path in paths:
        run, fold = find_run(path)
        found = [_validated(run, fold, mirror) for mirror in (False, True)]
        there = [validated for validated in found if validated is not None]
        if not there:
            raise UsageError(
                f"{path} has no current out-of-fold predictions of every fold. "
                f"Train missing folds with `kitseg train --fold all`, then run `kitseg validate {path}`"
            )
        members += there
        splits.append(read_split(run.split))
    for member in members[1:]:
        if odd := sorted(set(member.folders) ^ set(members[0].folders)):
            pair = f"{members[0].name} and {member.name}"
            raise UsageError(f"{pair} weren't validated on the same cases: {', '.join(odd)}")
    if len({split.scheme.line for split in splits}) > 1:
        raise UsageError("the runs were trained with different labels. Choose among runs with the same")
    by_id = {case.id: case for case in cases}
    if missing := sorted(members[0].folders.keys() - by_id.keys()):
        raise UsageError(f"cases {', '.join(missing)} are missing. Give their folder with --data")
    references = [by_id[name] for name in sorted(members[0].folders)]
    return Search(members, references, splits[0].scheme, _all_priors(members))


def rounds(search: Search) -> Iterator[list[Recipe]]:
    """The recipes to try next: all subsets of members, then one prior more or less while that improves Dice."""
    yield list(_first(search))
    while True:
        best = ranked(search)[0]
        fewer = [tuple(step for step in best.steps if step != name) for name in best.steps]
        more = [(*best.steps, name) for name in search.priors if name not in best.steps]
        nearby = (Recipe(best.members, steps) for steps in (*fewer, *more))
        fresh = [recipe for recipe in nearby if recipe not in search.tried]
        if not fresh:
            return
        yield fresh
        if ranked(search)[0] == best:
            return


def try_recipes(search: Search, recipes: Sequence[Recipe], jobs: int, on_done: Callable[[], None]) -> None:
    """Score recipes on every case, cases in parallel, and note the means in the search.

    Raises KitsegError: a case can't be scored.
    """
    given = (search.members, search.priors, search.scheme, recipes)
    tasks = (delayed(_try_case)(case, *given) for case in search.cases)

    def done(found: list[dict[str, float]] | str) -> None:
        if isinstance(found, str):
            raise KitsegError(found)
        on_done()

    scores = in_parallel(tasks, jobs, done)
    for number, recipe in enumerate(recipes):
        by_case = {case.id: found[number] for case, found in zip(search.cases, scores, strict=True)}
        dice = mean_scores(by_case)
        search.tried[recipe] = {**dice, "mean": fmean(dice.values())}


def ranked(search: Search) -> list[Recipe]:
    """The recipes that were tried, the best first; of equal ones that with fewer members, then fewer priors."""

    def order(recipe: Recipe) -> tuple[float, int, int]:
        return -search.tried[recipe]["mean"], len(recipe.members), len(recipe.steps)

    return sorted(search.tried, key=order)


def write_choice(path: Path, search: Search) -> None:
    """Write the best recipe as an ensemble file, with the 500 best that were tried."""
    best, tried = ranked(search)[0], []
    for recipe in ranked(search)[:500]:
        runs, steps = describe_recipe(search, recipe)
        tried.append({"runs": runs, "postprocess": steps, **_rounded(search.tried[recipe])})
    members = [search.members[i].member for i in best.members]
    priors = {name: search.priors[name] for name in best.steps}
    write_ensemble(path, members, priors, {"dice": _rounded(search.tried[best]), "tried": tried})


def describe_recipe(search: Search, recipe: Recipe) -> tuple[str, str]:
    """The members and the priors of a recipe."""
    return " + ".join(search.members[i].name for i in recipe.members), ", ".join(recipe.steps) or "none"


def _rounded(dice: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in dice.items()}


def _validated(run: Run, fold: int | None, mirror: bool) -> Validated | None:
    """The out-of-fold probabilities of all folds of a run, or of one; None where some are missing or outdated."""
    split, method = read_split(run.split), config.method_of(config.read(run.config))
    numbers = range(len(split.folds)) if fold is None else [fold]
    folders = {case: run.fold_probabilities(n, mirror) for n in numbers for case in split.folds[n].val}
    for number in numbers:
        folder = run.fold_probabilities(number, mirror)
        if not (folder / MANIFEST).exists() or not run.stage(number, list(method.stages)[-1]).done.exists():
            return None
        made_by = read_manifest(folder).get("model", {}).get("sha256")
        if made_by != run_digest(run, [number], method.stages):
            return None
    if not all(recorded_scan_digest(folder, case) for case, folder in folders.items()):
        return None
    steps = {name: spec for name, spec in method.postprocess.items() if spec is not None}
    path = run.path if fold is None else run.fold(fold)
    return Validated(Member(path, mirror=mirror, sha256=digests(path)), folders, steps)


def _all_priors(members: Sequence[Validated]) -> dict[str, Any]:
    """Every prior of every member by name; the same name with other settings gets the run's name behind it."""
    found: dict[str, Any] = {}
    for member in members:
        for name, spec in member.postprocess.items():
            found.setdefault(name, spec)
            found.setdefault(_key(found, member, name), spec)
    return found


def _key(priors: Mapping[str, Any], member: Validated, name: str) -> str:
    return name if priors[name] == member.postprocess[name] else f"{name} ({member.name})"


def _first(search: Search) -> Iterator[Recipe]:
    """Every set of members without any post-processing, and with that of each of its members."""
    count = len(search.members)
    sizes = range(1, count + 1) if count <= ALL_SUBSETS_UP_TO else [1, 2, 3, count]
    for size in sizes:
        for members in itertools.combinations(range(count), size):
            for steps in dict.fromkeys([(), *(search.own(member) for member in members)]):
                yield Recipe(members, steps)


def _try_case(case: Case, *given: Any) -> list[dict[str, float]] | str:
    """A case's Dice for each recipe, or the text of an error."""
    try:
        return _dice_of(case, *given)
    except Exception as error:  # in a worker process, whose traceback doesn't help
        return format_error(case.id, error)


def _dice_of(
    case: Case, members: Sequence[Validated], priors: Mapping[str, Any], scheme: Scheme, recipes: Sequence[Recipe]
) -> list[dict[str, float]]:
    scan, truth = read_labelled(case, scheme)
    digest = file_digest(case.image)
    if old := [member.name for member in members if recorded_scan_digest(member.folders[case.id], case.id) != digest]:
        raise UsageError(f"{case.image} is not what {', '.join(old)} predicted. Call `kitseg validate` for them again.")
    found: list[dict[str, float]] = []
    for chosen, group in itertools.groupby(recipes, key=lambda recipe: recipe.members):
        blocks = [read_block(members[i].folders[case.id], case.id) for i in chosen]
        channels = ensemble.common_channels([block.channels for block in blocks])
        mean = ensemble.mean((ensemble.convert(block, channels), 1.0) for block in blocks)
        for recipe in group:
            steps = build_steps({name: priors[name] for name in recipe.steps})
            dice = dice_scores(clean(mean, scan, steps), truth.array, protocol_of(scheme), scheme)
            found.append({name: dice[name] for name in protocol_of(scheme).targets})
    return found
