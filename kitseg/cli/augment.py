"""The command that registers hard cases with others: augment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from statistics import fmean
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from kitseg.cli import options as opt
from kitseg.cli.app import app, exit_if, preprocess_cases, take_share
from kitseg.runtime import console

if TYPE_CHECKING:
    from kitseg.commands.augment import Copied
    from kitseg.training.hard_cases import Ranked
    from kitseg.training.plan import Plan


@app.command(epilog="Example: kitseg augment --method two-phase --fold 0 --worst 20 --partners 10")
def augment(
    method: opt.Method = "two-phase",
    size: opt.Size = "paper",
    run: Annotated[
        Path | None, typer.Option(help="The run whose predictions rank the cases. Default: runs/METHOD-SIZE.")
    ] = None,
    fold: Annotated[int, typer.Option(min=0, help="The fold whose training cases are registered.")] = 0,
    worst: Annotated[int, typer.Option(min=1, help="Number of hard cases: those with the lowest Dice.")] = 20,
    partners: Annotated[int, typer.Option(min=1, help="Number of other cases paired with each hard case.")] = 10,
    direction: Annotated[
        str, typer.Option(help="partner-to-hard (warp the partner to the hard case's anatomy) or hard-to-partner.")
    ] = "partner-to-hard",
    data: opt.DataFolders = [Path("data")],  # noqa: B006
    masks: opt.Masks = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", callback=opt.folder, help="Folder for the new cases.")
    ] = Path("augmented"),
    store: Annotated[Path, typer.Option(help="Folder of preprocessed cases.")] = Path("preprocessed"),
    seed: opt.Seed = 0,
    device: opt.Device = "auto",
    jobs: opt.Jobs = -1,
    cluster: opt.Cluster = None,
    shard: opt.Shard = None,
    trust: opt.Trust = False,
) -> None:
    """Augment a fold's training set by registration of hard cases with other cases. Running it again resumes.

    Hard cases are those that the networks of the run's nested folds predict worst; nested folds that are not trained
    yet are trained first.
    """
    from kitseg.commands import augment as copies
    from kitseg.runtime.dask import on_cluster
    from kitseg.runtime.locks import folder_lock
    from kitseg.training.hard_cases import fold_plan, rank_cases
    from kitseg.volumes.kits import labelled_cases

    choice, share = copies.PairSelection(worst, partners, direction, seed), take_share(shard)
    plan = fold_plan(run or Path("runs") / f"{method}-{size}", fold, store, device)
    known = labelled_cases(data, masks)
    cases = copies.training_scans(plan.split, fold, known)
    with on_cluster(cluster):
        failed = preprocess_cases(known, plan.config, store, jobs)
    cases = {name: case for name, case in cases.items() if name not in failed}
    copies.check_enough(len(cases), choice)
    outdated: dict[int, list[str]] = {}
    with folder_lock(output, "copies", share.part):
        ranked = rank_cases(plan, cases, output / f"ranking_{fold}.json", console.print_plain)
        _show_ranking(ranked[:worst])
        pairs = copies.choose_pairs([row.case for row in ranked], cases, choice)
        copies.write_request(output, fold, choice, pairs)
        mine, scheme = share.take(pairs), plan.method.labels
        with on_cluster(cluster), console.bar("register", len(mine)) as step:
            outcomes = copies.make_copies(mine, output, scheme, jobs, lambda _: step())
        _report_copies(outcomes, output)
        if share.of > 1 and (left := copies.undone(pairs, output, scheme)):
            console.print_line(
                f"part {share}: {left} of {len(pairs)} pairs are still to do; the part that ends last writes the split"
            )
        else:
            outdated = copies.write_augmented_split(plan.run, output, known)
            for number, names in outdated.items():
                problem = (
                    f"{len(names)} copies of fold {number} are not in the split: their scans or labels were replaced"
                )
                console.print_error(f"{output}: {problem}. Call `kitseg augment --fold {number}` again.")
            _print_next_command(plan, data, masks, output)
    exit_if(bool(failed or outdated) or any(outcome.state == "failed" for outcome in outcomes))


def _show_ranking(ranked: Sequence[Ranked]) -> None:
    table = console.table("hard case", "kidney", "tumor", "mean Dice")
    for row in ranked:
        table.add_row(escape(row.case), *map(console.cell, (row.kidney, row.tumor, row.dice)))
    console.out.print(table)


def _print_next_command(plan: Plan, data: Sequence[Path], masks: Path | None, copies: Path) -> None:
    more = "".join(f" --data {quote(str(folder))}" for folder in [*data, copies])
    more += f" --masks {quote(str(masks))}" if masks else ""
    console.print_plain(
        f"To train with the new cases and the options of {plan.run.path}: kitseg train --method {plan.method.name} "
        f"--size {plan.config['size']['name']} --fold {plan.fold}{more} --split {quote(str(copies / 'splits.json'))} "
        f"--name {quote(f'{plan.run.path.name}-augmented')}"
    )


def _report_copies(outcomes: Sequence[Copied], folder: Path) -> None:
    for outcome in outcomes:
        if outcome.state == "failed":
            console.print_error(outcome.reason)
        elif outcome.state == "rejected":
            console.print_plain(f"{outcome.name}: rejected, {outcome.reason}")
    kept = [outcome.dice for outcome in outcomes if outcome.state == "kept"]
    new = sum(outcome.new for outcome in outcomes)
    console.print_plain(
        f"{len(kept)} of {len(outcomes)} pairs gave a new case in {folder}; {new} were registered in this call"
    )
    if kept:
        before, after = map(fmean, zip(*kept, strict=True))
        console.print_line(f"mean Dice of the kidneys: {before:.2f} before registration, {after:.2f} after")
