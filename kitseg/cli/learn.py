"""Commands for training and the overview: methods, train, demo."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kitseg.cli import options as opt
from kitseg.cli.app import app, choose_ranks, cross_validate, exit_if, preprocess_cases, show_left_out
from kitseg.cli.plan import cases_to_plan, composed, make_plan, memory_here
from kitseg.errors import KitsegError, UsageError
from kitseg.runtime import console

if TYPE_CHECKING:
    from kitseg.training.fit import Training
    from kitseg.training.plan import Plan, Start
    from kitseg.types import Case

EVERY_FOLD = "all"


@dataclass(frozen=True)
class TrainRequest:
    """The parts of a run that a call of `kitseg train` trains, and their cases."""

    data: Sequence[Path]
    masks: Path | None
    jobs: int
    stage: str | None
    every_fold: bool
    restart: bool


@app.command(epilog="Example: kitseg methods")
def methods(config_dir: opt.ConfigDir = None) -> None:
    """List the methods with their stages, paper, published Dice and origin, and the trained network that ships."""
    from kitseg import config

    table = console.table("method", "stages", "paper", "published Dice", "from")
    for file, about in config.summaries(config_dir).items():
        dice = ", ".join(f"{key} {value}" for key, value in about["published"].items())
        table.add_row(file.name, " → ".join(about["chain"]), about["paper"], dice, file.origin)
    console.out.print(table)
    console.print_line(
        "builtin: trained networks of resenc for kidneys, tumors and cysts, for non-commercial use. `kitseg predict "
        "SCAN` uses them where no run of yours learned from patients; --model builtin always (docs/methods/builtin.md)."
    )


@app.command(epilog="Example: kitseg train --method two-phase --size small --fold 0 --gpus 1")
def train(
    method: opt.Method = "two-phase",
    size: opt.Size = None,
    plan: opt.Plan = None,
    config_dir: opt.ConfigDir = None,
    fold: Annotated[str, typer.Option(help="The fold to train, or all: every fold, then cross-validation.")] = "0",
    stage: Annotated[str | None, typer.Option(help="Train only this stage.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Number of epochs of each stage.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="Random seed.")] = None,
    gpus: opt.Gpus = None,
    device: opt.Device = "auto",
    processes: opt.Processes = 1,
    nodes: Annotated[int, typer.Option(min=1, help="Number of machines (docs/how-to/distributed.md).")] = 1,
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Data loader processes per GPU or process. Default: on a GPU up to 8, on the CPU 0."),
    ] = None,
    save_every: Annotated[
        float,
        typer.Option(
            metavar="MINUTES", min=0, help="Interval of checkpoints within an epoch, besides those after each epoch."
        ),
    ] = 10.0,
    data: opt.DataFolders = [Path("data")],  # noqa: B006
    masks: opt.Masks = None,
    store: Annotated[Path, typer.Option(help="Folder of preprocessed cases.")] = Path("preprocessed"),
    split: Annotated[Path, typer.Option(help="The split file, created if it doesn't exist.")] = Path("splits.json"),
    runs: Annotated[Path, typer.Option(help="Folder of runs.")] = Path("runs"),
    name: Annotated[str | None, typer.Option(help="Name of the run. Default: METHOD-SIZE, or METHOD-PLAN.")] = None,
    jobs: opt.Jobs = -1,
    deterministic: opt.Deterministic = False,
    init_from: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Start from the weights of a run, fold, bundle or checkpoint, or of a model of nnU-Net.",
        ),
    ] = None,
    trust: opt.Trust = False,
    restart: Annotated[bool, typer.Option("--restart", help="Rename an earlier training and start a new one.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and run one training step of each stage only.")
    ] = False,
    labels: opt.LabelsName = None,
    set_: opt.Set = [],  # noqa: B006
) -> None:
    """Train the stages of a method in order. Running the same command again resumes."""
    from kitseg import config
    from kitseg.models.run_folder import Run
    from kitseg.runtime.device import Machine, be_deterministic
    from kitseg.runtime.launcher import Launch, is_started_again
    from kitseg.runtime.signals import requeued
    from kitseg.training.ddp import RankCoordinator
    from kitseg.training.fit import Training, fit
    from kitseg.training.nnunet import find_nnunet
    from kitseg.training.plan import Start

    if restart and is_started_again():
        remedy = "leave --restart out to resume it"
        raise UsageError(
            f"SLURM or torchrun has started this job again: --restart would undo what it has trained; {remedy}"
        )
    device, ranks = choose_ranks(gpus, processes, device)
    given = {"stages.*.epochs": epochs, "seed": seed}
    overrides = [f"{key}={value}" for key, value in given.items() if value is not None]
    overrides = [*opt.labels_override(labels, split), *set_, *overrides]

    def make(sizes: dict[str, Any]) -> dict[str, Any]:
        known, theirs = config.stated_scheme(overrides), init_from if init_from and find_nnunet(init_from) else None
        made, _ = make_plan(
            method,
            sizes,
            lambda: cases_to_plan(data, masks, split),
            jobs,
            memory_here(device),
            labels=known,
            start=theirs,
            config_dir=config_dir,
            overrides=overrides,
            split=split,
        )
        return made

    configuration, size = composed(method, size, plan, overrides, config_dir, make, write=not dry_run)
    if deterministic:
        be_deterministic()
    first = 0 if fold == EVERY_FOLD else _fold(fold)
    machine = Machine(device, ranks, nodes, workers, save_every)
    run = Run(runs / (name or f"{configuration['name']}-{size}"))
    begin = Start(configuration, run, first, split, store, machine, init_from)
    begin.check(stage, restart, fold == EVERY_FOLD)
    wanted, failed = TrainRequest(data, masks, jobs, stage, fold == EVERY_FOLD, restart), set[str]()
    if dry_run:
        return _rehearse(begin, wanted)
    launch, machine = Launch.here(nodes).agreed(machine)
    backend, begin = "nccl" if machine.accelerator == "cuda" else "gloo", replace(begin, machine=machine)
    coordinator = RankCoordinator(launch, backend, sys.argv[1:])
    mine = coordinator.share(
        partial(_trainings, begin, wanted, failed),
        Training.plain,
        partial(Training.of, method=begin.method, settings=begin.settings),
    )
    with requeued():
        with coordinator, closing(mine) as trainings:
            for training in trainings:
                fit(training, machine)
        if launch.index:
            return
        console.print_plain(f"trained: {begin.run.path}")
        if wanted.every_fold and stage is None:
            cross_validate(begin.run.path, data, device, mirror=False, masks=masks)
    exit_if(bool(failed))


@app.command(epilog="Example: kitseg demo")
def demo(
    out: Annotated[
        Path | None, typer.Argument(callback=opt.folder, help="Output folder. Default: demo, or demo-quick.")
    ] = None,
    train: Annotated[bool, typer.Option("--train", help="Then train a network on phantoms, in minutes.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A minimal demo, to test the installation.")] = False,
) -> None:
    """Segment a patient's CT and a phantom with the built-in network, and print every command."""
    from kitseg.commands.demo import run_demo

    run_demo(out or Path("demo-quick" if quick else "demo"), quick, train, console.print_line)


