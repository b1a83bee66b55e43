"""Commands that judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from kitseg.cli.app import (
    PREDICTIONS,
    Convention,
    Device,
    Fold,
    Jobs,
    Mirror,
    Shard,
    Split,
    app,
    cross_validate,
    exit_if,
    known_convention,
)
from kitseg.cli.cases import Cluster, ExecutionOptions, gather
from kitseg.errors import UsageError
from kitseg.runtime import console

if TYPE_CHECKING:
    from kitseg.commands.compare import Comparison
    from kitseg.commands.evaluate import Rules, Score
    from kitseg.commands.fit_priors import Fit
    from kitseg.scoring.summary import Summary

SHOWN = 15  # of the combinations that `choose` tries


@app.command(epilog="Example: kitseg fit-priors --labels data --split splits.json --fold 0")
def fit_priors(
    labels: Annotated[Path, typer.Option(help="Folder of true label maps, KiTS layout or flat.")] = Path("data"),
    split: Annotated[Path | None, typer.Option(help="A split file: only its training cases, with --fold.")] = None,
    fold: Annotated[int | None, typer.Option(help="With --split: the training cases of this fold.")] = None,
    convention: Convention = "kits19",
    jobs: Jobs = -1,
    report: Annotated[Path | None, typer.Option("--json", help="Write the range and every tumor to this file.")] = None,
) -> None:
    """Measure the shape of true tumors, and how many of them each prior of post-processing would cost."""
    from kitseg.commands import fit_priors as priors

    known_convention(convention)
    maps = priors.training_labels(labels, split, fold)
    with console.bar("fit-priors", len(maps)) as step:

        def done(finding: priors.Finding) -> None:
            step()
            if finding.error:
                console.print_error(finding.error)

        fit = priors.fit_priors(maps, convention, jobs, done)
    if report:
        priors.write_fit(report, fit)
    _show_fit(fit)
    exit_if(any(finding.error for finding in fit.findings))


@app.command(epilog="Example: kitseg evaluate predictions data --protocol kits23 --json scores.json")
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="Folder of label maps to score.")] = PREDICTIONS,
    references: Annotated[Path, typer.Argument(help="Folder of reference label maps.")] = Path("data"),
    protocol: Annotated[str, typer.Option(help="Whose rules: kits19, kits21 or kits23.")] = "kits19",
    convention: Annotated[
        str | None, typer.Option(help="What label ids mean: kits19 (cysts are kidney) or kits23; else the protocol's.")
    ] = None,
    cases: Annotated[str | None, typer.Option(help="Cases that must be there: 210-299; missing is background.")] = None,
    split: Split = None,
    fold: Fold = None,
    jobs: Jobs = -1,
    cluster: Cluster = None,
    shard: Shard = None,
    table: Annotated[
        Path | None, typer.Option("--csv", help="Write a row for each case and class to this file.")
    ] = None,
    report: Annotated[Path | None, typer.Option("--json", help="Write the scores to this file.")] = None,
) -> None:
    """Official KiTS scores, distances, volume errors and tumors found, per case and over all cases.

    kits19: kidney (with tumor) and tumor. kits21, kits23: kidney_and_mass, mass (tumor and cyst) and tumor, with
    surface Dice.
    """
    from kitseg.commands import evaluate as scoring
    from kitseg.commands.score_files import write_score_table, write_scores
    from kitseg.runtime.resume import ResultCache

    if convention:
        known_convention(convention)
    rules = scoring.rules(protocol, convention)
    found, unscored = scoring.find_jobs(predictions, references, scoring.required_cases(cases, split, fold))
    output = report or table
    kept = ResultCache.beside(output, scoring.Score) if output else None
    scores = gather("evaluate", scoring.score_work(found, rules), kept, ExecutionOptions(jobs, cluster, shard))
    _show_scores(scores, rules)
    for note in scoring.notes(scores, rules, unscored):
        console.print_line(f"[yellow]{escape(note)}[/]")
    if report:
        write_scores(report, scores, rules, unscored=unscored)
    if table:
        write_score_table(table, scores)
    if kept:
        kept.clear()
    exit_if(any(score.missing or score.error for score in scores))


@app.command(epilog="Example: kitseg validate runs/two-phase-small --data data")
def validate(
    run: Annotated[Path, typer.Argument(help="A run, or one fold of it.")],
    data: Annotated[list[Path], typer.Option(help="Folder of labelled cases; several times for several.")] = [  # noqa: B006
        Path("data")
    ],
    mirror: Mirror = False,
    device: Device = "auto",
) -> None:
    """Cross-validation: each fold's networks on the cases that they never saw, scored together.

    Goes on when called again, and takes in folds that were finished since. By fold, tumor size and slice distance, and
    by histology and surgery where the data folder holds the challenge's kits.json.
    """
    cross_validate(run, data, device, mirror)


@app.command(epilog="Example: kitseg choose runs/two-phase-paper runs/progressive-paper -o ensemble.yaml")
def choose(
    runs: Annotated[list[Path], typer.Argument(help="Validated runs, or folds of them.")],
    data: Annotated[list[Path], typer.Option(help="Folder of labelled cases; several times for several.")] = [  # noqa: B006
        Path("data")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The ensemble file.")] = Path("ensemble.yaml"),
    jobs: Jobs = -1,
) -> None:
    """Find the runs to average and the post-processing with the best out-of-fold Dice.

    Tries every set of the runs (with `validate --mirror`, mirrored ones too), each without post-processing and with
    that of its members, then one prior more or less for as long as it helps.
    """
    from kitseg.commands import choose as steps
    from kitseg.volumes.kits import labelled_cases

    if output.suffix != ".yaml":
        raise UsageError(f"{output}: the ensemble file is YAML; give a name that ends in .yaml")
    steps.spare(output)
    search = steps.open_search(runs, labelled_cases(data))
    for number, recipes in enumerate(steps.rounds(search), 1):
        with console.bar(f"choose, round {number}: {len(recipes)} combinations", len(search.cases)) as step:
            steps.try_recipes(search, recipes, jobs, step)
    table = console.table("runs", "post-processing", "kidney", "tumor", "mean")
    for tried in steps.ranked(search)[:SHOWN]:
        dice = (console.cell(tried.dice[name]) for name in ("kidney", "tumor"))
        table.add_row(*map(escape, steps.describe_recipe(search, tried.recipe)), *dice, console.cell(tried.score))
    console.out.print(table)
    steps.write_choice(output, search)
    console.print_line(
        f"{len(search.tried)} combinations tried on {len(search.cases)} cases; all of them are in {output}"
    )
    console.print_line("The best of many looks a little better than it is: try it on cases that had no part in this.")
    console.print_line(f"kitseg predict SCAN --model {output}")


@app.command(epilog="Example: kitseg compare two-phase.json two-stage.json")
def compare(
    a: Annotated[
        Path, typer.Argument(help="Scores of A: a file of `kitseg evaluate --json`, its folder, or a validated run.")
    ],
    b: Annotated[Path, typer.Argument(help="Scores of B, on the same cases.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the picture and the figures.")] = Path(
        "comparison"
    ),
) -> None:
    """Is B better than A? Paired differences per class and stratum, with interval and test."""
    from kitseg.commands import compare as pairs
    from kitseg.report.comparison import comparison_picture

    comparison = pairs.compare(a, b)
    for name, file in (("A", comparison.a), ("B", comparison.b)):
        console.print_line(escape(f"{name}: {file.path}, {len(file.cases)} cases"))
    for note in comparison.notes():
        console.print_line(escape(note))
    _show_comparison(comparison)
    comparison_picture(output / pairs.PICTURE, comparison.groups, str(comparison.a.path), str(comparison.b.path))
    pairs.write_figures(output / pairs.FIGURES, comparison)
    console.print_line(escape(f"→ {output / pairs.PICTURE}, {output / pairs.FIGURES}"))


@app.command(epilog="Example: kitseg submit predictions -o kits19.zip")
def submit(
    predictions: Annotated[Path, typer.Argument(help="Folder of label maps to submit.")] = PREDICTIONS,
    output: Annotated[Path, typer.Option("--output", "-o", help="The zip to write.")] = Path("kits19.zip"),
    data: Annotated[Path, typer.Option(help="Folder of their scans.")] = Path("data"),
    cases: Annotated[str, typer.Option(help="Cases that must be there.")] = "210-299",
) -> None:
    """Check every prediction against its scan and pack KiTS19's submission; any problem, and nothing is written."""
    from kitseg.commands import submit as packing
    from kitseg.volumes.download import parse_cases

    packing.check_output(output)
    numbers = parse_cases(cases)
    with console.bar("check", len(numbers)) as step:
        submission = packing.check_submission(predictions, data, numbers, step)
    for problem in submission.problems:
        console.print_error(problem)
    if submission.extra:
        console.print_line(escape(f"left out, not among the cases {cases}: {', '.join(submission.extra)}"))
    if submission.empty:
        names = ", ".join(submission.empty)
        console.print_line(
            f"[yellow]{len(submission.empty)} of {len(numbers)} predictions are all background:[/] {names}"
        )
    if submission.problems:
        console.print_line(escape(f"{submission.sound} of {len(numbers)} cases are fine; {output} is not written"))
        exit_if(True)
    with console.bar("write", len(numbers)) as step:
        packing.write_submission(output, submission, step)
    console.print_line(escape(f"{len(numbers)} cases, {output.stat().st_size / 1e6:.2f} MB → {output}"))


