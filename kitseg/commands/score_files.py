"""Scores on disk: a JSON file and a CSV table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NotRequired, TypedDict, TypeVar

from kitseg.commands.evaluate import Rules, Score, Unscored, groups, notes
from kitseg.runtime import files
from kitseg.runtime.provenance import FileFormat
from kitseg.scoring.detection import Detection, tally
from kitseg.scoring.summary import Summary, summarize
from kitseg.volumes.references import Shown

Value = TypeVar("Value")
_ByFigure = dict[str, dict[str, Value]]  # of each class


class _Group(TypedDict):
    kind: str
    name: str
    cases: int
    dice: dict[str, float]


class _DetectionBySize(TypedDict, total=False):
    sizes: dict[str, dict[str, int | float | None]]


class ScoreFile(TypedDict):
    """The part of a file of ``write_scores`` that is read again; all else is for other programs."""

    protocol: str
    cases: dict[str, _ByFigure[float | None]]
    mean: _ByFigure[float | None]
    groups: list[_Group]
    strata: dict[str, dict[str, str]]
    labels: NotRequired[str]
    regions: NotRequired[dict[str, list[int]]]  # of the scheme, by kitseg's ids
    convention: NotRequired[str]  # of kitseg 0.1: kits19 or kits23
    median: NotRequired[_ByFigure[float | None]]
    ci95: NotRequired[_ByFigure[tuple[float, float] | None]]
    undefined: NotRequired[_ByFigure[int]]
    detection: NotRequired[_DetectionBySize]
    cyst_detection: NotRequired[_DetectionBySize]
    references: NotRequired[dict[str, str]]
    predictions: NotRequired[dict[str, str]]
    shown: NotRequired[dict[str, Shown]]
    patients: NotRequired[dict[str, str]]
    missing: NotRequired[list[str]]
    failed: NotRequired[dict[str, str]]
    notes: NotRequired[list[str]]


_FORMAT = FileFormat(ScoreFile, 1, "Make it with `kitseg evaluate --json`, or with `kitseg validate RUN`.")


def _challenge_score(summaries: Mapping[str, Mapping[str, Summary]], rules: Rules) -> dict[str, float]:
    """What the challenge ranks by: mean Dice, and where it has it mean surface Dice, over cases and classes."""
    found = {}
    for figure in ("dice", "surface_dice"):
        means = [summaries[name][figure].mean for name in rules.protocol.targets if figure in summaries.get(name, {})]
        values = [mean for mean in means if mean is not None]
        if values:
            found[figure] = sum(values) / len(values)
    return found


def score_content(
    scores: Sequence[Score],
    rules: Rules,
    folds: Mapping[str, int],
    unscored: Unscored,
    patients: Mapping[str, str],
) -> dict[str, Any]:
    """The scores as plain values.

    folds: in which fold each case was validated; unscored: see ``find_jobs``; patients: of cases, as known.
    """
    scored = [score for score in scores if score.classes]
    summaries = summarize([s.classes for s in scored], [patients.get(s.case, s.case) for s in scored])
    content: dict[str, Any] = {"protocol": rules.protocol.name, "labels": rules.scheme.line}
    content["cases"] = {score.case: score.classes for score in scored}
    content["mean"] = _each(summaries, lambda s: s.mean)
    content["median"] = _each(summaries, lambda s: s.median)
    content["ci95"] = _each(summaries, lambda s: None if s.low is None else [s.low, s.high])
    content["undefined"] = _each(summaries, lambda s: s.undefined)
    content["score"] = _challenge_score(summaries, rules)
    content["detection"] = _detection({score.case: score.detection for score in scores})
    content["cyst_detection"] = _detection({score.case: score.cyst_detection for score in scores})
    content["strata"] = {s.case: dict(s.strata) for s in scores if s.strata}
    content["folds"] = dict(folds)
    content["groups"] = [asdict(group) for group in groups(scores, folds)]
    content["regions"] = {name: target.labels for name, target in rules.protocol.more_targets(rules.scheme).items()}
    content["references"] = {score.case: score.reference for score in scores if score.reference}
    content["predictions"] = {score.case: score.prediction for score in scores if score.prediction}
    content["shown"] = {score.case: asdict(score.shown) for score in scores if score.shown}
    content["patients"] = {score.case: patients[score.case] for score in scores if score.case in patients}
    content["missing"] = [score.case for score in scores if score.missing]
    content["without_reference"] = list(unscored.predictions)
    content["failed"] = {score.case: score.error for score in scores if score.error}
    content["learned_from"] = {score.case: score.learned_from for score in scores if score.learned_from}
    content["notes"] = notes(scores, rules, unscored)
    return content


def write_scores(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``score_content`` as JSON."""
    _FORMAT.write(path, content)


def read_scores(path: Path) -> ScoreFile:
    """Read a file of ``write_scores``. Raises InputError: missing, damaged, or of another schema."""
    return _FORMAT.read(path)


def write_score_table(path: Path, scores: Sequence[Score]) -> None:
    """Write the scores as CSV: a row for each case and class; a figure that isn't defined is empty."""
    rows = [
        {"case": score.case, "class": name, **figures, "note": score.error or ("missing" if score.missing else "")}
        for score in scores
        for name, figures in score.classes.items()
    ]
    rows += [{"case": score.case, "note": score.error} for score in scores if not score.classes]
    columns = dict.fromkeys(["case", "class", *(key for row in rows for key in row)])
    files.write_table(path, columns, rows)


def _each(summaries: Mapping[str, Mapping[str, Summary]], what: Any) -> dict[str, dict[str, Any]]:
    return {name: {figure: what(summary) for figure, summary in figures.items()} for name, figures in summaries.items()}


def _detection(found: Mapping[str, Detection | None]) -> dict[str, Any]:
    """How many lesions were found, in all and by size, and each lesion of each case."""
    known = {case: detection for case, detection in found.items() if detection}
    if not known:
        return {}
    tallies = {
        size: {**asdict(count), "recall": count.recall, "precision": count.precision}
        for size, count in tally(known.values()).items()
    }
    return {"sizes": tallies, "cases": {case: asdict(detection) for case, detection in known.items()}}
