"""Compare two score files case by case: paired differences with confidence intervals and tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kitseg.commands.score_files import read_scores
from kitseg.errors import InputError, UsageError
from kitseg.labels import scheme_of
from kitseg.report.comparison import format_interval, format_p, signed, unsigned
from kitseg.report.scores import as_background
from kitseg.runtime.files import write_json
from kitseg.scoring.compare import FEWEST, PairedGroup, compare_cases
from kitseg.volumes.names import shorten

SCHEMA = 1
FIGURES, PICTURE = "comparison.json", "comparison.png"
_PLACES = (Path("scores.json"), Path("validation") / "scores.json")


@dataclass(frozen=True)
class Side:
    """One side of a comparison, from a file of ``kitseg evaluate --json``.

    labels: of the references; cases: Dice by case and class; strata: stratum by case and kind; background: cases
    scored as if nothing was found; references: the hash of each case's reference; regions: the classes of each
    region of the references' scheme; patients: of the cases that ``patients.csv`` named; all empty in files of earlier
    versions; notes: those of the file.
    """

    path: Path
    protocol: str
    labels: str
    cases: dict[str, dict[str, float]]
    strata: dict[str, dict[str, str]]
    background: frozenset[str]
    references: dict[str, str] = field(default_factory=dict)
    regions: dict[str, list[int]] = field(default_factory=dict)
    patients: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Two sides and each group of their cases."""

    a: Side
    b: Side
    groups: list[PairedGroup]

    def notes(self) -> list[str]:
        """Notes on cases that are left out and on cases scored as background, and those of both files."""
        lines = []
        if group := next((group for group in self.groups if group.counted == "patients"), None):
            shown = f"{group.cases} cases show {len(group.units)} patients"
            lines.append(f"{shown}: each counts once, by the mean of its cases")
        for name, one, other in (("A", self.a, self.b), ("B", self.b, self.a)):
            if alone := sorted(one.cases.keys() - other.cases.keys()):
                lines.append(f"only {name} has {shorten(alone, 10)}: left out")
            if nothing := sorted(one.background & other.cases.keys()):
                lines.append(f"in {name}, missing or failed and so scored as background: {shorten(nothing, 10)}")
            lines += [f"{name}: {note}" for note in one.notes]
        return lines


def compare(a: Path, b: Path) -> Comparison:
    """Compare two score files, or the ones in two folders (``scores.json`` or ``validation/scores.json``).

    Raises UsageError: both are the same file, or have different protocols, references or regions, or no case in common;
    InputError: one is missing or damaged, or both give a case another stratum or patient.
    """
    one, other = _read(a), _read(b)
    if one.path.resolve() == other.path.resolve():
        raise UsageError(f"{a} and {b} are the same file. Give the scores of two methods")
    if (one.protocol, one.labels) != (other.protocol, other.labels):
        rules = (f"{side.path} was scored by {side.protocol} with the labels {side.labels}" for side in (one, other))
        raise UsageError(f"{' and '.join(rules)}. Evaluate both with the same --protocol and --labels")
    common = one.regions.keys() & other.regions.keys()
    if odd := sorted(name for name in common if set(one.regions[name]) != set(other.regions[name])):
        files = f"{one.path} and {other.path} have other classes in the region {', '.join(odd)}"
        raise UsageError(f"{files}. Evaluate both with the same --labels")
    known = one.references.keys() & other.references.keys() & one.cases.keys() & other.cases.keys()
    if changed := sorted(case for case in known if one.references[case] != other.references[case]):
        files = f"{one.path} and {other.path} were scored against different references of {shorten(changed)}"
        raise UsageError(f"{files}. Evaluate both against the same ones")
    groups = compare_cases(one.cases, other.cases, _strata(one, other), _patients(one, other))
    if not groups:
        raise UsageError(f"{one.path} and {other.path} have no case in common. Evaluate both on the same cases")
    return Comparison(one, other, groups)


def write_figures(path: Path, comparison: Comparison) -> None:
    """Write all results as JSON, with the differences of all cases."""
    a, b = comparison.a, comparison.b
    content: dict[str, Any] = {"protocol": a.protocol, "labels": a.labels, "a": str(a.path), "b": str(b.path)}
    content["only_a"] = sorted(a.cases.keys() - b.cases.keys())
    content["only_b"] = sorted(b.cases.keys() - a.cases.keys())
    content["background_a"], content["background_b"] = sorted(a.background), sorted(b.background)
    content["notes_a"], content["notes_b"] = a.notes, b.notes
    content["groups"] = [_figures(group) for group in comparison.groups]
    write_json(path, SCHEMA, content)


