"""Commands for cases: phantom, synthesize, download, check, preprocess, split."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from kitseg.cli import options as opt
from kitseg.cli.app import app, exit_if, preprocess_cases, show_left_out, take_share
from kitseg.cli.plan import composed
from kitseg.errors import UsageError
from kitseg.runtime import console
from kitseg.runtime.overwrite import refuse_overwrite
from kitseg.scoring.strata import THICKNESSES


@app.command(epilog="Example: kitseg phantom data --cases 12 --seed 0")
def phantom(
    out: Annotated[Path, typer.Argument(callback=opt.folder, help="Folder for the cases, in the KiTS layout.")] = Path(
        "data"
    ),
    cases: Annotated[int, typer.Option(min=1, help="Number of cases.")] = 12,
    seed: opt.Seed = 0,
    matrix: Annotated[int, typer.Option(min=64, max=512, help="Pixels along rows and columns.")] = 512,
    scheme: opt.DataLabels = "kits19",
    jobs: opt.Jobs = -1,
) -> None:
    """Generate synthetic contrast CT cases with labels, for training and testing without patient data."""
    from joblib import delayed

    from kitseg.runtime.outcomes import in_parallel
    from kitseg.volumes.phantom import write_case

    tasks = (delayed(write_case)(out.absolute(), seed, index, matrix, scheme) for index in range(cases))
    with console.bar("phantoms", cases) as step:
        in_parallel(tasks, jobs, lambda _: step(), ordered=False)
    console.print_plain(f"{cases} phantom{'s' * (cases > 1)} in {out}")


@app.command(epilog="Example: kitseg synthesize patients --bodies scans --masks kidneys --lesions kits19 -n 20")
def synthesize(
    out: Annotated[Path, typer.Argument(callback=opt.folder, help="Folder for the cases, in the KiTS layout.")],
    bodies: Annotated[Path, typer.Option(help="Folder of CTs with healthy kidneys.")],
    masks: Annotated[Path | None, typer.Option(help="Folder of their kidney masks, if not beside the CTs.")] = None,
    lesions: Annotated[
        Path | None,
        typer.Option(help="Folder of label maps whose tumors and cysts give shapes. Default: drawn shapes."),
    ] = None,
    number: Annotated[int, typer.Option("-n", "--number", min=1, help="Number of patients.")] = 1,
    without: Annotated[
        list[str],
        typer.Option(metavar="PART", help="Leave out this part (all: docs/how-to/synthesis.md); may be repeated."),
    ] = [],  # noqa: B006
    scheme: opt.MaskLabels = "kits23",
    seed: opt.Seed = 0,
    jobs: opt.Jobs = -1,
) -> None:
    """Write synthetic patients: CTs of real bodies with added lesions and simulated contrast phases and scanners.

    The label maps written have the labels of kits23 (kidney 1, tumor 2, cyst 3) and the grid of the body's CT. Running
    it again resumes.
    """
    from kitseg.cli.app import work
    from kitseg.commands import synthesize as steps
    from kitseg.patches.synthetic import parts_without
    from kitseg.volumes.kits import labelled_cases

    recipe = steps.SynthesisRecipe(seed, parts_without(without), lesions, scheme)
    cases = labelled_cases([bodies], masks)
    show_left_out([bodies], cases, masks)
    work("synthesize", number, lambda done: steps.synthesize(cases, out, number, recipe, jobs, done))


@app.command(epilog="Example: kitseg download kits19 --to data --cases 0-9")
def download(
    dataset: Annotated[str, typer.Argument(help="The data set: kits19 or kits23.")],
    to: Annotated[Path, typer.Option(callback=opt.folder, help="Folder for the cases.")] = Path("data"),
    cases: Annotated[
        str | None,
        typer.Option(
            help="Cases to download, such as 0-9 or 3,17,20-29. Default: all with labels: of kits19 0-209 (210-299 "
            "have none), of kits23 0-299,400-588."
        ),
    ] = None,
) -> None:
    """Download the challenge's images and labels from their official sources. Running it again resumes."""
    from kitseg.runtime.locks import folder_lock
    from kitseg.volumes.download import SOURCES, download_cases, parse_cases

    if dataset not in SOURCES:
        raise UsageError(f"unknown data set '{dataset}'. Choose {' or '.join(SOURCES)}")
    source = SOURCES[dataset]
    numbers = parse_cases(cases, source) if cases else list(source.labelled)
    with folder_lock(to, "cases"), console.bar("download", len(numbers)) as step:
        failures = download_cases(to, numbers, lambda *_: step(), source)
    for failure in failures:
        console.print_error(str(failure))
    console.print_plain(f"{len(numbers) - len(failures)} of {len(numbers)} cases in {to}; the data are CC BY-NC-SA 4.0")
    if source.labelled == source.cases:
        console.print_line(f"their labels are {dataset}: give --labels {dataset} to check, split and train")
    exit_if(bool(failures))


