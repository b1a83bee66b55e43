"""Tables of scores, paired differences and fitted priors on the screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.markup import escape

from kitseg.runtime import console

if TYPE_CHECKING:
    from kitseg.commands.compare import Comparison
    from kitseg.commands.evaluate import Rules, Score
    from kitseg.commands.fit_priors import Fit
    from kitseg.scoring.summary import Summary


def show_scores(scores: Sequence[Score], rules: Rules) -> None:
    """Print the challenge's metrics of each case, all metrics over the cases, and the tumor detection."""
    from kitseg.commands.score_files import challenge_score, score_summary
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
        table.add_row(score.case, *metrics, f"[red]{note}[/]")
    console.out.print(table)
    summaries = score_summary(scores)
    _show_summary(summaries)
    _show_detection(scores)
    for metric, value in challenge_score(summaries).items():
        console.print_line(f"{rules.protocol.name}, mean {METRICS[metric]} over the classes: {value:.4f}")


def _show_summary(summaries: Mapping[str, Mapping[str, Summary]]) -> None:
    from kitseg.scoring.protocols import METRICS

    table = console.table("class", "", "mean", "95 % CI", "median", "cases", "undefined")
    for name, metrics in summaries.items():
        for number, (metric, value) in enumerate(metrics.items(), 1):
            low, high = console.cell(value.low), console.cell(value.high)
            interval = console.cell(None) if value.low is None else f"{low} to {high}"
            row = (
                console.cell(value.mean),
                interval,
                console.cell(value.median),
                str(value.cases),
                str(value.undefined),
            )
            table.add_row(name if number == 1 else "", METRICS[metric], *row, end_section=number == len(metrics))
    console.out.print(table)


def _show_detection(scores: Sequence[Score]) -> None:
    from kitseg.scoring.detection import tally

    table = console.table("tumors", "in the references", "found", "recall", "predicted", "true", "precision")
    for size, count in tally(score.detection for score in scores if score.detection).items():
        truth = (str(count.reference), str(count.found), console.cell(count.recall))
        table.add_row(size, *truth, str(count.predicted), str(count.true), console.cell(count.precision))
    console.out.print(table)


def show_comparison(comparison: Comparison) -> None:
    """Print a table of the paired differences, and a sentence on the outcome of each class."""
    from kitseg.commands.compare import format_interval, format_p, sentence, signed

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
    if comparison.tests:
        console.print_line(f"p of the strata: Holm-corrected for {comparison.tests} tests")


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
