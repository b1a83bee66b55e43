"""Commands from scans to labels."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kitseg import screen
from kitseg.cli.app import (
    PREDICTIONS,
    PROBABILITIES,
    Device,
    Engine,
    Fold,
    MaxMemory,
    Mirror,
    Precision,
    Split,
    app,
    work,
)
from kitseg.errors import UsageError


class Format(StrEnum):
    """What `predict` writes."""

    NIFTI = "nifti"
    DICOM_SEG = "dicom-seg"


@app.command(epilog="Example: kitseg infer --run runs/two-phase-small --stage fine.1 --data data -o probabilities")
def infer(
    run: Annotated[Path | None, typer.Option(help="A run (its folds averaged) or one fold of it.")] = None,
    data: Annotated[Path, typer.Option(help="Scans: a file, a folder of cases or of files.")] = Path("data"),
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the probabilities.")] = PROBABILITIES,
    stage: Annotated[str | None, typer.Option(help="A stage's own output, such as coarse or fine.1.")] = None,
    mirror: Mirror = False,
    split: Split = None,
    fold: Fold = None,
    device: Device = "auto",
    engine: Engine = "auto",
    precision: Precision = "auto",
    max_memory: MaxMemory = None,
) -> None:
    """Probabilities of each scan: a run's checkpoints averaged, on the scan's own grid."""
    from kitseg.pipeline.infer import infer as infer_scans
    from kitseg.pipeline.members import choose_run, describe
    from kitseg.pipeline.memory import Limit
    from kitseg.pipeline.model import open_model
    from kitseg.pipeline.predict import choose_scans

    scans, first = choose_scans([data], split, fold), stage.partition(".")[0] if stage else None
    if scans.choices:
        raise UsageError(f"{data} holds DICOM, which only `kitseg predict` reads; the verbs before it take NIfTI files")
    model = open_model(run or choose_run(Path("runs")).path, device, first, mirror, engine, precision)
    screen.say(describe(model))
    limit = Limit.of(max_memory, [model])
    work("infer", len(scans.cases), lambda done: infer_scans(model, stage, scans.cases, output, done, limit))


@app.command(epilog="Example: kitseg ensemble probabilities/a probabilities/b -o probabilities/mean --weights 2,1")
def ensemble(
    folders: Annotated[list[Path], typer.Argument(help="Folders of probabilities.")] = [PROBABILITIES],  # noqa: B006
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for their mean.")] = Path("ensemble"),
    weights: Annotated[str | None, typer.Option(help="One number a folder, comma-separated.")] = None,
) -> None:
    """The mean of folders of probabilities; post-processing will be the first folder's."""
    from kitseg.pipeline.infer import average
    from kitseg.volumes.blocks import block_cases

    shares = _numbers(weights) or [1.0] * len(folders)
    count = len(block_cases(folders[0]))
    work("ensemble", count, lambda done: average(folders, shares, output, done))


@app.command(epilog="Example: kitseg postprocess ensemble -o predictions")
def postprocess(
    folder: Annotated[Path, typer.Argument(help="Folder of probabilities.")] = Path("ensemble"),
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the labels.")] = PREDICTIONS,
    without: Annotated[list[str], typer.Option(metavar="NAME", help="Leave out this prior; all: every one.")] = [],  # noqa: B006
) -> None:
    """Labels from probabilities, cleaned as the method asks."""
    from kitseg.pipeline.clean import postprocess as clean_folder
    from kitseg.volumes.blocks import block_cases

    work("postprocess", len(block_cases(folder)), lambda done: clean_folder(folder, output, done, without))


@app.command(epilog="Example: kitseg predict case_00210.nii.gz --model runs/two-phase-paper")
def predict(
    scans: Annotated[
        list[Path], typer.Argument(help="NIfTI files, case folders, or folders of them or of DICOM series.")
    ] = [Path("data")],  # noqa: B006
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for labels and pictures.")] = PREDICTIONS,
    model: Annotated[
        list[Path],
        typer.Option(help="A run, one fold of it, or an ensemble file; several times: the mean of all."),
    ] = [],  # noqa: B006
    weights: Annotated[str | None, typer.Option(help="One number a model, comma-separated.")] = None,
    mirror: Mirror = False,
    split: Split = None,
    fold: Fold = None,
    device: Device = "auto",
    engine: Engine = "auto",
    precision: Precision = "auto",
    max_memory: MaxMemory = None,
    series: Annotated[
        list[str], typer.Option(help="Take this DICOM series, by its UID or its name in series.csv.")
    ] = [],  # noqa: B006
    format_: Annotated[
        Format, typer.Option("--format", help="dicom-seg: of a DICOM series also a DICOM segmentation.")
    ] = Format.NIFTI,
    keep_identifiers: Annotated[
        bool, typer.Option("--keep-identifiers", help="Say in the DICOM output and series.csv who the patient is.")
    ] = False,
) -> None:
    """Kidney and tumor labels for scans, on each scan's own grid, with lesions, flags and a picture.

    Of each DICOM study the CT is taken that fits best; series.csv says why, and why the others were not.

    Several models: the mean of their probabilities, a run's folds averaged first; the post-processing is the first
    model's, or what an ensemble file says (`kitseg choose` writes one).
    """
    from kitseg.pipeline.members import choose_run, open_ensemble
    from kitseg.pipeline.memory import Limit
    from kitseg.pipeline.predict import SERIES_TABLE, Wanted, choose_scans, predict_scans, write_choices

    found = choose_scans(scans, split, fold, series)
    opened = open_ensemble(
        model or [choose_run(Path("runs")).path], device, _numbers(weights), mirror, engine, precision
    )
    screen.say(opened.describe())
    write_choices(output, found, keep_identifiers)
    if found.choices:
        screen.say(f"{len(found.cases)} of {len(found.choices)} DICOM series taken; {output / SERIES_TABLE} says why")
    wanted = Wanted(format_ is Format.DICOM_SEG, keep_identifiers, Limit.of(max_memory, opened.models))
    work("predict", len(found.cases), lambda done: predict_scans(opened, found.cases, output, done, wanted))


def _numbers(text: str | None) -> list[float]:
    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise UsageError(f"--weights {text}: one number each, such as 2,1") from error
