"""Commands for prediction: infer, ensemble, postprocess, predict."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from kitseg.cli import options as opt
from kitseg.cli.app import app, choose_ranks, quick_imports, shared_work, show_left_out, work
from kitseg.errors import UsageError
from kitseg.runtime import console
from kitseg.runtime.sharding import Share


def _unpack(context: typer.Context, paths: list[Path]) -> list[Path]:
    from kitseg.volumes.zipped import unpacked

    return context.with_resource(unpacked(paths)) if any(path.suffix.lower() == ".zip" for path in paths) else paths


@app.command(epilog="Example: kitseg infer --run runs/two-phase-small --stage fine.1 --data data -o probabilities")
def infer(
    run: Annotated[
        str | None,
        typer.Option(
            "--run", "--model", help="A run (mean of its folds), one of its folds, a bundle of one run, or builtin."
        ),
    ] = None,
    data: Annotated[Path, typer.Option(help="A scan, or a folder of scans or cases.")] = Path("data"),
    output: Annotated[
        Path, typer.Option("--output", "-o", callback=opt.folder, help="Folder for the probabilities.")
    ] = opt.PROBABILITIES,
    stage: Annotated[
        str | None, typer.Option(help="Output of one stage: coarse, or fine.1 for the first network of fine.")
    ] = None,
    mirror: opt.Mirror = False,
    split: opt.Split = None,
    fold: opt.NetworkFold = None,
    gpus: opt.Gpus = None,
    device: opt.Device = "auto",
    processes: opt.Processes = 1,
    shard: opt.Shard = None,
    engine: opt.Engine = "auto",
    precision: opt.Precision = "auto",
    deterministic: opt.Deterministic = False,
    max_memory: opt.MaxMemory = None,
    trust: opt.Trust = False,
    overwrite: opt.Overwrite = False,
) -> None:
    """Predict class probabilities on each scan's own grid, averaged over the checkpoints of a run.

    Running it again resumes: cases that are done and unchanged are skipped.
    """
    from kitseg.commands.infer import Inference
    from kitseg.commands.predict import choose_scans
    from kitseg.models.builtin import choose_model
    from kitseg.models.members import only_member
    from kitseg.models.memory import parse_size
    from kitseg.models.model import open_model
    from kitseg.models.run_folder import of_fold
    from kitseg.runtime.device import Machine, deterministically

    device, ranks = choose_ranks(gpus, processes, device)
    _ = Machine(device, ranks).accelerator  # before any process is started
    scans = choose_scans([data], split, fold)
    show_left_out([data], scans.cases, labels=False)
    if scans.choices:
        raise UsageError(f"{data} contains DICOM files. Use `kitseg predict`, or convert them to NIfTI")
    member, steps = only_member(run or choose_model(Path("runs")))
    path = of_fold(member.run, fold)
    model = partial(open_model, path, device, stage, mirror or member.mirror, engine, precision)
    model = partial(deterministically, model) if deterministic else model
    do = Inference(model, stage, output, parse_size(max_memory), steps)
    shared_work("infer", scans.cases, do, shard, ranks)


@app.command(epilog="Example: kitseg ensemble probabilities/a probabilities/b -o probabilities/mean --weights 2,1")
def ensemble(
    folders: Annotated[list[Path], typer.Argument(help="Folders of probabilities.")] = [opt.PROBABILITIES],  # noqa: B006
    output: Annotated[Path, typer.Option("--output", "-o", callback=opt.folder, help="Folder for the mean.")] = Path(
        "ensemble"
    ),
    weights: Annotated[str | None, typer.Option(help="Weights of the folders, such as 2,1. Default: equal.")] = None,
    max_memory: opt.MaxMemory = None,
    trust: opt.Trust = False,
    overwrite: opt.Overwrite = False,
) -> None:
    """Average folders of probabilities. The post-processing of the first folder is kept."""
    from kitseg.commands.infer import average, plan_average
    from kitseg.models.memory import parse_size

    most = parse_size(max_memory)
    plan = plan_average(folders, _numbers(weights) or [1.0] * len(folders), output)
    if lost := plan.manifest.get("lost"):
        console.print_plain(lost)
    work("ensemble", len(plan.cases), lambda done: average(plan, output, done, most))


@app.command(epilog="Example: kitseg postprocess ensemble -o predictions")
def postprocess(
    folder: Annotated[Path, typer.Argument(help="Folder of probabilities.")] = Path("ensemble"),
    output: Annotated[
        Path, typer.Option("--output", "-o", callback=opt.folder, help="Folder for the labels.")
    ] = opt.PREDICTIONS,
    without: Annotated[
        list[str], typer.Option(metavar="NAME", help="Leave out this post-processing step, or all; may be repeated.")
    ] = [],  # noqa: B006
    trust: opt.Trust = False,
    overwrite: opt.Overwrite = False,
) -> None:
    """Convert probabilities to labels with the post-processing of the method."""
    from kitseg.commands.postprocess import postprocess as clean_folder
    from kitseg.volumes.blocks import block_cases

    work("postprocess", len(block_cases(folder)), lambda done: clean_folder(folder, output, done, without))


@app.command(epilog="Example: kitseg predict case_00210.nii.gz --model runs/two-phase-paper")
def predict(
    scans: Annotated[
        list[Path],
        typer.Argument(
            callback=_unpack,
            help="NIfTI, MetaImage or NRRD files, case folders, folders of files or DICOM series, zip files of these.",
        ),
    ] = [Path("data")],  # noqa: B006
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Folder for labels and pictures; of one scan also a file: .nii.gz, .mha or .seg.nrrd.",
        ),
    ] = opt.PREDICTIONS,
    model: Annotated[
        list[str],
        typer.Option(
            help="A run, one of its folds, an ensemble file, a bundle, hf://owner/name@revision or builtin; may be "
            "repeated: probabilities are averaged. Default: the only finished run in runs that learned from patients, "
            "else builtin, the network that ships with kitseg."
        ),
    ] = [],  # noqa: B006
    weights: Annotated[
        str | None,
        typer.Option(
            help="Weights of the models, such as 2,1. Default: equal. The members of an ensemble file share its "
            "weight; a model of weight 0 is left out."
        ),
    ] = None,
    mirror: opt.Mirror = False,
    split: opt.Split = None,
    fold: opt.NetworkFold = None,
    gpus: opt.Gpus = None,
    device: opt.Device = "auto",
    processes: opt.Processes = 1,
    shard: opt.Shard = None,
    engine: opt.Engine = "auto",
    precision: opt.Precision = "auto",
    deterministic: opt.Deterministic = False,
    max_memory: opt.MaxMemory = None,
    series: Annotated[
        list[str], typer.Option(help="Select this DICOM series by UID or by its name in series.csv; may be repeated.")
    ] = [],  # noqa: B006
    formats: Annotated[
        str,
        typer.Option(
            "--format",
            help="Also write (with commas) mha, seg.nrrd (3D Slicer), uncertainty (a map in percent); of DICOM series "
            "dicom-seg, dicom-sr (measurements), dicom-pdf (pages).",
        ),
    ] = "nifti",
    anonymous: Annotated[
        bool, typer.Option("--anonymous", help="Leave patient and study out of DICOM output.")
    ] = False,
    identifiers: Annotated[
        bool, typer.Option("--identifiers", help="Add patient ID, UIDs, description and folder to series.csv.")
    ] = False,
    confidence: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN|FILE",
            help="Flag cases by their expected Dice: of a validated run, or of `kitseg evaluate --confidence`.",
        ),
    ] = None,
    scheme: opt.LabelsToWrite = None,
    trust: opt.Trust = False,
    overwrite: opt.Overwrite = False,
) -> None:
    """Segment kidneys, tumors and cysts in scans, on each scan's own grid, with lesions, quality flags and a picture.

    The most suitable CT of each DICOM study is selected; series.csv states the reason for every series.

    The probabilities of a run's folds are averaged first, then those of several models. The post-processing is that
    of the ensemble file (see `kitseg choose`), or else of the first model.

    Running it again resumes: cases that are done and unchanged are skipped.
    """
    with quick_imports():
        from kitseg.commands.confidence import read_confidence
        from kitseg.commands.predict import (
            SERIES_TABLE,
            PredictOptions,
            PredictScans,
            choose_scans,
            name_output,
            output_endings,
        )
        from kitseg.models.builtin import choose_model
        from kitseg.models.members import locate, open_ensemble
        from kitseg.models.memory import parse_size
        from kitseg.runtime.device import Machine, deterministically

    device, ranks = choose_ranks(gpus, processes, device)
    _ = Machine(device, ranks).accelerator  # before any process is started
    endings = output_endings(formats)
    found, output, endings = name_output(choose_scans(scans, split, fold, series), output, endings)
    show_left_out(scans, found.cases, labels=False)
    models = [locate(one) for one in model] or [choose_model(Path("runs"))]
    opened = partial(open_ensemble, models, device, _numbers(weights), mirror, engine, precision, fold)
    opened = partial(deterministically, opened) if deterministic else opened
    if found.choices:
        console.print_plain(
            f"{len(found.cases)} of {len(found.choices)} DICOM series selected; {output / SERIES_TABLE} states why"
        )
    part, most = Share.asked(shard).part, parse_size(max_memory)
    sure = read_confidence(confidence)
    options = PredictOptions(endings, anonymous, identifiers, found.choices, most, part, scheme, sure)
    shared_work("predict", found.cases, PredictScans(opened, output, options), shard, ranks)


def _numbers(text: str | None) -> list[float]:
    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise UsageError(f"--weights {text}: give comma-separated numbers, such as 2,1") from error
