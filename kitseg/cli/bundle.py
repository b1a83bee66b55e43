"""The command that exports a trained model: as one file, or as ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from kitseg.cli import options as opt
from kitseg.cli.app import app
from kitseg.errors import UsageError
from kitseg.runtime import console


@app.command(epilog="Example: kitseg export runs/two-phase-paper -o two-phase.kitseg")
def export(
    model: Annotated[
        str,
        typer.Argument(help="A run (its finished folds), one of its folds, an ensemble file; for ONNX also a bundle."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The bundle, a .kitseg file; of ONNX files the folder.")
    ],
    form: Annotated[
        str, typer.Option("--format", help="bundle, which kitseg opens, or onnx: each network for other programs.")
    ] = "bundle",
    weights_license: Annotated[
        str | None,
        typer.Option(
            metavar="LICENSE", help="License of the weights. Default: the labels', or with --init-from KiTS19's."
        ),
    ] = None,
    labels_license: Annotated[
        str | None, typer.Option(metavar="LICENSE", help="License of the training labels. Default: that of KiTS19.")
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Weights in half precision, which halves the file.")] = False,
    name: Annotated[str | None, typer.Option(help="Name of the model. Default: that of its run.")] = None,
    card: Annotated[Path | None, typer.Option(metavar="FILE", help="A model card in Markdown, to include.")] = None,
    trust: opt.Trust = False,
    overwrite: opt.Overwrite = False,
) -> None:
    """Export a trained model as one file for sharing: weights, configuration and licenses, without names of cases.

    `kitseg predict --model` opens it on any machine, without executing code from the file.

    With --format onnx: a file for each network, compared with PyTorch, and model.json, which describes what their input
    is made of and what becomes of their output.
    """
    if form not in ("bundle", "onnx"):
        raise UsageError(f"--format {form}: give bundle or onnx")
    if form == "onnx":
        if half or card or weights_license or labels_license:
            raise UsageError("--half, --card and licenses are for --format bundle")
        return _export_onnx(model, opt.folder(output), name)
    from kitseg.models.bundles.export import ExportOptions
    from kitseg.models.bundles.export import export as write_bundle
    from kitseg.runtime.files import file_digest

    licenses = write_bundle(model, output, ExportOptions(weights_license, labels_license, half, name, card))
    stated = ", ".join(f"{kind} {license}" for kind, license in licenses.items())
    console.print_line(escape(f"{output}: {output.stat().st_size / 1e6:.1f} MB, licensed {stated}"))
    console.print_line(f"sha256 {file_digest(output)}")


def _export_onnx(model: str, output: Path, name: str | None) -> None:
    from kitseg.models.bundles.onnx import Network, export_onnx

    def show(network: Network) -> None:
        compared = f"probabilities within {network.largest_difference:.1g} of PyTorch's"
        console.print_line(escape(f"{output / network.file}: {compared}, {network.same_labels:.3%} same labels"))

    networks = export_onnx(model, output, name, show)
    console.print_line(escape(f"{len(networks)} networks, described in {output / 'model.json'}"))
