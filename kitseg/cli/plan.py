"""The command plan, and the configuration of a run from a size or a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kitseg.cli import options as opt
from kitseg.cli.app import app, exit_if
from kitseg.errors import InputError, UsageError
from kitseg.runtime import console

if TYPE_CHECKING:
    from kitseg.types import Case

Make = Callable[[dict[str, Any]], dict[str, Any]]  # a plan from a method's sizes
FILE, HOURS = Path("plan.yaml"), 4 * 3600.0  # where a plan is by default; seconds to wait for another process's


def composed(
    method: str,
    size: str | None,
    plan: Path | None,
    overrides: Sequence[str],
    config_dir: Path | None,
    make: Make | None = None,
    write: bool = True,
) -> tuple[dict[str, Any], str]:
    """The configuration of a method with a size or a plan, and the name of the size, or of the plan's file.

    Without a size or a plan, a method that has no size ``paper`` takes ``plan.yaml``. make: makes the plan if it isn't
    there, from the method's sizes; write: write it, too.

    Raises:
        UsageError: a size and a plan are given, or neither where there is no plan and none can be made.
        InputError: the plan is missing or can't be used.
    """
    from kitseg import config
    from kitseg.runtime.locks import folder_lock
    from kitseg.training.planner import read_plan, write_plan

    if size and plan:
        raise UsageError("--size and --plan exclude each other: a plan states the size that it was made from")
    sizes = config.sizes(method, config_dir)
    size = size or ("paper" if plan is None and "paper" in sizes else None)
    if size is not None:
        return config.compose(method, size, overrides, config_dir), size
    path = plan or FILE
    if path.exists():
        made = read_plan(path, method, sizes)
    elif plan:
        raise InputError(path, "there is no such file", "`kitseg plan` makes a plan.")
    elif make is None:
        raise UsageError(f"give a --size of {', '.join(sizes)}, or make {path} with `kitseg plan`")
    elif not write:
        made = make(sizes)
    else:
        with folder_lock(path.absolute().parent, "a plan", wait=HOURS):
            if not path.exists():
                write_plan(path, make(sizes))
        made = read_plan(path, method, sizes)
    console.print_plain(f"planned: {path} (size {made['size']}, {made.get('budget', 'no budget stated')})")
    labels = config.stated_scheme(overrides).line
    if made.get("labels", labels) != labels:
        console.print_plain(f"{path} was made from the labels {made['labels']}, these are {labels}")
    return config.compose(method, made["size"], overrides, config_dir, made["values"]), path.stem


def make_plan(
    method: str, sizes: dict[str, Any], find: Callable[[], list[Case]], jobs: int, memory: float | None, **given: Any
) -> tuple[dict[str, Any], list[str]]:
    """Find and read the cases, fit a size to them, and print the plan; with the error of each case that is left out.

    given: ``labels``, their scheme; ``size`` to fit, None chooses by the memory; ``scans``: also read the CTs;
    ``start``: the model folder of nnU-Net to start from; ``config_dir``: of the user's own methods; ``overrides``: of
    the configuration of a training whose ``split`` file, where it isn't there yet, is written after the plan.

    Raises:
        UsageError: no such size or model, or test cases would be chosen after they were planned from.
    """
    from kitseg import config
    from kitseg.labels import KITS19
    from kitseg.training import planner
    from kitseg.training.fingerprint import fingerprint
    from kitseg.training.nnunet import find_nnunet

    size = given.get("size") or planner.choose_size(sizes, memory)
    if size not in (planned := planner.planned(sizes)):
        raise UsageError(f"{method} has no size '{size}' that can be planned. Choose from {', '.join(planned)}")
    start = given.get("start")
    if start is not None and (start := find_nnunet(start)) is None:
        raise UsageError(f"--init-from {given['start']}: it is no model folder of nnU-Net; others need no plan")
    where = given.get("config_dir")
    settings, split = config.compose(method, size, given.get("overrides", ()), where), given.get("split")
    if settings["test_cases"] and split is not None and not split.exists():
        raise UsageError(f"test cases are not planned from, and {split} isn't there yet: make it with `kitseg split`")
    cases, ema, errors = find(), settings["trainer"]["ema"] is not None, list[str]()
    labels = given.get("labels", KITS19)
    with console.bar("plan", len(cases)) as step:

        def done(error: str) -> None:
            step()
            if error:
                console.print_error(f"{error} The case is left out.")
                errors.append(error)

        seen = fingerprint(cases, labels, jobs, done, given.get("scans", True))
    values = planner.fit_size(seen, sizes[size], memory, start, ema)
    plan = {"labels": labels.line, **planner.make_plan(method, size, seen, values, memory, where)}
    _show(plan)
    larger = [name for name, row in plan["estimate"].items() if memory is not None and row["memory_gb"] > memory]
    if larger:
        console.print_line(
            f"more than the {memory:g} GB by the estimate: {', '.join(larger)}; take smaller patches there"
        )
    return plan, errors


def memory_here(device: str) -> float | None:
    """GB of the CUDA GPU that would be trained on; None for other devices."""
    import torch

    from kitseg.training.planner import gpu_memory

    if device in ("cpu", "mps") or not torch.cuda.is_available():
        return None
    return gpu_memory()


def cases_to_plan(data: Sequence[Path] | None, masks: Path | None, split: Path) -> list[Case]:
    """The labelled cases of folders, or without these the label maps alone; see ``_without_test``."""
    from kitseg.types import Case
    from kitseg.volumes.kits import find_labels, labelled_cases, with_origin

    if data is None and masks is not None:
        return _without_test(
            [with_origin(Case(name, path, path), {}) for name, path in find_labels(masks).items()], split
        )
    return _without_test(labelled_cases(data or [Path("data")], masks), split)


def _without_test(cases: list[Case], split: Path) -> list[Case]:
    """The cases without the test cases of a split that is there, and without registered copies of these.

    Raises:
        UsageError: there are no others.
    """
    from kitseg.splits import read_split
    from kitseg.volumes.names import pair

    test = set(read_split(split).test) if split.exists() else set()
    held = {*test, *pair(test, [case.id for case in cases]).values()}
    if not (left := [case for case in cases if not held.intersection((case.id, *case.sources))]):
        raise UsageError(f"{split} holds out all of these cases: there are none to plan from")
    return left


@app.command(epilog="Example: kitseg plan data --gpu-memory 24GB -o plan.yaml")
def plan(
    data: Annotated[list[Path] | None, typer.Argument(help="Folders of labelled cases. Default: data.")] = None,
    masks: opt.Masks = None,
    method: opt.Method = "resenc",
    size: opt.PlainSize = None,
    gpu_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of the GPU to train on, such as 24GB.")
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Plan for this machine's CPU.")] = False,
    init_from: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Plan the second stage with the network of a model folder of nnU-Net."),
    ] = None,
    labels: opt.LabelsName = None,
    split: Annotated[
        Path, typer.Option(help="Split file, whose labels are the default, and whose test cases are left out.")
    ] = Path("splits.json"),
    out: Annotated[Path, typer.Option("--out", "-o", help="The plan, a YAML file to read and edit.")] = FILE,
    config_dir: opt.ConfigDir = None,
    jobs: opt.Jobs = -1,
    overwrite: opt.Overwrite = False,
) -> None:
    """Fit a method's grids, patches and networks to the cases and to a GPU's memory or a CPU.

    Without --gpu-memory or --cpu, the plan is for the GPU of this machine if there is one. With --masks and no folder
    of cases, only the label maps are read, and the size's own HU stay.
    """
    from kitseg import config
    from kitseg.models.memory import parse_size
    from kitseg.training.planner import write_plan

    if gpu_memory and cpu:
        raise UsageError("--gpu-memory and --cpu exclude each other")
    if out.exists() and not overwrite:
        raise UsageError(f"{out} exists, and may have been edited. Choose another -o, or replace it with --overwrite")

    memory = None if cpu else memory_here("auto")
    if gpu_memory:
        memory = (parse_size(gpu_memory, "--gpu-memory") or 0) / 1e9
    scans = data is not None or masks is None
    sizes = config.sizes(method, config_dir)
    given = {
        "size": size,
        "labels": opt.stated_or_split(labels, split),
        "scans": scans,
        "start": init_from,
        "config_dir": config_dir,
    }
    made, errors = make_plan(method, sizes, lambda: cases_to_plan(data, masks, split), jobs, memory, **given)
    write_plan(out, made)
    more = "".join(f" --data {quote(str(folder))}" for folder in data or ())
    stated = {"masks": masks, "labels": labels, "init-from": given["start"], "config-dir": config_dir}
    stated["split"] = split if split != Path("splits.json") else None
    more += "".join(f" --{name} {quote(str(value))}" for name, value in stated.items() if value)
    console.print_plain(f"plan: {out}; `kitseg train --method {method} --plan {quote(str(out))}{more}` trains it")
    exit_if(bool(errors))


def _show(plan: dict[str, Any]) -> None:
    """Print what was read and planned."""
    seen = plan["cases"]
    spacing = " × ".join(f"{mm:.3g}" for mm in seen["spacing_mm"])
    console.print_line(f"{seen['cases']} cases, median voxel {spacing} mm; size {plan['size']} for {plan['budget']}")
    table = console.table("stage", "grid (mm)", "patch", "batch", "levels", "parameters", "memory", "s a step", "hours")
    for name, row in plan["estimate"].items():
        stage = plan["values"][name]
        grid, patch = stage["grid"], " × ".join(map(str, stage["patch"]))
        cells = (f"{grid['slices']:.3g} × {grid['inplane']:.3g}", patch, stage["batch"], len(stage["widths"]))
        figures = (f"{row['parameters_m']} M", f"{row['memory_gb']} GB", f"{row['seconds_a_step']:.3g}", row["hours"])
        table.add_row(name, *map(str, (*cells, *figures)))
    console.out.print(table)
    smallest, voxel = seen["lesions"].get("p10_mm"), plan["values"]["masses"]["grid"]["slices"]
    if smallest is not None and smallest < 3 * voxel:
        console.print_line(f"a tenth of the lesions are smaller than {smallest} mm: three slices of this grid or fewer")
