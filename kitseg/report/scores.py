"""Tables for a page from a file of ``kitseg evaluate --json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kitseg.scoring.protocols import METRICS
from kitseg.volumes.references import Shown

_LESIONS = {"": "Tumor", "cyst_": "Cyst"}  # by the start of the key
ScoreTable = Mapping[str, Mapping[str, float | None]]


Cell = str | float | tuple[float, float] | None


@dataclass(frozen=True)
class Table:
    """A table of values, None where one is not defined; the first column names the rows."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class StudyScores:
    """The scores on a study's page: of each case (metrics by class), and tables over all cases.

    strata: of each case, by kind; order: the strata of each kind in their natural order; notes: paragraphs, for example
    on missing cases; predictions, shown, references: the hash of each file that was scored, what it shows, and the hash
    of each reference's labels, empty in files of earlier versions.
    """

    cases: Mapping[str, ScoreTable] = field(default_factory=dict)
    tables: tuple[Table, ...] = ()
    strata: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    order: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    predictions: Mapping[str, str] = field(default_factory=dict)
    references: Mapping[str, str] = field(default_factory=dict)
    shown: Mapping[str, Shown] = field(default_factory=dict)


def study_scores(content: Mapping[str, Any]) -> StudyScores:
    """What to show of a file of ``kitseg evaluate --json``, as ``score_files.read_scores`` reads it."""
    kinds = dict.fromkeys(group["kind"] for group in content["groups"])
    order = {kind: tuple(group["name"] for group in content["groups"] if group["kind"] == kind) for kind in kinds}
    notes = f"Scored with the protocol of {content['protocol']}.", *score_notes(content)
    shown = content["cases"], score_tables(content), content["strata"], order, notes
    return StudyScores(*shown, *(content.get(name, {}) for name in ("predictions", "references", "shown")))


def score_tables(content: Mapping[str, Any]) -> tuple[Table, ...]:
    """The metrics over all cases, mean Dice by group, detection of tumors and cysts by size; without empty tables."""
    found = (_detection(content.get(f"{key}detection", {}), f"{name} detection") for key, name in _LESIONS.items())
    tables = (_summary(content), group_table(content["groups"]), *found)
    return tuple(table for table in tables if table.rows)


def as_background(content: Mapping[str, Any]) -> list[str]:
    """The cases that were scored as background: without a prediction, or with one that can't be used."""
    return sorted({*content.get("missing", []), *content.get("failed", {})} & content["cases"].keys())


def not_scored(content: Mapping[str, Any]) -> list[str]:
    """The cases that could not be scored, such as those whose reference can't be read."""
    return sorted(content.get("failed", {}).keys() - content["cases"].keys())


def display_name(name: str) -> str:
    """The display name of a class or metric: ``kidney_and_mass`` is ``kidney and mass``."""
    return METRICS.get(name, name.replace("_", " "))


def group_table(groups: Sequence[Mapping[str, Any]]) -> Table:
    """Mean Dice of all cases and of each group."""
    names = list(dict.fromkeys(name for group in groups for name in group["dice"]))
    rows = tuple(
        (
            "all cases" if group["kind"] == "all" else f"{group['kind']}: {group['name']}",
            group["cases"],
            *map(group["dice"].get, names),
        )
        for group in groups
    )
    return Table("Mean Dice by group", ("", "cases", *map(display_name, names)), rows)


def _summary(content: Mapping[str, Any]) -> Table:
    rows = tuple(
        (
            f"{display_name(name)}: {display_name(metric)}",
            mean,
            *(content.get(part, {}).get(name, {}).get(metric) for part in ("ci95", "median", "undefined")),
        )
        for name, metrics in content["mean"].items()
        for metric, mean in metrics.items()
    )
    return Table("Over all cases", ("", "mean", "95 % CI", "median", "cases undefined"), rows)


def _detection(detection: Mapping[str, Any], title: str) -> Table:
    sizes = detection.get("sizes", {})
    columns = tuple(dict.fromkeys(key for found in sizes.values() for key in found))
    rows = tuple((size, *map(found.get, columns)) for size, found in sizes.items())
    return Table(title, ("", *map(display_name, columns)), rows)


def score_notes(content: Mapping[str, Any]) -> list[str]:
    """What is to be known of the scores, with the cases that count as background or are left out."""
    notes = [*content.get("notes", [])]
    if cases := as_background(content):
        notes.append(f"Predictions that are missing or can't be used, scored as background: {', '.join(cases)}.")
    if cases := not_scored(content):
        notes.append(f"Could not be scored, and left out of all figures: {', '.join(cases)}.")
    return notes
