"""The application, and what its commands share: options, progress bars, exit codes."""

from __future__ import annotations

import atexit
import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.markup import escape

from kitseg import __version__
from kitseg.errors import KitsegError, UsageError, fault, format_error
from kitseg.runtime import console, launcher
from kitseg.runtime.sharding import WHOLE, Share
from kitseg.runtime.signals import interruptible

if TYPE_CHECKING:
    from kitseg.runtime.outcomes import Outcome
    from kitseg.runtime.resume import Result, ResultCache, Task
    from kitseg.runtime.workers import Verb
    from kitseg.types import Case

R = TypeVar("R", bound="Result")


def _current_name(option: str) -> str:
    """An option's name; those of kitseg 0.1 still work."""
    now = {"convention": "labels", "keep-identifiers": "identifiers", "inner-folds": "nested-folds"}.get(option, option)
    if now != option:
        console.print_plain(f"--{option} is now --{now}")
    return now


app = typer.Typer(
    name="kitseg",
    help="Segment kidneys, kidney tumors and cysts in CT. For research use only: not a medical device.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=True,
    context_settings={"token_normalize_func": _current_name},
)
COLOURS = {"green": "green", "amber": "yellow", "red": "red"}


def main() -> None:
    """Run the command line, and print errors in one line.

    Exit codes: 1 if something failed, 2 for invalid usage, 130 after Ctrl-C, 138 after SIGUSR1, 143 after SIGTERM.
    """
    console.accept_any_encoding()
    atexit.register(gc.freeze)  # otherwise garbage collection of PyTorch's modules at exit takes a second
    try:
        with interruptible():
            app()
    except SystemExit:
        if console.out.lost:
            _fail(KitsegError(format_error("standard output", console.out.lost)), 1)
        raise
    except UsageError as error:
        _fail(error, 2)
    except KitsegError as error:
        _fail(error, 1)
    except Exception as error:
        if fault(error) is None:
            raise
        _fail(KitsegError(format_error(getattr(error, "filename", None) or "kitseg", error)), 1)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if version:
        from kitseg.native.library import describe

        console.print_line(f"kitseg {__version__} (native kernels: {describe()})")
        raise typer.Exit


@contextmanager
def quick_imports() -> Iterator[None]:
    """Imports without garbage collection, which would look through PyTorch's modules again and again, for 0.3 s."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def take_share(shard: str | None) -> Share:
    """The part of the cases to work on; a line states which it is and why, where it isn't the whole."""
    share, launched = Share.asked(shard), launcher.described()
    if share.of > 1:
        why = f"{launched} in the environment, which launchers set; unset them for all cases" if launched else "--shard"
        console.print_plain(f"part {share} of the cases only ({why})")
    return share


def show_left_out(data: Sequence[Path], cases: Sequence[Case], masks: Path | None = None, labels: bool = True) -> None:
    """Print what the folders of these cases hold that is not used; see ``kits.left_out``."""
    from kitseg.volumes.kits import left_out
    from kitseg.volumes.zipped import unopened

    for line in [*left_out(data, cases, masks, labels), *unopened(data)]:
        console.print_line(f"[yellow]{escape(line)}[/]")


def show_doubts(case: str, doubts: Sequence[str]) -> None:
    """Print what the files of a case leave open about its place in the patient."""
    for doubt in doubts:
        console.print_line(f"[yellow]{escape(f'{case}: {doubt}')}[/]")


def preprocess_cases(
    cases: Sequence[Any], configuration: dict[str, Any], to: Path, jobs: int, part: str = ""
) -> set[str]:
    """Preprocess with a progress bar; returns the ids of the cases that failed. part: the shard, such as ``2/8``."""
    from kitseg import config
    from kitseg.commands import preprocess as steps

    method = config.method_of(configuration)
    grids = steps.method_grids(method)
    need = steps.disk_needed(cases, grids) / 1e9
    console.print_plain(f"{len(cases)} cases × {len(grids)} grids into {to}, {need:.2f} GB in all")
    with console.bar("preprocess", len(cases) * len(grids)) as step:
        outcomes = steps.preprocess(cases, grids, to, method.labels, jobs, lambda _: step(), part)
    for state in ("done", "unchanged"):
        if count := sum(outcome.state == state for outcome in outcomes):
            console.print_line(f"{count} {state}")
    failed = {outcome.case: outcome.error for outcome in outcomes if outcome.state == "failed"}
    for error in failed.values():
        console.print_error(error)
    return set(failed)


@contextmanager
def outcome_bar(title: str, count: int) -> Iterator[Callable[[Outcome], None]]:
    """A progress bar over cases; the function it gives moves it by one and prints the outcome of a case."""
    with console.bar(title, count, shown=Share.here().of == 1) as step:

        def done(outcome: Outcome) -> None:
            step()
            _print_outcome(outcome)

        yield done


def work(title: str, count: int, run: Callable[[Callable[[Outcome], None]], list[Outcome]]) -> None:
    """Run a command over cases with a progress bar and print the outcomes; exit code 1 if a case failed."""
    with outcome_bar(title, count) as done:
        outcomes = run(done)
    _conclude(outcomes)


