"""Tables for a page from a file of ``kitseg evaluate --json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kitseg.report.html import number
from kitseg.scoring.protocols import METRICS

ScoreTable = Mapping[str, Mapping[str, float | None]]


@dataclass(frozen=True)
class Table:
    """A table of text cells; the first column names the rows."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class StudyScores:
    """The scores on a study's page: of each case (metrics by class), and tables over all cases.

    strata: of each case, by kind; order: the strata of each kind in their natural order; notes: paragraphs, for example
    on missing cases.
    """

    cases: Mapping[str, ScoreTable] = field(default_factory=dict)
    tables: tuple[Table, ...] = ()
    strata: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    order: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def study_scores(content: Mapping[str, Any]) -> StudyScores:
    """What to show of a file of ``kitseg evaluate --json``, as ``score_files.read_scores`` reads it."""
    groups = content["groups"]
    kinds = dict.fromkeys(group["kind"] for group in groups)
    order = {kind: tuple(group["name"] for group in groups if group["kind"] == kind) for kind in kinds}
    tables = (_summary(content), _groups(groups), _detection(content.get("detection", {})))
    shown = tuple(table for table in tables if table.rows)
    return StudyScores(content["cases"], shown, content["strata"], order, _notes(content))


def display_name(name: str) -> str:
    """The display name of a class or metric: ``kidney_and_mass`` is ``kidney and mass``."""
    return METRICS.get(name, name.replace("_", " "))


def _summary(content: Mapping[str, Any]) -> Table:
    """The summary of each metric over all cases."""

    def row(name: str, metric: str, mean: float | None) -> tuple[str, ...]:
        median, interval, undefined = (
            content.get(part, {}).get(name, {}).get(metric) for part in ("median", "ci95", "undefined")
        )
        between = " to ".join(number(bound, 3) for bound in interval) if interval else "–"
        return (
            f"{display_name(name)}: {display_name(metric)}",
            number(mean, 3),
            between,
            number(median, 3),
            str(undefined or 0),
        )

    rows = tuple(row(name, metric, mean) for name, found in content["mean"].items() for metric, mean in found.items())
    return Table("Over all cases", ("", "mean", "95 % CI", "median", "cases undefined"), rows)


def _groups(groups: list[dict[str, Any]]) -> Table:
    """Mean Dice by stratum."""
    names = list(dict.fromkeys(name for group in groups for name in group["dice"]))
    rows = tuple(
        (
            "all cases" if group["kind"] == "all" else f"{group['kind']}: {group['name']}",
            str(group["cases"]),
            *(number(group["dice"].get(name), 3) for name in names),
        )
        for group in groups
    )
    return Table("Mean Dice by group", ("", "cases", *map(display_name, names)), rows)


def _detection(detection: Mapping[str, Any]) -> Table:
    """Tumor detection by size."""
    sizes = detection.get("sizes", {})
    columns = tuple(dict.fromkeys(key for found in sizes.values() for key in found))
    rows = tuple((size, *(_cell(found.get(key)) for key in columns)) for size, found in sizes.items())
    return Table("Tumor detection", ("", *map(display_name, columns)), rows)


def _cell(value: float | None) -> str:
    return str(value) if isinstance(value, int) else number(value, 3)


def _notes(content: Mapping[str, Any]) -> tuple[str, ...]:
    notes = [f"Scored with the protocol of {content['protocol']}.", *content.get("notes", [])]
    if content.get("missing"):
        notes.append(f"Missing predictions, scored as background: {', '.join(content['missing'])}.")
    if content.get("failed"):
        notes.append(f"Could not be scored: {', '.join(content['failed'])}.")
    return tuple(notes)
