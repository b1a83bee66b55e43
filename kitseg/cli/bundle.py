"""The command that exports a trained model as one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from kitseg.cli.app import Trust, app
from kitseg.runtime import console


@app.command(epilog="Example: kitseg export runs/two-phase-paper -o two-phase.kitseg")
def export(
    model: Annotated[Path, typer.Argument(help="A run (its finished folds), one fold of it, or an ensemble file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The bundle: a file that ends in .kitseg.")],
    weights_license: Annotated[
        str | None,
        typer.Option(metavar="LICENSE", help="The weights' license, where it isn't the labels'."),
    ] = None,
    labels_license: Annotated[
        str | None, typer.Option(metavar="LICENSE", help="The training labels' license, where they aren't KiTS19's.")
    ] = None,
    trust: Trust = False,
) -> None:
    """Pack a trained model into one file to pass on: weights, configuration, licenses, and no case by its name.

    `kitseg predict --model` opens it anywhere; nothing in it is ever executed.
    """
    from kitseg.models.bundles.export import export as write_bundle
    from kitseg.runtime.files import file_digest

    licenses = write_bundle(model, output, weights_license, labels_license)
    stated = ", ".join(f"{kind} {license}" for kind, license in licenses.items())
    console.print_line(escape(f"{output}: {output.stat().st_size / 1e6:.1f} MB, licensed {stated}"))
    console.print_line(f"sha256 {file_digest(output)}")
