"""Options and arguments that several commands have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from kitseg.errors import UsageError
from kitseg.runtime import console
from kitseg.runtime.overwrite import overwriting
from kitseg.trust import everything
from kitseg.volumes.names import is_file_name

if TYPE_CHECKING:
    from kitseg.labels import Scheme

P = TypeVar("P", Path, Path | None)


def folder(path: P) -> P:
    """An output folder. Raises UsageError: its name is that of a file."""
    if path and is_file_name(path):
        raise UsageError(f"{path} ends like a file. Give a folder: it is made where it is missing")
    return path


PROBABILITIES, PREDICTIONS = Path("probabilities"), Path("predictions")

Data = Annotated[Path, typer.Argument(help="Folder of cases: case_00000/imaging.nii.gz, or flat .nii.gz files.")]
DataFolders = Annotated[list[Path], typer.Option("--data", help="Folder of labelled cases; may be repeated.")]
Masks = Annotated[
    Path | None,
    typer.Option("--masks", metavar="DIR", help="Folder of the label maps, if they do not lie beside their scans."),
]
Method = Annotated[
    str, typer.Option(metavar="NAME|FILE", help="A method listed by `kitseg methods`, or your own YAML file.")
]
PlainSize = Annotated[str | None, typer.Option(help="One of the method's sizes, such as paper, small or tiny.")]
Size = Annotated[
    str | None,
    typer.Option(help="One of the method's sizes. Default: paper; without such a size, plan.yaml, which train makes."),
]
Plan = Annotated[Path | None, typer.Option(metavar="FILE", help="A plan that `kitseg plan` made, in place of a size.")]


def _current_keys(changes: list[str]) -> list[str]:
    if any(change.startswith("convention=") for change in changes):
        console.print_plain("--set convention= is now --labels")
    return changes


Set = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        callback=_current_keys,
        help="Change a configuration key (stages.*.KEY: in every stage); may be repeated.",
    ),
]
ConfigDir = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder of your own methods and stages (docs/how-to/own-method.md).")
]


def _trust(context: typer.Context, given: bool) -> bool:
    if given:
        context.with_resource(everything())
    return given


Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        callback=_trust,
        help="Allow models with parts from outside kitseg: code of their authors will run.",
    ),
]


def _overwrite(context: typer.Context, given: bool) -> bool:
    if given:
        context.with_resource(overwriting())
    return given


Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", callback=_overwrite, help="Replace files in the way that kitseg did not write."),
]


def _check_jobs(jobs: int) -> int:
    if jobs == 0:
        raise UsageError("--jobs 0: give 1 or more, or -1 for the number of cores")
    return jobs


Jobs = Annotated[int, typer.Option(callback=_check_jobs, help="Cases processed in parallel; -1: one per core.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps (an Apple GPU; auto does not choose it).")]
Gpus = Annotated[
    int | None,
    typer.Option(min=0, help="GPUs on this machine, one process each; 0: the CPU. Default: one if available."),
]
Processes = Annotated[int, typer.Option(min=1, help="Processes on the CPU; needs --device cpu.")]
Deterministic = Annotated[
    bool, typer.Option("--deterministic", help="Bit-identical results in every run; slower on a GPU.")
]
Shard = Annotated[
    str | None, typer.Option(metavar="K/N", help="Process only part K (1 to N) of N parts of the cases, such as 2/8.")
]
Split = Annotated[Path | None, typer.Option(help="Split file: only its test cases, or the cases of --fold.")]
Fold = Annotated[int | None, typer.Option(help="With --split: only the validation cases of this fold.")]
NetworkFold = Annotated[
    int | None,
    typer.Option(help="With --split: only the validation cases of this fold, by the networks of this fold of a run."),
]
Mirror = Annotated[bool, typer.Option("--mirror", help="Test-time augmentation: left-right flip.")]
Engine = Annotated[
    str, typer.Option(help="auto (on a CPU what is fastest for the network), torch, openvino or winograd.")
]
Precision = Annotated[str, typer.Option(help="auto (as in training on a GPU, f32 on a CPU), f32 or bf16.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Random seed; the same seed gives the same result.")]
MaxMemory = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Memory limit, such as 6GB; scans that may need more are refused.")
]


def read_scheme(text: str) -> Scheme:
    """The label scheme that an option names."""
    from kitseg.labels import find_scheme

    return find_scheme(text)


def stated_or_split(labels: str | None, split: Path | None) -> Scheme:
    """The scheme of ``--labels``; where it isn't given, that of a split's file, and KiTS19's without one."""
    from kitseg.splits import read_split

    if labels is None and split is not None and split.exists():
        return read_split(split).scheme
    return read_scheme(labels or "kits19")


def labels_override(labels: str | None, split: Path) -> list[str]:
    """The override of the configuration for ``stated_or_split``; none for KiTS19's where nothing is stated."""
    from kitseg.labels import KITS19

    if labels is None and (scheme := stated_or_split(labels, split)).ids != KITS19.ids:
        labels = json.dumps(scheme.plain())
    return [f"labels={labels}"] if labels else []


_KINDS = (
    "kits19 (cysts are kidney), kits23 (cysts are 3), kidney=1,tumor=2,cyst=3, a .yaml file, or nnU-Net's dataset.json"
)


def _scheme_option(text: str, parser: Callable[[str], Scheme] | None = read_scheme) -> Any:
    return typer.Option("--labels", metavar="SCHEME", parser=parser, show_default=False, help=text)


Labels = Annotated[
    Any,
    _scheme_option(f"Labels of the files: {_KINDS}. Default: what kitseg or nnU-Net states beside them, else kits19."),
]
DataLabels = Annotated[Any, _scheme_option(f"Labels of the files: {_KINDS}. Default: kits19.")]
MaskLabels = Annotated[Any, _scheme_option(f"Labels of the masks and of --lesions: {_KINDS}. Default: kits23.")]
LabelsName = Annotated[
    str | None,
    _scheme_option(f"Labels of the files: {_KINDS}. Default: those of the split file, else kits19.", parser=None),
]
ReferenceLabels = Annotated[
    Any,
    _scheme_option(
        f"Labels of the references: {_KINDS}. Default: the protocol's, or those of --split if they are others (report: "
        "kits23). A prediction is read by its JSON file or nnU-Net's dataset.json beside it, else by this."
    ),
]
LabelsToWrite = Annotated[
    Any,
    _scheme_option(
        "Labels to write: kits19 (cysts become kidney), kits23, kidney=1,tumor=2,cyst=3, a .yaml file, or nnU-Net's "
        "dataset.json. Default: those of the model."
    ),
]
Egfr = Annotated[
    float | None, typer.Option(help="eGFR before surgery, ml/min/1.73 m²; with --age, predicts that after it.")
]
Age = Annotated[float | None, typer.Option(help="The patient's age in years.")]
Diabetes = Annotated[bool, typer.Option("--diabetes", help="The patient has diabetes.")]
Intervals = Annotated[
    Path | None,
    typer.Option(
        metavar="RUN|FILE",
        help="Add 90 % intervals of volumes and diameters, from a validated run or `kitseg evaluate --intervals`.",
    ),
]
Cluster = Annotated[
    str | None,
    typer.Option(metavar="dask://HOST:PORT", help="Process the cases on the workers of a dask cluster."),
]