@app.command(epilog="Example: kitseg check data --json check.json")
def check(
    data: opt.Data = Path("data"),
    masks: opt.Masks = None,
    scheme: opt.DataLabels = "kits19",
    jobs: opt.Jobs = -1,
    report: Annotated[Path | None, typer.Option("--json", help="Write the findings to this file.")] = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Check each case: readable files, labels on the scan's grid, valid label values, scans in HU, one series."""
    from dataclasses import asdict

    from joblib import delayed

    from kitseg.runtime.files import write_json
    from kitseg.runtime.outcomes import in_parallel
    from kitseg.volumes.check import check_case
    from kitseg.volumes.kits import list_cases, with_labels

    refuse_overwrite(report, "check")
    cases = with_labels(list_cases(data), masks)
    with console.bar("check", len(cases)) as step:
        reports = in_parallel((delayed(check_case)(case, scheme) for case in cases), jobs, lambda _: step())
    table = console.table("case", "shape", "spacing (mm)", "axes", "HU", "kidney without tumor (ml)", "tumor (ml)", "")
    for r in reports:
        state = "[green]ok[/]" if r.ok else "[red]" + escape("; ".join(r.problems)) + "[/]"
        cells = (r.shape, r.spacing, r.orientation, r.hu_range, r.kidney_ml, r.tumor_ml)
        table.add_row(escape(r.id), *map(console.cell, cells), state)
    console.out.print(table)
    if report:
        write_json(report, 1, {"cases": [asdict(r) for r in reports]})
    bad = sum(not r.ok for r in reports)
    show_left_out([data], cases, masks)
    console.print_line(f"{len(reports) - bad} of {len(reports)} cases are valid")
    exit_if(bad > 0)


@app.command(epilog="Example: kitseg preprocess data --method two-phase --jobs 4")
def preprocess(
    data: opt.Data = Path("data"),
    masks: opt.Masks = None,
    to: Annotated[Path, typer.Option(callback=opt.folder, help="Folder for the preprocessed cases.")] = Path(
        "preprocessed"
    ),
    method: opt.Method = "two-phase",
    size: opt.Size = None,
    plan: opt.Plan = None,
    config_dir: opt.ConfigDir = None,
    jobs: opt.Jobs = -1,
    cluster: opt.Cluster = None,
    shard: opt.Shard = None,
    split: Annotated[Path, typer.Option(help="Split file, whose labels are the default.")] = Path("splits.json"),
    labels: opt.LabelsName = None,
    set_: opt.Set = [],  # noqa: B006
) -> None:
    """Resample every case to the grids of a method. Cases that are done and unchanged are skipped."""
    from kitseg.runtime.dask import on_cluster
    from kitseg.volumes.kits import find_cases, with_labels

    share, overrides = take_share(shard), [*opt.labels_override(labels, split), *set_]
    configuration, _ = composed(method, size, plan, overrides, config_dir)
    cases = with_labels(find_cases(data), masks)
    show_left_out([data], cases, masks)
    cases = share.take(cases)
    with on_cluster(cluster):
        failed = preprocess_cases(cases, configuration, to, jobs, share.part)
    exit_if(bool(failed))


@app.command(epilog="Example: kitseg split data -o splits.json --folds 5 --test-cases 20")
def split(
    data: Annotated[list[Path], typer.Argument(help="Folders of labelled cases.")] = [Path("data")],  # noqa: B006
    masks: opt.Masks = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The split file.")] = Path("splits.json"),
    folds: Annotated[int, typer.Option(min=2, help="Number of cross-validation folds.")] = 5,
    nested_folds: Annotated[
        int,
        typer.Option(
            min=2,
            help="Nested folds within each fold's training cases, for stages trained on another stage's predictions.",
        ),
    ] = 3,
    test_cases: Annotated[
        int, typer.Option(min=0, help="Number of patients (not cases) that no fold uses: a test set.")
    ] = 0,
    seed: opt.Seed = 0,
    scheme: opt.DataLabels = "kits19",
    jobs: opt.Jobs = -1,
) -> None:
    """Split cases by patient into cross-validation folds with similar tumor volumes and slice thicknesses.

    `kitseg train` does the same if there is no split file. A file patients.csv (columns case, patient) next to the
    cases lists which of them belong to the same patient.
    """
    from kitseg.splits import make_split, write_split
    from kitseg.training.split import look_at, report_split
    from kitseg.volumes.kits import labelled_cases

    if output.exists():
        raise UsageError(f"{output} already exists. Choose another name with --output, or delete it")
    cases = labelled_cases(data, masks)
    show_left_out(data, cases, masks)
    with console.bar("split", len(cases)) as step:
        traits, errors = look_at(cases, scheme, jobs, step)
    for error in errors:
        console.print_error(f"{error} The case is left out.")
    made = make_split(traits, folds, nested_folds, test_cases, seed, scheme)
    write_split(made, output)
    table = console.table("part", "cases", "tumor: median (ml)", *THICKNESSES)
    for row in report_split(made, traits):
        table.add_row(*map(console.cell, row))
    console.out.print(table)
    if len(made.folds) < folds:
        console.print_line(f"{len(made.folds)} folds instead of {folds}: there are too few patients for more")
    console.print_plain(f"{len(traits)} cases split: {output}")
    exit_if(bool(errors))