def _show_scores(scores: Sequence[Score], rules: Rules) -> None:
    """The challenge's figures of each case, all figures over the cases, and the tumors found."""
    from kitseg.commands.score_files import challenge_score, score_summary
    from kitseg.scoring.protocols import FIGURES

    shown = [
        (name, figure)
        for name, target in rules.protocol.targets.items()
        for figure in (("dice",) if target.tolerance_mm is None else ("dice", "surface_dice"))
    ]
    table = console.table("case", *(f"{name} {FIGURES[figure]}" for name, figure in shown), "")
    for score in scores:
        note = "missing: counts as background" if score.missing else escape(score.error)
        figures = (console.cell(score.classes.get(name, {}).get(figure)) for name, figure in shown)
        table.add_row(score.case, *figures, f"[red]{note}[/]")
    console.out.print(table)
    summaries = score_summary(scores)
    _show_summary(summaries)
    _show_detection(scores)
    for figure, value in challenge_score(summaries).items():
        console.print_line(f"{rules.protocol.name}, mean {FIGURES[figure]} over the classes: {value:.4f}")


def _show_summary(summaries: Mapping[str, Mapping[str, Summary]]) -> None:
    from kitseg.scoring.protocols import FIGURES

    table = console.table("class", "", "mean", "95 % CI", "median", "cases", "undefined")
    for name, figures in summaries.items():
        for number, (figure, value) in enumerate(figures.items(), 1):
            low, high = console.cell(value.low), console.cell(value.high)
            interval = console.cell(None) if value.low is None else f"{low} to {high}"
            row = (
                console.cell(value.mean),
                interval,
                console.cell(value.median),
                str(value.cases),
                str(value.undefined),
            )
            table.add_row(name if number == 1 else "", FIGURES[figure], *row, end_section=number == len(figures))
    console.out.print(table)


