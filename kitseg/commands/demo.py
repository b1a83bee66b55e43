"""The demo: all steps of the workflow on phantoms."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kitseg.errors import KitsegError
from kitseg.report.pictures import case_picture
from kitseg.volumes.nifti import read_image, read_labels

Log = Callable[[str], None]
METHOD, SIZE = "two-phase", "tiny"
RESEARCH_USE = "Phantoms, not patients, and networks trained for minutes: the scores do not reflect a method's quality."


@dataclass(frozen=True)
class Scale:
    """The size of a demo."""

    training: int
    held_out: int
    matrix: int
    options: tuple[str, ...]


FULL = Scale(12, 3, 128, ())
QUICK = Scale(3, 1, 64, ("--epochs=1", "--set=size.vnet_width=4", "--set=size.validate_every=1"))


def run_demo(out: Path, quick: bool, log: Log) -> None:
    """Run the demo: phantom → check → preprocess → train → infer → ensemble → postprocess → evaluate → report.

    Raises:
        KitsegError: a step failed; its own message has been printed before.
    """
    out.mkdir(parents=True, exist_ok=True)
    for command in demo_commands(QUICK if quick else FULL):
        log(f"\n[bold cyan]$ {shlex.join(['kitseg', *command])}[/]")
        code = subprocess.run([sys.executable, "-m", "kitseg", *command], cwd=out, check=False).returncode
        if code:
            raise KitsegError(f"the demo failed: `kitseg {command[0]}` ended with exit code {code}. See above.")
    write_picture(out)
    log(f"\nOpen [bold]{out / 'report' / 'index.html'}[/]. {RESEARCH_USE}")


def demo_commands(scale: Scale) -> list[list[str]]:
    """The commands of the demo, which run in its folder."""
    run = f"runs/{METHOD}-{SIZE}"
    which = ["--method", METHOD, "--size", SIZE]
    phantoms = ["--matrix", str(scale.matrix)]
    options = [option for option in scale.options if option.startswith("--set")]
    return [
        ["phantom", "data", "--cases", str(scale.training), "--seed", "0", *phantoms],
        ["phantom", "test", "--cases", str(scale.held_out), "--seed", "1", *phantoms],
        ["check", "data"],
        ["preprocess", "data", *which, *options],
        ["train", *which, *scale.options],
        ["infer", "--run", run, "--data", "test", "-o", "probabilities"],
        ["ensemble", "probabilities", "-o", "mean"],
        ["postprocess", "mean", "-o", "predictions"],
        ["evaluate", "predictions", "test", "--json", "scores.json"],
        ["report", "predictions", "test", "--scores", "scores.json"],
    ]


def write_picture(out: Path) -> None:
    """Write ``report.png``: CT, reference and prediction of a held-out phantom in three planes."""
    case = "case_00000"
    ct = read_image(out / "test" / case / "imaging.nii.gz", case)
    truth = read_labels(out / "test" / case / "segmentation.nii.gz", case)
    found = read_labels(out / "predictions" / f"{case}.nii.gz", case)
    case_picture(out / "report.png", ct, found.array, truth.array, title=f"{case}: reference and prediction")