def sentence(group: PairedGroup) -> str:
    """The outcome for a group as a sentence."""
    name, paired, verdict = f"{group.name} {group.stratum}".strip(), group.paired, group.verdict
    mean = signed(paired.mean)
    if paired.low is None or paired.high is None:
        return f"{name}: too few {group.counted} to judge ({paired.n}; it takes {FEWEST}); the mean of B − A is {mean}"
    if verdict in ("A", "B"):
        count = paired.wins if verdict == "B" else paired.losses
        low, high = map(unsigned, sorted((abs(paired.low), abs(paired.high))))
        facts = f"95 % CI {low} to {high}, p {format_p(group.p)}, {count} of {paired.n} {group.counted}"
        return f"{name}: {verdict} is better by {unsigned(abs(paired.mean))} ({facts})"
    tally = f"B better in {paired.wins}, A in {paired.losses} of {paired.n} {group.counted}"
    facts = f"95 % CI {format_interval(paired)}, p {format_p(group.p)}, {tally}"
    if verdict == "none":
        return f"{name}: no significant difference: the mean of B − A is {mean} ({facts})"
    return f"{name}: inconclusive, interval and test disagree: the mean of B − A is {mean} ({facts})"


def _read(path: Path) -> Side:
    """A score file, or the one in a folder."""
    found = next((path / place for place in _PLACES if (path / place).is_file()), path)
    if path.is_dir() and found == path:
        problem = f"the folder has no {' or '.join(map(str, _PLACES))}"
        raise InputError(path, problem, "Give a file from `kitseg evaluate --json`.")
    content, cases = read_scores(found), dict[str, dict[str, float]]()
    for case, classes in content["cases"].items():
        for name, figures in classes.items():
            if (dice := figures.get("dice")) is None or not 0 <= dice <= 1:
                raise InputError(found, f"{case} has a Dice of {dice} for {name}", "Make it with `kitseg evaluate`.")
            cases.setdefault(case, {})[name] = dice
    background = frozenset(as_background(content))
    labels = content.get("labels") or scheme_of(content.get("convention", "kits19")).line
    references, regions = content.get("references", {}), content.get("regions", {})
    patients, notes = content.get("patients", {}), tuple(content.get("notes", []))
    strata = content["strata"]
    return Side(found, content["protocol"], labels, cases, strata, background, references, regions, patients, notes)


def _strata(a: Side, b: Side) -> dict[str, dict[str, str]]:
    """The strata that either side knows."""
    both: dict[str, dict[str, str]] = {}
    for case in a.cases.keys() & b.cases.keys():
        one, other = a.strata.get(case, {}), b.strata.get(case, {})
        for kind in one.keys() & other.keys():
            if one[kind] != other[kind]:
                problem = f"{case} is of {kind} {other[kind]}, in {a.path} of {one[kind]}"
                raise InputError(b.path, problem, "Evaluate both against the same references.")
        both[case] = {**one, **other}
    return both


def _patients(a: Side, b: Side) -> dict[str, str]:
    """The patients that either side knows."""
    for case in sorted(a.patients.keys() & b.patients.keys()):
        if a.patients[case] != b.patients[case]:
            problem = f"{case} is of the patient {b.patients[case]}, in {a.path} of {a.patients[case]}"
            raise InputError(b.path, problem, "Evaluate both with the same patients.csv.")
    return {**a.patients, **b.patients}


def _figures(group: PairedGroup) -> dict[str, Any]:
    paired = group.paired
    interval = None if paired.low is None else [paired.low, paired.high]
    return {
        "class": group.name,
        "kind": group.kind or None,
        "stratum": group.stratum or None,
        "n": paired.n,
        "cases": group.cases,
        "mean_a": paired.mean_a,
        "mean_b": paired.mean_b,
        "difference": paired.mean,
        "interval_95": interval,
        "p": paired.p,
        "p_holm": group.holm,
        "better": paired.wins,
        "same": paired.ties,
        "worse": paired.losses,
        "verdict": group.verdict,
        "differences": dict(zip(group.units, paired.differences.tolist(), strict=True)),
    }
