"""Tables of scores, paired differences and fitted priors on the screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from kitseg.runtime import console

if TYPE_CHECKING:
    from pathlib import Path

    from kitseg.commands.compare import Comparison
    from kitseg.commands.evaluate import Rules, Score
    from kitseg.commands.fit_priors import Fit
    from kitseg.measurement.confidence import Confidence
    from kitseg.measurement.intervals import Calibration
    from kitseg.report.scores import Table


def show_scores(scores: Sequence[Score], content: Mapping[str, Any], rules: Rules) -> None:
    """Print the challenge's metrics of each case, then what a file of the scores holds over all cases."""
    from kitseg.report.scores import score_notes, score_tables
    from kitseg.scoring.protocols import METRICS

    shown = [
        (name, metric)
        for name, target in rules.protocol.targets.items()
        for metric in (("dice",) if target.tolerance_mm is None else ("dice", "surface_dice"))
    ]
    table = console.table("case", *(f"{name} {METRICS[metric]}" for name, metric in shown), "")
    for score in scores:
        note = "missing: scored as background" if score.missing else escape(score.error)
        metrics = (console.cell(score.classes.get(name, {}).get(metric)) for name, metric in shown)
        table.add_row(escape(score.case), *metrics, f"[red]{note}[/]")
    console.out.print(table)
    for over_all in score_tables(content):
        show_table(over_all)
    for metric, value in content["score"].items():
        console.print_line(f"{rules.protocol.name}, mean {METRICS[metric]} over the classes: {value:.4f}")
    for note in score_notes(content):
        console.print_line(f"[yellow]{escape(note)}[/]")


def show_table(table: Table) -> None:
    """Print a table of a report."""
    shown = console.table(*map(escape, table.columns))
    for name, *values in table.rows:
        shown.add_row(escape(str(name)), *map(console.cell, values))
    console.out.print(table.title, shown)


def show_intervals(found: Calibration | None, path: Path) -> None:
    """Print the errors that the intervals of each quantity reach to."""
    if found is None:
        console.print_line("No intervals: no case could be measured.")
        return
    table = console.table("quantity", "patients", "errors", "low mm", "high mm", "predicted mm")
    for name, known in found.quantities.items():
        sizes = "{:.0f} to {:.0f}".format(*known.predicted_mm)
        table.add_row(
            name, str(known.patients), str(known.count), f"{known.low_mm:+.1f}", f"{known.high_mm:+.1f}", sizes
        )
    console.out.print(table)
    slices = "{:g} to {:g}".format(*found.slice_mm)
    console.print_line(
        f"{found.level:.0%} intervals from {found.cases} cases, slices {slices} mm apart; errors of volumes are those "
        "of the diameter of a ball. A quantity needs 19 patients."
    )
    console.print_line(escape(f"→ {path}"))


def show_confidence(found: Confidence | None, path: Path | None = None, left_out: Sequence[str] = ()) -> None:
    """Print how well orderings of the cases by trust separate good from bad tumor labels, and which were left out."""
    from kitseg.measurement.confidence import FAILED, LEAST

    for line in left_out:
        console.print_line(escape(line))
    if found is None:
        console.print_line(f"No expected Dice: it takes {LEAST} cases of several patients, predicted by this version.")
        return
    table = console.table("cases in the order of", "AURC", f"Dice below {FAILED:g}, of the last {found.reviewed} cases")
    for name, ordering in found.orderings.items():
        table.add_row(name, f"{ordering.aurc:.3f}", f"{ordering.caught:.1f} of all {found.failed}")
    console.out.print(table)
    console.print_line(
        "AURC: mean of 1 − tumor Dice of the most trusted cases, over all their numbers; lower is better."
    )
    if path:
        console.print_line(escape(f"→ {path}"))


def show_comparison(comparison: Comparison) -> None:
    """Print a table of the paired differences, and a sentence on the outcome of each class."""
    from kitseg.commands.compare import sentence
    from kitseg.report.comparison import format_interval, format_p, signed

    table = console.table("", "n", "mean A", "mean B", "B − A", "95 % CI", "p", "B better", "same", "A better")
    for group in comparison.groups:
        if not group.kind and table.row_count:
            table.add_section()
        paired, name = group.paired, f"  {group.kind}: {group.stratum}" if group.kind else group.name
        means = (console.cell(paired.mean_a), console.cell(paired.mean_b), signed(paired.mean))
        counts = (str(count) for count in (paired.wins, paired.ties, paired.losses))
        p = format_p(group.p).removeprefix("= ")
        table.add_row(escape(name), str(paired.n), *means, format_interval(paired), p, *counts)
    console.out.print(table)
    for group in comparison.groups:
        if not group.kind:
            console.print_line(escape(sentence(group)))
    console.print_line("95 % CI: BCa bootstrap of the mean; p: Wilcoxon signed-rank test, two-sided, not corrected")
    if tests := sum(group.holm is not None for group in comparison.groups):
        console.print_line(f"p of the strata: Holm-corrected for {tests} tests")


def show_fit(fit: Fit) -> None:
    """Print how much tumor each prior would remove, and the options that set the fitted range."""
    table = console.table("prior", "settings", "tumors lost", "tumor lost (ml)", "cases that lose every tumor")
    for cost in fit.costs:
        settings = ", ".join(f"{key} {value:g}" for key, value in cost.setting.items())
        tumors, cases = f"{cost.lost_tumors} of {cost.tumors}", f"{cost.lost_cases} of {cost.cases}"
        table.add_row(cost.prior, settings, tumors, f"{cost.lost_ml:.1f} of {cost.ml:.1f}", cases)
    console.out.print(table)
    failed = sum(bool(finding.error) for finding in fit.findings)
    console.print_line(f"{len(fit.findings) - failed} of {len(fit.findings)} cases read")
    if not any(cost.prior == "dark" for cost in fit.costs):
        console.print_line("dark: not tested, because there is no CT (imaging.nii.gz) next to the labels")
    console.print_line(f"λ1/λ2 of {fit.tumors} tumors of 10 voxels or more, 5-95 %: {fit.low:.3f}-{fit.high:.3f}")
    console.print_line(f"--set postprocess.shape.low={fit.low:.3f} --set postprocess.shape.high={fit.high:.3f}")
