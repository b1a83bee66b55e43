"""The demo: all steps of the workflow on phantoms."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from kitseg.errors import KitsegError
from kitseg.report.pictures import case_picture
from kitseg.runtime.overwrite import refuse_overwrite
from kitseg.volumes.kits import IMAGE, LABEL
from kitseg.volumes.nifti import read_image, read_labels

METHOD, RUN = ("--method", "two-phase", "--size", "tiny"), "runs/two-phase-tiny"
QUICK_SIZE = ("--set=size.vnet_width=4", "--set=size.validate_every=1")
RESEARCH_USE = "Phantoms, not patients, and networks trained for minutes: the scores do not reflect a method's quality."


def run_demo(out: Path, quick: bool, log: Callable[[str], None]) -> None:
    """Run the demo: phantom → check → preprocess → train → infer → ensemble → postprocess → evaluate → report.

    Writes ``report.png``, the first held-out phantom with its reference and its prediction. Raises KitsegError: a step
    failed; its own message has been printed before.
    """
    out.mkdir(parents=True, exist_ok=True)
    for command in demo_commands(quick):
        log(f"\n[bold cyan]$ {shlex.join(['kitseg', *command])}[/]")
        code = subprocess.run([sys.executable, "-m", "kitseg", *command], cwd=out, check=False).returncode
        if code:
            raise KitsegError(f"the demo failed: `kitseg {command[0]}` ended with exit code {code}. See above.")
    write_picture(out)
    log(f"\nOpen [bold]{out / 'report.png'}[/] and [bold]{out / 'report' / 'index.html'}[/]. {RESEARCH_USE}")


def demo_commands(quick: bool) -> list[list[str]]:
    """The commands of the demo, which run in its folder."""
    training, held_out, matrix = ("3", "1", "64") if quick else ("12", "3", "128")
    size, epochs = (QUICK_SIZE, ("--epochs=1",)) if quick else ((), ())
    return [
        ["phantom", "data", "--cases", training, "--seed", "0", "--matrix", matrix],
        ["phantom", "test", "--cases", held_out, "--seed", "1", "--matrix", matrix],
        ["check", "data"],
        ["preprocess", "data", *METHOD, *size],
        ["train", *METHOD, *size, *epochs],
        ["infer", "--run", RUN, "--data", "test", "-o", "probabilities"],
        ["ensemble", "probabilities", "-o", "mean"],
        ["postprocess", "mean", "-o", "predictions"],
        ["evaluate", "predictions", "test", "--json", "scores.json"],
        ["report", "predictions", "test", "--scores", "scores.json"],
    ]


def write_picture(out: Path) -> None:
    """Draw the first held-out phantom of a demo in three planes: CT, reference and prediction."""
    refuse_overwrite(out / "report.png", "png")
    case = "case_00000"
    ct, truth = read_image(out / "test" / case / IMAGE, case), read_labels(out / "test" / case / LABEL, case)
    found = read_labels(out / "predictions" / f"{case}.nii.gz", case)
    case_picture(out / "report.png", ct, found.array, truth.array, title=f"{case}: reference and prediction")
