"""Commands that score and compare: fit-priors, evaluate, validate, choose, compare, submit."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer
from rich.markup import escape

from kitseg.cli import options as opt
from kitseg.cli.app import app, cross_validate, exit_if, gather, take_share
from kitseg.cli.score_tables import show_comparison, show_confidence, show_fit, show_intervals, show_scores
from kitseg.errors import UsageError
from kitseg.runtime import console
from kitseg.runtime.overwrite import check_outputs, refuse_overwrite

SHOWN = 15  # combinations in the table of `choose`


@app.command(epilog="Example: kitseg fit-priors --data data --split splits.json --fold 0")
def fit_priors(
    data: Annotated[Path, typer.Option(help="Folder of reference label maps, KiTS layout or flat.")] = Path("data"),
    masks: opt.Masks = None,
    split: Annotated[Path | None, typer.Option(help="Split file: use only the training cases of --fold.")] = None,
    fold: Annotated[int | None, typer.Option(help="With --split: the fold whose training cases are used.")] = None,
    labels: opt.LabelsName = None,
    jobs: opt.Jobs = -1,
    report: Annotated[Path | None, typer.Option("--json", help="Write the range and every tumor to this file.")] = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Fit the shape prior to reference tumors and count the tumors that each post-processing prior would remove."""
    from kitseg.commands import fit_priors as priors

    refuse_overwrite(report, "fit")
    tasks = priors.training_labels(data, split, fold, masks)
    with console.bar("fit-priors", len(tasks)) as step:

        def done(finding: priors.CaseTumors) -> None:
            step()
            if finding.error:
                console.print_error(finding.error)

        fit = priors.fit_priors(tasks, opt.stated_or_split(labels, split), jobs, done)
    if report:
        priors.write_fit(report, fit)
    show_fit(fit)
    exit_if(any(finding.error for finding in fit.findings))