def _fold(text: str) -> int:
    if not text.isdecimal():
        raise UsageError(f"--fold {text}: give the number of a fold, from 0, or {EVERY_FOLD}")
    return int(text)


def _rehearse(begin: Start, wanted: TrainRequest) -> None:
    """Show what `kitseg train` would do, and try one step of each stage."""
    from kitseg.training.initial import find_initial
    from kitseg.training.plan import units
    from kitseg.training.rehearsal import try_step
    from kitseg.training.train import check_initial
    from kitseg.volumes.kits import labelled_cases

    cases = labelled_cases(wanted.data, wanted.masks)
    plan = begin.rehearse(cases, wanted.restart)
    if plan.run.begun and not wanted.restart:
        initial = find_initial(plan.initial, plan.method, plan.fold).stages if plan.initial else {}
        check_initial(plan, units(plan.method, plan.part, wanted.stage), initial)
    _show_unused(plan, cases, begin.split)
    _show_plan(plan, cases, wanted.stage)
    for name, spec in plan.method.stages.items():
        if wanted.stage in (None, name):
            console.print_line(f"{name}: one training step works, its loss is {try_step(spec):.4f}")
    if wanted.every_fold:
        console.print_line(f"times are for one fold; all {len(plan.split.folds)} folds take that many times as long")


def _trainings(begin: Start, wanted: TrainRequest, failed: set[str]) -> Iterator[Training]:
    """Preprocess the cases, then yield the trainings of the fold or folds; failed cases are added to ``failed``."""
    from kitseg.training.train import trainings_of_fold
    from kitseg.volumes.kits import labelled_cases

    cases = labelled_cases(wanted.data, wanted.masks)
    show_left_out(wanted.data, cases, wanted.masks)
    for old in begin.restart(wanted.stage, wanted.every_fold) if wanted.restart else ():
        console.print_plain(f"the old training is now {old}")
    failed |= preprocess_cases(cases, begin.config, begin.store, wanted.jobs)
    good = [case for case in cases if case.id not in failed]
    if not good:
        raise KitsegError(f"{wanted.data[0]}: no case could be preprocessed. See the errors above")
    plan = begin.claim(good, wanted.jobs)
    _show_unused(plan, good, begin.split)
    _show_plan(plan, good, wanted.stage)
    folds = range(len(plan.split.folds)) if wanted.every_fold else [plan.fold]
    for fold in folds:
        if len(folds) > 1:
            console.print_line(f"[bold]fold {fold} of {len(folds)}[/]")
        yield from trainings_of_fold(replace(plan, fold=fold), good, wanted.jobs, console.print_plain, wanted.stage)


def _show_unused(plan: Plan, cases: Sequence[Case], split: Path) -> None:
    """Print which cases, and which registered copies of cases, the split leaves out."""
    from kitseg.volumes.names import shorten

    kinds = {
        False: ("labelled cases", "train with a new --split and --name to use them"),
        True: ("registered copies", "`kitseg augment` wrote a split with them into their folder: give it as --split"),
    }
    for copied, (kind, remedy) in kinds.items():
        if unused := sorted({case.id for case in cases if bool(case.sources) is copied} - plan.split.cases):
            console.print_plain(f"{len(unused)} {kind} are not in {split}: {shorten(unused)}; {remedy}")


def _show_plan(plan: Plan, cases: Sequence[Any], stage: str | None) -> None:
    """Print the trainings of a plan, with their size and an estimate of their time."""
    from kitseg.training.cost import estimates

    machine = plan.machine
    columns = ("cases", "batch", "patch", "epochs × steps", "parameters", "memory", "time")
    table = console.table("training", "grid", *columns)
    rows, notes = estimates(plan, cases[0], stage)
    for row in rows:
        table.add_row(*row)
    console.print_line(f"{plan.method.name}, fold {plan.fold} of {len(plan.split.folds)}, on {machine.describe()}")
    console.out.print(table)
    if plan.method.labels.cyst and not plan.method.finds_cysts:
        notes = [*notes, f"{plan.method.name} has no class for cysts: it learns them as kidney"]
    for note in notes:
        console.print_plain(note)