def shared_work(title: str, cases: Sequence[Case], do: Verb, shard: str | None, ranks: int) -> None:
    """``work`` on the cases of a shard in ``ranks`` processes, or in those of a launcher."""
    from kitseg.runtime.workers import deal, on_ranks

    share, launched = take_share(shard), Share.here()
    mine = deal(cases, share)
    log = console.print_plain if launched.index == 0 else lambda text: None
    with outcome_bar(title, len(mine)) as done:
        if ranks == 1 or launched.of > 1:
            outcomes = do(mine, share, log, done)
        else:
            outcomes = on_ranks(do, mine, share.split(ranks), log, done)
    _conclude(outcomes)


def gather(
    title: str,
    tasks: Sequence[Task],
    work: partial[R] | ResultCache[R],
    jobs: int,
    cluster: str | None = None,
    share: Share = WHOLE,
) -> list[R]:
    """The results of all tasks, with a bar and a line for each error; exits if another part has the output.

    share: the part to work on, of a command that offers --shard.
    """
    from joblib import delayed

    from kitseg.runtime.dask import on_cluster
    from kitseg.runtime.outcomes import in_parallel

    cache = None if isinstance(work, partial) else work
    if share.of > 1 and cache is None:
        raise UsageError("the parts of the work meet in a file: name it with --json or --csv")
    mine, do = share.take(tasks), delayed(work if isinstance(work, partial) else work.do)
    with on_cluster(cluster), console.bar(title, len(mine)) as step:

        def done(result: R) -> None:
            step()
            if result.error:
                console.print_error(result.error)

        found: list[R] = in_parallel(map(do, mine), jobs if len(mine) > 1 else 1, done)
    joined = cache.join_parts(tasks, share, found) if cache and share.of > 1 else found
    if joined is None:
        raise typer.Exit(int(any(result.error for result in found)))
    return joined


def choose_ranks(gpus: int | None, processes: int, device: str) -> tuple[str, int]:
    """The device and the number of processes from the options; UsageError if they contradict each other."""
    if gpus and device == "cpu":
        raise UsageError("--gpus and --device cpu exclude each other")
    if gpus == 0 and device == "cuda":
        raise UsageError("--gpus 0 and --device cuda exclude each other")
    device = "cpu" if gpus == 0 else device
    if processes > 1 and device != "cpu":
        raise UsageError("--processes needs --device cpu. On GPUs, set the number of processes with --gpus")
    return "cuda" if gpus else device, gpus or processes


def cross_validate(run: Path, data: Sequence[Path], device: str, mirror: bool, masks: Path | None = None) -> None:
    """Predict and score the validation cases of a run's finished folds; exit code 1 if a case failed."""
    from kitseg.cli.score_tables import show_confidence, show_table
    from kitseg.commands import validate as steps
    from kitseg.commands.confidence import CONFIDENCE, read_confidence
    from kitseg.commands.evaluate import groups
    from kitseg.report.scores import group_table

    plan = steps.plan_validation(run, data, mirror, masks)
    count = sum(len(plan.cases[fold]) for fold in plan.asked)
    with outcome_bar("validate", count) as done:
        outcomes = steps.predict_folds(plan, device, done)
    folds = steps.folds_to_score(plan)
    with console.bar("score", len(folds)) as step:
        scores = steps.score_folds(plan, folds, step)
    show_table(group_table([asdict(group) for group in groups(scores, folds)]))
    for score in scores:
        if score.error:
            console.print_error(score.error)
    if (trained := len(set(folds.values()))) < len(plan.split.folds):
        console.print_line(f"{trained} of {len(plan.split.folds)} folds are trained and validated so far")
    console.print_line(
        "These cases were not trained on, but they selected the checkpoints: a test set gives a stricter estimate."
    )
    if (file := plan.run.validation(mirror) / CONFIDENCE).exists():
        show_confidence(read_confidence(file))
    console.print_plain(f"out-of-fold scores: {plan.run.scores(mirror)}")
    exit_if(any(outcome.error for outcome in outcomes) or any(score.error or score.missing for score in scores))


def _conclude(outcomes: Sequence[Outcome]) -> None:
    """Print how many cases are done, and at which levels; exit code 1 if one failed."""
    failed = sum(bool(outcome.error) for outcome in outcomes)
    levels = Counter(outcome.quality.level for outcome in outcomes if outcome.quality)
    marked = ", ".join(f"[{COLOURS[level]}]{levels[level]} {level}[/]" for level in COLOURS if level in levels)
    console.print_line(f"{len(outcomes) - failed} of {len(outcomes)} cases done" + (f": {marked}" if marked else ""))
    exit_if(failed > 0)


def _print_outcome(outcome: Outcome) -> None:
    if outcome.error:
        return console.print_error(outcome.error)
    found = outcome.volumes_ml or {}
    names = {"kidney": "kidney without lesions" if "cyst" in found else "kidney without tumor"}
    volumes = ", ".join(f"{names.get(name, name)} {ml:.1f} ml" for name, ml in found.items())
    facts = "; ".join(part for part in (volumes, outcome.note, f"{outcome.seconds:.1f} s") if part)
    console.print_line(f"[green]✓[/] {escape(f'{outcome.case}: {facts} → {outcome.result}')}")
    for flag in outcome.quality.flags if outcome.quality else ():
        console.print_line(f"  [{COLOURS[flag.level]}]{flag.level}[/] {escape(flag.reason)}")


def exit_if(failed: bool) -> None:
    """End with exit code 1 if something failed."""
    if failed:
        raise typer.Exit(1)


def _fail(error: KitsegError, code: int) -> None:
    console.print_error(str(error))
    sys.exit(code)