def _show_detection(scores: Sequence[Score]) -> None:
    from kitseg.scoring.detection import tally

    table = console.table("tumors", "in the references", "found", "recall", "predicted", "true", "precision")
    for size, count in tally(score.detection for score in scores if score.detection).items():
        truth = (str(count.reference), str(count.found), console.cell(count.recall))
        table.add_row(size, *truth, str(count.predicted), str(count.true), console.cell(count.precision))
    console.out.print(table)


def _show_comparison(comparison: Comparison) -> None:
    """The paired differences in a table, and the outcome of each class in words."""
    from kitseg.commands.compare import interval_words, p_words, sentence, signed

    table = console.table("", "n", "mean A", "mean B", "B − A", "95 % CI", "p", "B better", "same", "A better")
    for group in comparison.groups:
        if not group.kind and table.row_count:
            table.add_section()
        paired, name = group.paired, f"  {group.kind}: {group.stratum}" if group.kind else group.name
        means = (console.cell(paired.mean_a), console.cell(paired.mean_b), signed(paired.mean))
        counts = (str(count) for count in (paired.wins, paired.ties, paired.losses))
        p = p_words(group.p).removeprefix("= ")
        table.add_row(escape(name), str(paired.n), *means, interval_words(paired), p, *counts)
    console.out.print(table)
    for group in comparison.groups:
        if not group.kind:
            console.print_line(escape(sentence(group)))
    console.print_line("95 % CI: BCa bootstrap of the mean; p: Wilcoxon signed-rank test, two-sided, not corrected")
    if comparison.tests:
        console.print_line(f"p of the groups of cases: corrected for their {comparison.tests} tests by Holm's method")


def _show_fit(fit: Fit) -> None:
    """What the priors cost, and the line that uses the fitted range."""
    table = console.table("prior", "settings", "tumors lost", "tumor lost (ml)", "cases without any tumor left")
    for cost in fit.costs:
        settings = ", ".join(f"{key} {value:g}" for key, value in cost.setting.items())
        tumors, cases = f"{cost.lost_tumors} of {cost.tumors}", f"{cost.lost_cases} of {cost.cases}"
        table.add_row(cost.prior, settings, tumors, f"{cost.lost_ml:.1f} of {cost.ml:.1f}", cases)
    console.out.print(table)
    failed = sum(bool(finding.error) for finding in fit.findings)
    console.print_line(f"{len(fit.findings) - failed} of {len(fit.findings)} cases read")
    if not any(cost.prior == "dark" for cost in fit.costs):
        console.print_line("dark: not tried, since no CT (imaging.nii.gz) lies beside the labels")
    console.print_line(f"λ1/λ2 of {fit.tumors} tumors of 10 voxels or more, 5-95 %: {fit.low:.3f}-{fit.high:.3f}")
    console.print_line(f"--set postprocess.shape.low={fit.low:.3f} --set postprocess.shape.high={fit.high:.3f}")
