"""What a run's scores answer to the questions of Metrics Reloaded (Maier-Hein et al., Nature Methods 21, 2024)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kitseg.commands.score_files import ScoreFile
from kitseg.report.scores import as_background
from kitseg.scoring.detection import ALL, MIN_IOU, TOLERANCE_MM
from kitseg.scoring.protocols import METRICS, PROTOCOLS, Target

_BOUNDARY = ("surface_dice", "hd95_mm", "assd_mm")
_NONE = "not in the run's scores: `kitseg evaluate` computes them from the predictions of its validation"


def metric_choices(scores: ScoreFile | None, unknown: str) -> list[tuple[str, str]]:
    """Pairs of question and answer, all of them ``unknown`` without scores."""
    return [(question, unknown if scores is None else answer(scores)) for question, answer in _QUESTIONS.items()]


def _categories(scores: ScoreFile) -> str:
    instances = "; instance segmentation of tumors, each apart" if scores.get("detection") else ""
    return f"Semantic segmentation of {', '.join(scores['mean'])}{instances}."


def _boundary(scores: ScoreFile) -> str:
    keys = [key for key in _BOUNDARY if any(key in figures for figures in scores["mean"].values())]
    targets = PROTOCOLS[scores["protocol"]].targets
    tolerances = [_tolerance(name, target) for name, target in targets.items() if target.tolerance_mm is not None]
    shown = f"; tolerance of surface Dice: {', '.join(tolerances)}" if "surface_dice" in keys and tolerances else ""
    return f"{', '.join(METRICS[key] for key in keys) or _NONE}{shown}."


def _tolerance(name: str, target: Target) -> str:
    return f"{name} {target.tolerance_mm:.2f} mm"


def _of_instances(text: str) -> Callable[[ScoreFile], str]:
    """What scores with figures of each tumor are computed by; others weren't."""
    return lambda scores: text if scores.get("detection") else f"{_NONE}."


def _instances(scores: ScoreFile) -> str:
    found = scores.get("detection", {}).get("sizes", {}).get(ALL)
    if found is None:
        return f"{_NONE}."
    values = (
        f"{key.replace('_', ' ')} {_figure(found, key)}" for key in ("recall", "precision", "dice", "surface_dice")
    )
    return (
        f"Tumors: {', '.join(values)} (tolerance {TOLERANCE_MM:.2f} mm); {found['found']} of {found['reference']} "
        f"found, {found['true']} of {found['predicted']} predicted ones true; Dice and surface Dice are of those found."
    )


def _figure(found: Mapping[str, int | float | None], key: str) -> str:
    value = found.get(key)
    return "undefined" if value is None else f"{value:.3f}"


def _undefined(scores: ScoreFile) -> str:
    counts = {
        f"{name} {METRICS.get(key, key)}": count
        for name, figures in scores.get("undefined", {}).items()
        for key, count in figures.items()
        if count
    }
    listed = ", ".join(f"{name} in {count}" for name, count in counts.items()) or "none"
    return (
        "Dice and surface Dice are 1 where prediction and reference are both empty, 0 where one is; other figures "
        f"have no value there and are left out of the mean. Cases without a value: {listed}."
    )


def _aggregation(scores: ScoreFile) -> str:
    return (
        f"Each figure per case, then the mean and the median over {len(scores['cases'])} cases, each class apart; a "
        f"case without a usable prediction counts as background ({len(as_background(scores))})."
    )


def _groups(scores: ScoreFile) -> str:
    kinds = dict.fromkeys(group["kind"] for group in scores["groups"] if group["kind"] != "all")
    return f"Mean Dice also by {', '.join(kinds)} (CLAIM 30)." if kinds else "None."


_QUESTIONS: Mapping[str, Callable[[ScoreFile], str]] = {
    "Problem category": _categories,
    "Overlap metric": lambda _: "Dice.",
    "Boundary metrics, since Dice doesn't see the outline of large structures": _boundary,
    "Localization criterion": _of_instances(
        f"Intersection over union of {MIN_IOU:g} or more between 26-connected components."
    ),
    "Assignment": _of_instances(
        "One to one: as many pairs as possible, then the largest overlap; a second piece is false."
    ),
    "Metrics per instance": _instances,
    "Empty masks and missing values": _undefined,
    "Aggregation": _aggregation,
    "Subgroups": _groups,
}
