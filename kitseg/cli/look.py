"""Commands for the results in label maps: measure, followup, mesh, report."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from kitseg.cli import options as opt
from kitseg.cli.app import COLOURS, app, exit_if, gather, show_doubts, take_share
from kitseg.errors import UsageError
from kitseg.runtime import console
from kitseg.runtime.overwrite import check_outputs


@app.command(epilog="Example: kitseg measure predictions --ct data --csv lesions.csv")
def measure(
    labels: Annotated[Path, typer.Argument(metavar="SEG", help="A label map, or a folder of them.")],
    ct: Annotated[
        Path | None,
        typer.Option(help="The scan, or the folder of scans: adds HU, and helps to find the side of a single kidney."),
    ] = None,
    scheme: opt.Labels = None,
    jobs: opt.Jobs = -1,
    cluster: opt.Cluster = None,
    shard: opt.Shard = None,
    table: Annotated[
        Path | None, typer.Option("--csv", help="Write one row per kidney and lesion to this file.")
    ] = None,
    report: Annotated[Path | None, typer.Option("--json", help="Write all findings to this file.")] = None,
    egfr: opt.Egfr = None,
    age: opt.Age = None,
    diabetes: opt.Diabetes = False,
    nephrometry: Annotated[
        bool, typer.Option("--nephrometry", help="R.E.N.A.L., PADUA and C-index of the largest tumor.")
    ] = False,
    intervals: opt.Intervals = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Draw predicted against measured eGFR of KiTS patients to this PNG file.")
    ] = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Measure kidneys and lesions: side, volume, diameters, size class, HU, share outside the kidney, contact surface.

    docs/explanation/measure.md defines every measurement. With --egfr and --age, or for a folder with KiTS's kits.json,
    also the eGFR after radical and partial nephrectomy, and the parenchyma that a resection removes
    (docs/explanation/renal_function.md). With --nephrometry, scores of how difficult the largest tumor is to resect
    (docs/explanation/nephrometry.md).
    """
    from kitseg.cli.surgery_tables import show_findings, show_function, show_nephrometry, show_study
    from kitseg.commands import measure as steps
    from kitseg.commands import renal_function
    from kitseg.commands.intervals import read_intervals
    from kitseg.runtime.resume import ResultCache

    check_outputs({"findings": report, "lesion table": table, "png": calibration})
    tasks, patient = steps.plan_measures(labels, ct), renal_function.patient_of(egfr, age, diabetes)
    patients = renal_function.patients_of([task.case for task in tasks], [labels], patient)
    tasks = [replace(task, patient=patients.get(task.case)) for task in tasks]
    output, work = (
        report or table,
        partial(steps.measure_case, scheme=scheme, scores=nephrometry, calibration=read_intervals(intervals)),
    )
    cache = ResultCache.beside(output, steps.Measured, work) if output else None
    results = gather("measure", tasks, cache or work, jobs, cluster, take_share(shard))
    if report:
        steps.write_findings(report, results)
    if table:
        steps.write_lesion_table(table, results)
    if cache:
        cache.clear()
    show_findings(results)
    if nephrometry:
        show_nephrometry(results)
    if any(task.patient for task in tasks):
        show_function(results)
        show_study(renal_function.compare_formulas(results, renal_function.clinical_records(labels)), calibration)
    exit_if(any(result.error for result in results))


@app.command(epilog="Example: kitseg followup 2023.nii.gz 2024.nii.gz --dates 2023-05-10 2024-06-02")
def followup(
    before: Annotated[Path, typer.Argument(help="Label map of the first date, its case folder, or a folder of them.")],
    after: Annotated[Path, typer.Argument(help="Those of the second date; folders are matched by the cases' names.")],
    ct: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="BEFORE AFTER", help="The scans, or the folders of scans.")
    ] = None,
    dates: Annotated[
        tuple[datetime, datetime] | None,
        typer.Option(
            metavar="DATE DATE",
            formats=["%Y-%m-%d"],
            help="Dates of the two scans (YYYY-MM-DD). Default: those in the DICOM scans of --ct.",
        ),
    ] = None,
    scheme: opt.Labels = None,
    jobs: opt.Jobs = -1,
    output: Annotated[Path, typer.Option("--output", "-o", callback=opt.folder, help="Folder for the pages.")] = Path(
        "followup"
    ),
    table: Annotated[Path | None, typer.Option("--csv", help="Write one row per lesion to this file.")] = None,
    report: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Compare a patient's label maps of two dates: each lesion's growth in mm, ml and per year, new and vanished ones.

    Each kidney is aligned rigidly first, so the patient may lie differently and the grids may differ. A page for each
    patient shows both dates side by side. docs/explanation/followup.md defines every figure.
    """
    from kitseg.cli.surgery_tables import show_followup
    from kitseg.commands import followup as steps

    check_outputs({"followup": report, "followup table": table})
    days = (dates[0].date(), dates[1].date()) if dates else None
    tasks, alone = steps.plan_followups(before, after, ct, days, output)
    results: list[steps.Followed] = gather("followup", tasks, partial(steps.follow, scheme=scheme), jobs)
    if report:
        steps.write_followups(report, results)
    if table:
        steps.write_followup_table(table, results)
    show_followup(results)
    for result in results:
        show_doubts(result.case, result.doubts)
    if alone:
        console.print_line(escape(f"left out, without the other date: {', '.join(alone)}"))
    done = [task for task, result in zip(tasks, results, strict=True) if not result.error]
    if done:
        console.print_line(escape(f"→ {done[0].page if len(done) == 1 else output}"))
    exit_if(any(result.error for result in results))


@app.command(epilog="Example: kitseg refine predictions/case_00210.nii.gz --ct data --click -54,12,880=tumor")
def refine(
    labels: Annotated[Path, typer.Argument(metavar="SEG", help="A label map.")],
    ct: Annotated[Path, typer.Option(help="The scan, or the folder of scans.")] = Path("data"),
    click: Annotated[
        list[str],
        typer.Option(
            metavar="X,Y,Z=CLASS",
            help="A point in mm (LPS, as in DICOM) and its class: kidney, tumor, cyst or background; may be repeated.",
        ),
    ] = [],  # noqa: B006
    box: Annotated[
        list[str],
        typer.Option(
            metavar="X,Y,Z:X,Y,Z=CLASS",
            help="Two opposite corners of a box about a lesion, applied before the clicks; may be repeated.",
        ),
    ] = [],  # noqa: B006
    probabilities: Annotated[
        Path | None,
        typer.Option(help="Folder from `kitseg infer`: lesions reach no farther than kidney and mass are probable."),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the corrected labels, or a .nii.gz file.")
    ] = Path("corrected"),
    scheme: opt.Labels = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Correct a label map with clicks and boxes: each assigns a class to a point and to similar tissue around it.

    `kitseg measure --json` and `kitseg report` state that the labels were corrected by a person.
    """
    from kitseg.commands import refine as steps
    from kitseg.commands.measure import plan_measures

    clicks, tasks = steps.parse_clicks(click, box), plan_measures(labels, ct)
    if len(tasks) != 1:
        raise UsageError(f"{labels} holds {len(tasks)} label maps: give one")
    path, changed_ml, doubts = steps.refine(tasks[0], clicks, output, scheme, probabilities)
    console.print_line(escape(f"{changed_ml:.1f} ml changed → {path}"))
    show_doubts(tasks[0].case, doubts)


