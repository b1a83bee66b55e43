"""Commands from scans to labels."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from kitseg.cli.app import (
    PREDICTIONS,
    PROBABILITIES,
    Deterministic,
    Device,
    Engine,
    Fold,
    Gpus,
    MaxMemory,
    Mirror,
    Precision,
    Processes,
    Shard,
    Split,
    app,
    choose_ranks,
    shared_work,
    work,
)
from kitseg.errors import UsageError
from kitseg.runtime import console


class Format(StrEnum):
    """What `predict` writes."""

    NIFTI = "nifti"
    DICOM_SEG = "dicom-seg"


@app.command(epilog="Example: kitseg infer --run runs/two-phase-small --stage fine.1 --data data -o probabilities")
def infer(
    run: Annotated[
        str | None,
        typer.Option("--run", "--model", help="A run (its folds averaged), one fold of it, or a bundle of one run."),
    ] = None,
    data: Annotated[Path, typer.Option(help="Scans: a file, a folder of cases or of files.")] = Path("data"),
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the probabilities.")] = PROBABILITIES,
    stage: Annotated[str | None, typer.Option(help="A stage's own output, such as coarse or fine.1.")] = None,
    mirror: Mirror = False,
    split: Split = None,
    fold: Fold = None,
    gpus: Gpus = 0,
    device: Device = "auto",
    processes: Processes = 1,
    shard: Shard = None,
    engine: Engine = "auto",
    precision: Precision = "auto",
    deterministic: Deterministic = False,
    max_memory: MaxMemory = None,
) -> None:
    """Probabilities of each scan: a run's checkpoints averaged, on the scan's own grid.

    The same command goes on where an earlier one stopped: cases that are done and unchanged stay as they are.
    """
    from kitseg.commands.infer import Inference
    from kitseg.commands.predict import choose_scans
    from kitseg.models.members import choose_run, only_member
    from kitseg.models.memory import parse_size
    from kitseg.models.model import open_model
    from kitseg.runtime.device import deterministically

    device, ranks = choose_ranks(gpus, processes, device)
    scans = choose_scans([data], split, fold)
    if scans.choices:
        raise UsageError(f"{data} holds DICOM, which only `kitseg predict` reads; the verbs before it take NIfTI files")
    member, steps = only_member(run or choose_run(Path("runs")).path)
    model = partial(open_model, member.run, device, stage, mirror or member.mirror, engine, precision)
    model = partial(deterministically, model) if deterministic else model
    do = Inference(model, stage, output, parse_size(max_memory), steps)
    shared_work("infer", scans.cases, do, shard, ranks)


@app.command(epilog="Example: kitseg ensemble probabilities/a probabilities/b -o probabilities/mean --weights 2,1")
def ensemble(
    folders: Annotated[list[Path], typer.Argument(help="Folders of probabilities.")] = [PROBABILITIES],  # noqa: B006
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for their mean.")] = Path("ensemble"),
    weights: Annotated[str | None, typer.Option(help="One number a folder, comma-separated.")] = None,
    max_memory: MaxMemory = None,
) -> None:
    """The mean of folders of probabilities; post-processing will be the first folder's."""
    from kitseg.commands.infer import average
    from kitseg.models.memory import parse_size
    from kitseg.volumes.blocks import block_cases

    shares, most = _numbers(weights) or [1.0] * len(folders), parse_size(max_memory)
    count = len(block_cases(folders[0]))
    work("ensemble", count, lambda done: average(folders, shares, output, done, most))


@app.command(epilog="Example: kitseg postprocess ensemble -o predictions")
def postprocess(
    folder: Annotated[Path, typer.Argument(help="Folder of probabilities.")] = Path("ensemble"),
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the labels.")] = PREDICTIONS,
    without: Annotated[list[str], typer.Option(metavar="NAME", help="Leave out this prior; all: every one.")] = [],  # noqa: B006
) -> None:
    """Labels from probabilities, cleaned as the method asks."""
    from kitseg.commands.postprocess import postprocess as clean_folder
    from kitseg.volumes.blocks import block_cases

    work("postprocess", len(block_cases(folder)), lambda done: clean_folder(folder, output, done, without))


@app.command(epilog="Example: kitseg predict case_00210.nii.gz --model runs/two-phase-paper")
def predict(
    scans: Annotated[
        list[Path], typer.Argument(help="NIfTI files, case folders, or folders of them or of DICOM series.")
    ] = [Path("data")],  # noqa: B006
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for labels and pictures.")] = PREDICTIONS,
    model: Annotated[
        list[str],
        typer.Option(
            help="A run, one fold of it, an ensemble file, a bundle or hf://owner/name@revision; several times: the "
            "mean of all."
        ),
    ] = [],  # noqa: B006
    weights: Annotated[str | None, typer.Option(help="One number a model, comma-separated.")] = None,
    mirror: Mirror = False,
    split: Split = None,
    fold: Fold = None,
    gpus: Gpus = 0,
    device: Device = "auto",
    processes: Processes = 1,
    shard: Shard = None,
    engine: Engine = "auto",
    precision: Precision = "auto",
    deterministic: Deterministic = False,
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

    The same command goes on where an earlier one stopped: cases that are done and unchanged stay as they are.
    """
    from kitseg.commands.predict import SERIES_TABLE, PredictOptions, PredictScans, choose_scans
    from kitseg.models.members import choose_run, locate, open_ensemble
    from kitseg.models.memory import parse_size
    from kitseg.runtime.device import deterministically

    device, ranks = choose_ranks(gpus, processes, device)
    found = choose_scans(scans, split, fold, series)
    models = [locate(one) for one in model] or [choose_run(Path("runs")).path]
    opened = partial(open_ensemble, models, device, _numbers(weights), mirror, engine, precision)
    opened = partial(deterministically, opened) if deterministic else opened
    if found.choices:
        console.print_line(
            f"{len(found.cases)} of {len(found.choices)} DICOM series taken; {output / SERIES_TABLE} says why"
        )
    options = PredictOptions(format_ is Format.DICOM_SEG, keep_identifiers, found.choices, parse_size(max_memory))
    shared_work("predict", found.cases, PredictScans(opened, output, options), shard, ranks)


def _numbers(text: str | None) -> list[float]:
    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise UsageError(f"--weights {text}: one number each, such as 2,1") from error