@app.command(epilog="Example: kitseg evaluate predictions data --protocol kits23 --json scores.json")
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="Folder of label maps to score.")] = opt.PREDICTIONS,
    references: Annotated[Path, typer.Argument(help="Folder of reference label maps.")] = Path("data"),
    protocol: Annotated[str, typer.Option(help="Scoring rules: kits19, kits21 or kits23.")] = "kits19",
    scheme: opt.ReferenceLabels = None,
    cases: Annotated[
        str | None, typer.Option(help="Required cases, such as 210-299; missing ones are scored as background.")
    ] = None,
    split: opt.Split = None,
    fold: opt.Fold = None,
    jobs: opt.Jobs = -1,
    cluster: opt.Cluster = None,
    shard: opt.Shard = None,
    table: Annotated[Path | None, typer.Option("--csv", help="Write one row per case and class to this file.")] = None,
    report: Annotated[Path | None, typer.Option("--json", help="Write the scores to this file.")] = None,
    intervals: Annotated[
        Path | None,
        typer.Option(help="Calibrate 90 % intervals of volumes and diameters; write them to this file."),
    ] = None,
    confidence: Annotated[
        Path | None,
        typer.Option(help="Fit the expected tumor Dice to these cases, and write it to this file."),
    ] = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Score label maps: official KiTS metrics, surface distances, volume errors and tumor detection.

    Classes of kits19: kidney (with tumor), tumor. Classes of kits21 and kits23: kidney_and_mass, mass (tumor and
    cyst), tumor; these also have surface Dice. Scores are given per case and over all cases; each tumor found has its
    own Dice and surface Dice.

    Exit code 1: a case is missing, could not be scored, or has no reference; the others are scored and written.
    """
    from kitseg.commands import evaluate as scoring
    from kitseg.commands.case_record import refuse_other_labels
    from kitseg.commands.confidence import write_confidence
    from kitseg.commands.intervals import case_errors, write_intervals
    from kitseg.commands.score_files import score_content, write_score_table, write_scores
    from kitseg.runtime.resume import ResultCache

    check_outputs({"scores": report, "score table": table, "intervals": intervals, "confidence": confidence})
    rules = scoring.rules(protocol, scheme, split)
    found, unscored = scoring.find_jobs(predictions, references, scoring.required_cases(cases, split, fold, protocol))
    patients = scoring.patients_of(found, references)
    if scheme is None:
        for job in found:
            if job.prediction:
                refuse_other_labels(job.prediction, job.reference, rules.scheme)
    output, work = report or table, partial(scoring.score_case, rules=rules)
    cache = ResultCache.beside(output, scoring.Score, work) if output else None
    scores = gather("evaluate", found, cache or work, jobs, cluster, take_share(shard))
    content = score_content(scores, rules, {}, unscored, patients)
    if report:
        write_scores(report, content)
    if table:
        write_score_table(table, scores)
    show_scores(scores, content, rules)
    if cache:
        cache.clear()
    if intervals:
        errors = gather("intervals", found, partial(case_errors, rules=rules), jobs)
        show_intervals(write_intervals(intervals, errors, patients), intervals)
    if confidence:
        sure, left_out = write_confidence(confidence, list(zip(found, scores, strict=True)), patients)
        show_confidence(sure, confidence, left_out)
    exit_if(bool(unscored.predictions) or any(score.missing or score.error for score in scores))


@app.command(epilog="Example: kitseg validate runs/two-phase-small --data data")
def validate(
    run: Annotated[Path, typer.Argument(help="A run, or one of its folds.")],
    data: opt.DataFolders = [Path("data")],  # noqa: B006
    masks: opt.Masks = None,
    mirror: opt.Mirror = False,
    device: opt.Device = "auto",
    trust: opt.Trust = False,
) -> None:
    """Cross-validate a run: predict each fold's validation cases with its networks and score them together.

    Running it again resumes, and adds folds that have finished since. Scores are grouped by fold, tumor size and slice
    thickness, and by histology and surgery if the data folder holds the challenge's kits.json.
    """
    cross_validate(run, data, device, mirror, masks)


@app.command(epilog="Example: kitseg choose runs/two-phase-paper runs/progressive-paper -o ensemble.yaml")
def choose(
    runs: Annotated[list[Path], typer.Argument(help="Validated runs, or folds of them.")],
    data: opt.DataFolders = [Path("data")],  # noqa: B006
    masks: opt.Masks = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The ensemble file.")] = Path("ensemble.yaml"),
    jobs: opt.Jobs = -1,
    trust: opt.Trust = False,
    overwrite: opt.Overwrite = False,
) -> None:
    """Choose the ensemble of runs and the post-processing with the best out-of-fold Dice.

    Tries every subset of the runs (also with test-time flip, if they were validated with --mirror), without
    post-processing and with that of its members; then adds or removes one prior at a time while Dice improves.
    """
    from kitseg.commands import choose as steps
    from kitseg.volumes.kits import labelled_cases

    if output.suffix != ".yaml":
        raise UsageError(f"{output}: the ensemble file must be a .yaml file. Change --output")
    refuse_overwrite(output, "ensemble")
    search = steps.open_search(runs, labelled_cases(data, masks))
    for number, recipes in enumerate(steps.rounds(search), 1):
        with console.bar(f"choose, round {number}: {len(recipes)} combinations", len(search.cases)) as step:
            steps.try_recipes(search, recipes, jobs, step)
    figures = list(search.tried[steps.ranked(search)[0]])
    table = console.table("runs", "post-processing", *figures)
    for recipe in steps.ranked(search)[:SHOWN]:
        dice = (console.cell(search.tried[recipe][name]) for name in figures)
        table.add_row(*map(escape, steps.describe_recipe(search, recipe)), *dice)
    console.out.print(table)
    steps.write_choice(output, search)
    console.print_plain(
        f"{len(search.tried)} combinations tested on {len(search.cases)} cases; {output} lists all of them"
    )
    console.print_line("This Dice is optimistic, because the best of many was chosen: confirm it on independent cases.")
    console.print_plain(f"kitseg predict SCAN --model {quote(str(output))}")


@app.command(epilog="Example: kitseg compare two-phase.json two-stage.json")
def compare(
    a: Annotated[
        Path, typer.Argument(help="Scores of A: a file from `kitseg evaluate --json`, its folder, or a validated run.")
    ],
    b: Annotated[Path, typer.Argument(help="Scores of B, on the same cases.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", callback=opt.folder, help="Folder for the plot and the numbers.")
    ] = Path("comparison"),
    overwrite: opt.Overwrite = False,
) -> None:
    """Compare two methods on the same cases: paired Dice differences with confidence intervals and tests."""
    from kitseg.commands import compare as pairs
    from kitseg.report.comparison import comparison_picture

    refuse_overwrite(output / pairs.PICTURE, "png")
    refuse_overwrite(output / pairs.FIGURES, "comparison")
    comparison = pairs.compare(a, b)
    for name, file in (("A", comparison.a), ("B", comparison.b)):
        console.print_line(escape(f"{name}: {file.path}, {len(file.cases)} cases"))
    for note in comparison.notes():
        console.print_line(escape(note))
    show_comparison(comparison)
    comparison_picture(output / pairs.PICTURE, comparison.groups, str(comparison.a.path), str(comparison.b.path))
    pairs.write_figures(output / pairs.FIGURES, comparison)
    console.print_line(escape(f"→ {output / pairs.PICTURE}, {output / pairs.FIGURES}"))


@app.command(epilog="Example: kitseg submit predictions -o kits19.zip")
def submit(
    predictions: Annotated[Path, typer.Argument(help="Folder of label maps to submit.")] = opt.PREDICTIONS,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The zip file to write. Default: kits19.zip or kits23.zip.")
    ] = None,
    data: Annotated[Path, typer.Option(help="Folder of the scans.")] = Path("data"),
    protocol: Annotated[str, typer.Option(help="The challenge: kits19 or kits23, whose labels have cysts.")] = "kits19",
    cases: Annotated[
        str | None, typer.Option(help="Required cases. Default: 210-299 of kits19; of kits23 those in the data folder.")
    ] = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Check every prediction against its scan and pack a submission. With any problem, nothing is written.

    Labels are written with the challenge's ids, whatever those of the predictions; for kits19, cysts become kidney.
    """
    from kitseg.commands import submit as packing
    from kitseg.labels import find_scheme
    from kitseg.volumes.download import SOURCES, parse_cases

    if protocol not in SOURCES:
        raise UsageError(f"unknown protocol '{protocol}'. Choose {' or '.join(SOURCES)}")
    output = output or Path(f"{protocol}.zip")
    packing.check_output(output)
    cases = cases or ("210-299" if protocol == "kits19" else None)
    numbers = parse_cases(cases, SOURCES[protocol]) if cases else packing.numbers_in(data)
    with console.bar("check", len(numbers)) as step:
        submission = packing.check_submission(predictions, data, numbers, step, find_scheme(protocol))
    for problem in submission.problems:
        console.print_error(problem)
    if submission.extra:
        console.print_line(escape(f"left out, not among cases {cases or data}: {', '.join(submission.extra)}"))
    if submission.empty:
        names = ", ".join(submission.empty)
        console.print_line(
            f"[yellow]{len(submission.empty)} of {len(numbers)} predictions contain only background:[/] {names}"
        )
    if count := submission.without_cysts:
        console.print_line(f"[yellow]{count} of {len(numbers)} predictions have no cysts: they are kidney[/]")
    if submission.problems:
        console.print_line(escape(f"{submission.sound} of {len(numbers)} cases are valid; {output} was not written"))
        exit_if(True)
    with console.bar("write", len(numbers)) as step:
        packing.write_submission(output, submission, step)
    console.print_line(escape(f"{len(numbers)} cases, {output.stat().st_size / 1e6:.2f} MB → {output}"))