@app.command(epilog="Example: kitseg mesh case_00210.nii.gz -o tumor.stl --of tumor")
def mesh(
    labels: Annotated[Path, typer.Argument(metavar="SEG", help="A label map.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The STL file.")] = Path("kidney.stl"),
    of: Annotated[str, typer.Option(help="kidney (both, with lesions), parenchyma, tumor or cyst.")] = "kidney",
    scheme: opt.Labels = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Write the surface of a label map as an STL file, in mm in the patient's space (RAS+)."""
    from kitseg.commands.measure import write_mesh

    triangles, ml = write_mesh(labels, output, of, scheme)
    console.print_line(escape(f"{triangles} triangles, {ml:.1f} ml → {output}"))


@app.command(epilog="Example: kitseg report predictions data --scores scores.json")
def report(
    predictions: Annotated[
        Path, typer.Argument(help="A label map or a folder of them; or a run, for a page on its methods.")
    ] = opt.PREDICTIONS,
    data: Annotated[
        list[Path], typer.Argument(help="Files or folders of the scans and, if available, the references.")
    ] = [],  # noqa: B006
    masks: opt.Masks = None,
    scores: Annotated[Path | None, typer.Option(help="A file from `kitseg evaluate --json`.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", callback=opt.folder, help="Folder for the pages.")] = Path(
        "report"
    ),
    intervals: opt.Intervals = None,
    egfr: opt.Egfr = None,
    age: opt.Age = None,
    diabetes: opt.Diabetes = False,
    scheme: opt.ReferenceLabels = None,
    jobs: opt.Jobs = -1,
    cluster: opt.Cluster = None,
    shard: opt.Shard = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Write HTML pages: one per case and one for the study, each a self-contained file that works offline.

    With --egfr and --age, or with KiTS's kits.json in a data folder, the pages also predict the kidney function after
    surgery and the parenchyma that a resection removes.

    For a run (a folder with config.yaml), it writes one page for a publication instead: a methods paragraph, and what
    the run's files state on each item of the CLAIM checklist and of Metrics Reloaded.
    """
    from kitseg.commands import report as pages
    from kitseg.commands.intervals import read_intervals
    from kitseg.commands.renal_function import patient_of, patients_of
    from kitseg.commands.score_files import read_scores
    from kitseg.labels import widest
    from kitseg.report.html import INDEX
    from kitseg.report.scores import StudyScores, study_scores
    from kitseg.report.study_page import CaseRow
    from kitseg.runtime.locks import folder_lock
    from kitseg.runtime.resume import ResultCache
    from kitseg.runtime.sharding import Share

    if (predictions / "config.yaml").exists():
        from kitseg.commands.methods_report import write_methods

        return console.print_line(escape(f"→ {write_methods(predictions, output)}"))
    known = study_scores(read_scores(scores)) if scores else StudyScores()
    tasks = pages.plan_pages(predictions, data, known, output, masks, scheme)
    patients = patients_of([task.case for task in tasks], [predictions, *data], patient_of(egfr, age, diabetes))
    calibration = read_intervals(intervals)
    tasks = [replace(task, intervals=calibration, patient=patients.get(task.case)) for task in tasks]
    cache = ResultCache(output.absolute() / ".cases", CaseRow, partial(pages.make_page))
    with folder_lock(output, "pages", Share.asked(shard).part):
        rows = gather("report", tasks, cache, jobs, cluster, take_share(shard))
        pages.write_index(output, rows, known, widest([task.scheme for task in tasks]))
        cache.clear()
    for row in rows:
        for flag in row.quality.flags if row.quality else ():
            console.print_line(f"[{COLOURS[flag.level]}]{flag.level}[/] {escape(f'{row.case}: {flag.reason}')}")
    count = sum(not row.error for row in rows)
    console.print_line(escape(f"{count} of {len(rows)} cases → {output / INDEX}"))
    exit_if(count < len(rows))
