"""The demo: the built-in network on a patient's CT and on a phantom; the training of a network on phantoms."""

from __future__ import annotations

import filecmp
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

from kitseg.errors import KitsegError, UsageError
from kitseg.report.pictures import case_picture
from kitseg.runtime.files import atomic_write
from kitseg.runtime.overwrite import refuse_overwrite
from kitseg.volumes.kits import IMAGE, LABEL
from kitseg.volumes.nifti import read_image, read_labels

PATIENT, SCANS, TRAINING = "hcc_007b", "scans", "training"
METHOD, RUN = ("--method", "two-phase", "--size", "tiny"), "runs/two-phase-tiny"
QUICK_SIZE = ("--set=size.vnet_width=4", "--set=size.validate_every=1")
SOURCE = (
    f"{PATIENT}: a patient of HCC-TACE-Seg (CC BY 4.0) from whom the network did not learn; "
    "outlined by a machine (kitseg/samples/README.md). case_00000: a phantom with a known tumor."
)
RESEARCH_USE = "Phantoms, not patients, and networks trained for minutes: the scores do not reflect a method's quality."


def run_demo(out: Path, quick: bool, train: bool, log: Callable[[str], None]) -> None:
    """Run the demo: sample, phantom → predict → evaluate → measure → report; ``train``: then a training on phantoms.

    Raises KitsegError: a step failed; its own message has been printed before.
    """
    write_sample(out / SCANS / PATIENT)
    log(f"\n{SOURCE}")
    _run(prediction_commands(quick), out, log)
    log(f"\nOpen [bold]{out / 'report' / 'index.html'}[/]; labels and pictures are in {out / 'labels'}.")
    if train:
        folder = out / TRAINING
        folder.mkdir(exist_ok=True)
        _run(training_commands(quick), folder, log)
        write_picture(folder)
        log(f"\nOpen [bold]{folder / 'report.png'}[/] and [bold]{folder / 'report' / 'index.html'}[/]. {RESEARCH_USE}")


def _run(commands: Sequence[Sequence[str]], folder: Path, log: Callable[[str], None]) -> None:
    for command in commands:
        log(f"\n[bold cyan]$ {shlex.join(['kitseg', *command])}[/]")
        code = subprocess.run([sys.executable, "-m", "kitseg", *command], cwd=folder, check=False).returncode
        if code:
            raise KitsegError(f"the demo failed: `kitseg {command[0]}` ended with exit code {code}. See above.")


def write_sample(to: Path) -> None:
    """Copy the sample CT and its outlines into a case's folder. Raises UsageError: other files are in the way."""
    for name in (IMAGE, LABEL):
        source, target = Path(str(resources.files("kitseg"))) / "samples" / PATIENT / name, to / name
        if not target.exists():
            with atomic_write(target) as partial:
                shutil.copyfile(source, partial)
        elif not filecmp.cmp(source, target, shallow=False):
            raise UsageError(f"{target} is in the way. Choose another output folder")


def prediction_commands(quick: bool) -> list[list[str]]:
    """The commands that use the built-in network."""
    return [
        ["phantom", SCANS, "--cases", "1", "--seed", "1", "--matrix", "64" if quick else "256"],
        ["predict", SCANS, "--model", "builtin", "-o", "labels"],
        ["evaluate", "labels", SCANS, "--labels", "kits23", "--protocol", "kits23", "--json", "scores.json"],
        ["measure", "labels", "--ct", SCANS, "--labels", "kits23"],
        ["report", "labels", SCANS, "--scores", "scores.json"],
    ]


def training_commands(quick: bool) -> list[list[str]]:
    """The commands of the training: phantom → check → preprocess → train → infer → ensemble → postprocess → report."""
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
    """Draw the first held-out phantom of a training in three planes: CT, reference and prediction."""
    refuse_overwrite(out / "report.png", "png")
    case = "case_00000"
    ct, truth = read_image(out / "test" / case / IMAGE, case), read_labels(out / "test" / case / LABEL, case)
    found = read_labels(out / "predictions" / f"{case}.nii.gz", case)
    case_picture(out / "report.png", ct, found.array, truth.array, title=f"{case}: reference and prediction")
