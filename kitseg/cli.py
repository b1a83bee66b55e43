"""The command line. Heavy modules are imported by the command that needs them, so that ``--help`` answers at once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from kitseg import __version__, screen
from kitseg.errors import KitsegError, UsageError

if TYPE_CHECKING:
    from kitseg.pipeline.predict import Outcome
    from kitseg.pipeline.priors import Fit

app = typer.Typer(
    name="kitseg",
    help="Finds kidneys and kidney tumors in CT. Research use only: not a medical device.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=True,
)
PROBABILITIES, PREDICTIONS = Path("probabilities"), Path("predictions")

Data = Annotated[Path, typer.Argument(help="Folder of cases: case_00000/imaging.nii.gz, or flat .nii.gz files.")]
Method = Annotated[str, typer.Option(help="The method; `kitseg methods` lists them.")]
Size = Annotated[str, typer.Option(help="paper, small or tiny.")]
Set = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change any key of the configuration.")]


def _check_jobs(jobs: int) -> int:
    if jobs == 0:
        raise UsageError("--jobs 0: it takes 1 or more, or -1 for as many as there are cores")
    return jobs


Jobs = Annotated[int, typer.Option(callback=_check_jobs, help="Cases worked on at a time; -1: one a core.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Split = Annotated[Path | None, typer.Option(help="A split file: only its test cases, or a fold's with --fold.")]
Fold = Annotated[int | None, typer.Option(help="With --split: the validation cases of this fold.")]
Model = Annotated[Path | None, typer.Option(help="A run, or one fold of it.")]
Convention = Annotated[
    str, typer.Option(help="What label ids mean: kits19 (cysts are kidney) or kits23 (cysts are 3).")
]


def main() -> None:
    """Run the command line: errors in one line; exit code 1 where something failed, 2 where the call can't be meant."""
    try:
        app()
    except UsageError as error:
        _fail(error, 2)
    except KitsegError as error:
        _fail(error, 1)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if version:
        screen.say(f"kitseg {__version__}")
        raise typer.Exit


@app.command(epilog="Example: kitseg phantom data --cases 12 --seed 0")
def phantom(
    out: Annotated[Path, typer.Argument(help="Folder for the cases, in the KiTS layout.")] = Path("data"),
    cases: Annotated[int, typer.Option(min=1, help="How many cases.")] = 12,
    seed: Annotated[int, typer.Option(help="Same seed, same cases.")] = 0,
    matrix: Annotated[int, typer.Option(min=64, max=512, help="Pixels along rows and columns.")] = 512,
    jobs: Jobs = -1,
) -> None:
    """Make procedural contrast CT cases with labels, to learn and to test with."""
    from joblib import Parallel, delayed

    from kitseg.volumes.phantom import write_case

    tasks = (delayed(write_case)(out.absolute(), seed, index, matrix) for index in range(cases))
    with screen.bar("phantoms", cases) as step:
        for _ in Parallel(n_jobs=jobs, return_as="generator_unordered")(tasks):
            step()
    screen.say(f"{cases} phantoms in {out}")


@app.command(epilog="Example: kitseg download kits19 --to data --cases 0-9")
def download(
    dataset: Annotated[str, typer.Argument(help="kits19.")],
    to: Annotated[Path, typer.Option(help="Folder for the cases.")] = Path("data"),
    cases: Annotated[str, typer.Option(help="Which cases: 0-9, or 3,17,20-29; 210-299 have no labels.")] = "0-209",
) -> None:
    """Download the challenge's images and labels from their official places; goes on when called again."""
    from kitseg.volumes.download import download_kits19, parse_cases

    if dataset != "kits19":
        raise UsageError(f"there is no data set '{dataset}'; there is kits19")
    numbers = parse_cases(cases)
    with screen.bar("download", len(numbers)) as step:
        failures = download_kits19(to, numbers, lambda *_: step())
    for failure in failures:
        screen.complain(str(failure))
    screen.say(f"{len(numbers) - len(failures)} of {len(numbers)} cases in {to}; the data are CC BY-NC-SA 4.0")
    _exit(bool(failures))


@app.command(epilog="Example: kitseg check data --json check.json")
def check(
    data: Data = Path("data"),
    convention: Convention = "kits19",
    jobs: Jobs = -1,
    report: Annotated[Path | None, typer.Option("--json", help="Write the findings to this file.")] = None,
) -> None:
    """Look for what is wrong with each case: unreadable, other grid, odd labels, not HU, a second series."""
    from dataclasses import asdict

    from kitseg.files import write_json
    from kitseg.volumes.check import check_folder
    from kitseg.volumes.kits import list_cases

    _known_convention(convention)
    with screen.bar("check", len(list_cases(data))) as step:
        reports = check_folder(data, convention, jobs, lambda *_: step())
    table = screen.table("case", "shape", "spacing (mm)", "axes", "HU", "kidney (ml)", "tumor (ml)", "")
    for r in reports:
        state = "[green]ok[/]" if r.ok else "[red]" + escape("; ".join(r.problems)) + "[/]"
        cells = (r.shape, r.spacing, r.orientation, r.hu_range, r.kidney_ml, r.tumor_ml)
        table.add_row(r.id, *map(screen.cell, cells), state)
    screen.out.print(table)
    if report:
        write_json(report, 1, {"cases": [asdict(r) for r in reports]})
    bad = sum(not r.ok for r in reports)
    screen.say(f"{len(reports) - bad} of {len(reports)} cases are fine")
    _exit(bad > 0)


@app.command(epilog="Example: kitseg fit-priors --labels data --split splits.json --fold 0")
def fit_priors(
    labels: Annotated[Path, typer.Option(help="Folder of true label maps, KiTS layout or flat.")] = Path("data"),
    split: Annotated[Path | None, typer.Option(help="A split file: only its training cases, with --fold.")] = None,
    fold: Annotated[int | None, typer.Option(help="With --split: the training cases of this fold.")] = None,
    convention: Convention = "kits19",
    jobs: Jobs = -1,
    report: Annotated[Path | None, typer.Option("--json", help="Write the range and every tumor to this file.")] = None,
) -> None:
    """Measure the shape of true tumors, and how many of them each prior of post-processing would cost."""
    from kitseg.pipeline import priors

    _known_convention(convention)
    maps = priors.training_labels(labels, split, fold)
    with screen.bar("fit-priors", len(maps)) as step:

        def done(finding: priors.Finding) -> None:
            step()
            if finding.error:
                screen.complain(finding.error)

        fit = priors.fit_priors(maps, convention, jobs, done)
    if report:
        priors.write_fit(report, fit)
    _show_fit(fit)
    _exit(any(finding.error for finding in fit.findings))


@app.command(epilog="Example: kitseg preprocess data --method two-phase --jobs 4")
def preprocess(
    data: Data = Path("data"),
    to: Annotated[Path, typer.Option(help="Folder for the preprocessed cases.")] = Path("preprocessed"),
    method: Method = "two-phase",
    size: Size = "paper",
    jobs: Jobs = -1,
    set_: Set = [],  # noqa: B006
) -> None:
    """Resample every case onto the grids of a method; what is done and unchanged is skipped."""
    from kitseg import config
    from kitseg.volumes.kits import find_cases

    failed = _preprocess(find_cases(data), config.compose(method, size, set_), to, jobs)
    _exit(bool(failed))


@app.command(epilog="Example: kitseg train --method two-phase --size small --fold 0 --gpus 1")
def train(
    method: Method = "two-phase",
    size: Size = "paper",
    fold: Annotated[int, typer.Option(min=0, help="The outer fold.")] = 0,
    stage: Annotated[str | None, typer.Option(help="Train this stage only.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs per stage.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs on this machine, one rank each.")] = 0,
    device: Device = "auto",
    processes: Annotated[int, typer.Option(min=1, help="Ranks on the CPU, with --device cpu.")] = 1,
    workers: Annotated[int, typer.Option(min=0, help="Loader processes per rank.")] = 0,
    data: Annotated[Path, typer.Option(help="Folder of labelled cases.")] = Path("data"),
    store: Annotated[Path, typer.Option(help="Folder of preprocessed cases.")] = Path("preprocessed"),
    split: Annotated[Path, typer.Option(help="The split file; written where there is none.")] = Path("splits.json"),
    runs: Annotated[Path, typer.Option(help="Folder of runs.")] = Path("runs"),
    name: Annotated[str | None, typer.Option(help="The run's name; METHOD-SIZE by default.")] = None,
    jobs: Jobs = -1,
    restart: Annotated[bool, typer.Option("--restart", help="Move an earlier training aside and begin again.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
    set_: Set = [],  # noqa: B006
    only: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Train a method's stages in order; the same command goes on where an earlier one stopped."""
    from kitseg import config
    from kitseg.pipeline import train as training
    from kitseg.pipeline.machine import Machine, rank
    from kitseg.pipeline.plan import Start, Unit
    from kitseg.pipeline.preprocess import labelled_cases
    from kitseg.runs import Run

    if gpus and device == "cpu":
        raise UsageError("--gpus and --device cpu exclude each other")
    if processes > 1 and device != "cpu":
        raise UsageError("--processes is for --device cpu; on GPUs the ranks are --gpus")
    overrides = [*set_, *([f"size.epochs={epochs}"] if epochs else []), *([f"seed={seed}"] if seed is not None else [])]
    configuration = config.compose(method, size, overrides)
    machine = Machine("cuda" if gpus else device, gpus or processes, workers)
    run = Run(runs / (name or f"{method}-{size}"))
    repeat = _repeat(locals())
    begin = Start(configuration, run, fold, split, store, machine, repeat)
    if only:
        return training.fit_unit(begin.plan(), Unit.parse(only))
    if rank() > 0:
        return training.train(begin.wait(), stage, screen.say)
    where, cases = machine.describe(), labelled_cases(data)
    if dry_run:
        return _show_plan(begin.rehearse([case.id for case in cases]), cases, stage, where)
    if restart and (old := begin.restart(stage)):
        screen.say(f"the old training is now {old}")
    failed = _preprocess(cases, configuration, store, jobs)
    good = [case for case in cases if case.id not in failed]
    if not good:
        raise KitsegError(f"{data}: no case could be preprocessed; see above")
    plan = begin.claim([case.id for case in good])
    _show_plan(plan, good, stage, where)
    training.train(plan, stage, screen.say)
    screen.say(f"trained: {plan.run.path}")
    _exit(bool(failed))


@app.command(epilog="Example: kitseg infer --run runs/two-phase-small --stage fine.1 --data data -o probabilities")
def infer(
    run: Annotated[Path | None, typer.Option(help="A run (its folds averaged) or one fold of it.")] = None,
    data: Annotated[Path, typer.Option(help="Scans: a file, a folder of cases or of files.")] = Path("data"),
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the probabilities.")] = PROBABILITIES,
    stage: Annotated[str | None, typer.Option(help="A stage's own output, such as coarse or fine.1.")] = None,
    split: Split = None,
    fold: Fold = None,
    device: Device = "auto",
) -> None:
    """Probabilities of each scan: a run's checkpoints averaged, on the scan's own grid."""
    from kitseg.pipeline import predict as steps
    from kitseg.pipeline.model import open_model

    scans = steps.choose_scans([data], split, fold)
    model = open_model(run or steps.choose_run(Path("runs")).path, device, stage.partition(".")[0] if stage else None)
    screen.say(steps.describe(model))
    _work("infer", len(scans), lambda done: steps.infer(model, stage, scans, output, done))


@app.command(epilog="Example: kitseg ensemble probabilities/a probabilities/b -o probabilities/mean --weights 2,1")
def ensemble(
    folders: Annotated[list[Path], typer.Argument(help="Folders of probabilities.")] = [PROBABILITIES],  # noqa: B006
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for their mean.")] = Path("ensemble"),
    weights: Annotated[str | None, typer.Option(help="One number a folder, comma-separated.")] = None,
) -> None:
    """The mean of folders of probabilities; post-processing will be the first folder's."""
    from kitseg.pipeline import predict as steps
    from kitseg.volumes.blocks import block_cases

    shares = _numbers(weights) if weights else [1.0] * len(folders)
    count = len(block_cases(folders[0]))
    _work("ensemble", count, lambda done: steps.average(folders, shares, output, done))


@app.command(epilog="Example: kitseg postprocess ensemble -o predictions")
def postprocess(
    folder: Annotated[Path, typer.Argument(help="Folder of probabilities.")] = Path("ensemble"),
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the labels.")] = PREDICTIONS,
    without: Annotated[list[str], typer.Option(metavar="NAME", help="Leave out this prior; all: every one.")] = [],  # noqa: B006
) -> None:
    """Labels from probabilities, cleaned as the method asks."""
    from kitseg.pipeline import predict as steps
    from kitseg.volumes.blocks import block_cases

    _work("postprocess", len(block_cases(folder)), lambda done: steps.postprocess(folder, output, done, without))


@app.command(epilog="Example: kitseg predict case_00210.nii.gz --model runs/two-phase-paper")
def predict(
    scans: Annotated[list[Path], typer.Argument(help="NIfTI files, case folders, or folders of them.")] = [  # noqa: B006
        Path("data")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for labels and pictures.")] = PREDICTIONS,
    model: Model = None,
    split: Split = None,
    fold: Fold = None,
    device: Device = "auto",
) -> None:
    """Kidney and tumor labels for scans, on each scan's own grid."""
    from kitseg.pipeline import predict as steps
    from kitseg.pipeline.model import open_model

    cases = steps.choose_scans(scans, split, fold)
    opened = open_model(model or steps.choose_run(Path("runs")).path, device)
    screen.say(steps.describe(opened))
    _work("predict", len(cases), lambda done: steps.predict_scans(opened, cases, output, done))


@app.command(epilog="Example: kitseg evaluate predictions data --json scores.json")
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="Folder of label maps to score.")] = PREDICTIONS,
    references: Annotated[Path, typer.Argument(help="Folder of reference label maps.")] = Path("data"),
    convention: Convention = "kits19",
    cases: Annotated[str | None, typer.Option(help="Cases that must be there: 210-299; missing is background.")] = None,
    split: Split = None,
    fold: Fold = None,
    report: Annotated[Path | None, typer.Option("--json", help="Write the scores to this file.")] = None,
) -> None:
    """KiTS19 scoring: kidney (with tumor) and tumor Dice per case and on average."""
    from kitseg.pipeline import evaluate as scoring

    _known_convention(convention)
    required = scoring.required_cases(cases, split, fold)
    scores = scoring.evaluate(predictions, references, convention, required)
    table = screen.table("case", "kidney", "tumor", "")
    for score in scores:
        note = "missing: counts as background" if score.missing else escape(score.error)
        dice = (screen.cell(score.dice.get(name)) for name in ("kidney", "tumor"))
        table.add_row(score.case, *dice, f"[red]{note}[/]")
    mean = scoring.mean_dice(scores)
    table.add_section()
    table.add_row("mean", *(screen.cell(mean.get(name)) for name in ("kidney", "tumor")), "")
    screen.out.print(table)
    if report:
        scoring.write_scores(report, scores, convention)
    _exit(any(score.missing or score.error for score in scores))


@app.command(epilog="Example: kitseg methods")
def methods() -> None:
    """What there is: each method's stages, paper and published Dice."""
    from kitseg import config

    table = screen.table("method", "stages", "paper", "published Dice")
    for name in config.names("method"):
        method = config.method_of(config.compose(name, "paper"))
        dice = ", ".join(f"{key} {value}" for key, value in method.published.items())
        table.add_row(name, " → ".join(method.stages), method.paper, dice)
    screen.out.print(table)


@app.command(epilog="Example: kitseg demo")
def demo(
    out: Annotated[Path | None, typer.Argument(help="Folder for all it makes: demo, or demo-quick.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Smallest possible: does the installation work?")] = False,
) -> None:
    """The whole tool on phantoms, in minutes: every command it stands for is printed."""
    from kitseg.pipeline.demo import run_demo

    run_demo(out or Path("demo-quick" if quick else "demo"), quick, screen.say)


def _preprocess(cases: Sequence[Any], configuration: dict[str, Any], to: Path, jobs: int) -> set[str]:
    """Preprocess with a bar; the ids of the cases that failed."""
    from kitseg import config
    from kitseg.pipeline import preprocess as work

    grids = work.method_grids(config.method_of(configuration))
    need = work.disk_needed(cases, grids) / 1e9
    screen.say(f"{len(cases)} cases × {len(grids)} grids into {to}, {need:.2f} GB in all")
    with screen.bar("preprocess", len(cases) * len(grids)) as step:
        outcomes = work.preprocess(cases, grids, to, configuration["convention"], jobs, lambda _: step())
    for state in ("done", "unchanged"):
        if count := sum(outcome.state == state for outcome in outcomes):
            screen.say(f"{count} {state}")
    failed = {outcome.case: outcome.error for outcome in outcomes if outcome.state == "failed"}
    for error in failed.values():
        screen.complain(error)
    return set(failed)


def _work(title: str, count: int, run: Callable[[Callable[[Outcome], None]], list[Outcome]]) -> None:
    """Run a verb over cases with a bar; say what failed; exit code 1 where something did."""
    with screen.bar(title, count) as step:

        def done(outcome: Outcome) -> None:
            step()
            _say_outcome(outcome)

        outcomes = run(done)
    failed = sum(bool(outcome.error) for outcome in outcomes)
    screen.say(f"{count - failed} of {count} cases done")
    _exit(failed > 0)


def _say_outcome(outcome: Outcome) -> None:
    if outcome.error:
        return screen.complain(outcome.error)
    volumes = ", ".join(f"{name} {ml:.1f} ml" for name, ml in (outcome.volumes_ml or {}).items())
    facts = "; ".join(part for part in (volumes, outcome.note, f"{outcome.seconds:.1f} s") if part)
    screen.say(f"[green]✓[/] {outcome.case}: {facts} → {outcome.result}")


def _repeat(given: dict[str, Any]) -> tuple[str, ...]:
    """The options of `kitseg train` that another rank of the same training needs."""
    names = ("method", "size", "fold", "device", "processes", "gpus", "workers", "store", "split", "runs", "name")
    options = [f"--{name}={given[name]}" for name in names if given[name] is not None]
    return (*options, *(f"--set={override}" for override in given["overrides"]))


def _show_plan(plan: Any, cases: Sequence[Any], stage: str | None, where: str) -> None:
    """The trainings that a plan holds, with their size and an estimate of their time."""
    from kitseg.pipeline.estimate import estimates

    columns = ("cases", "batch", "patch", "epochs × steps", "parameters", "memory", "time")
    table = screen.table("training", "grid", *columns)
    for row in estimates(plan, cases[0], stage):
        table.add_row(*row)
    screen.say(f"{plan.method.name}, fold {plan.fold} of {len(plan.split.folds)}, on {where}")
    screen.out.print(table)


def _show_fit(fit: Fit) -> None:
    """What the priors cost, and the line that uses the fitted range."""
    table = screen.table("prior", "settings", "tumors lost", "tumor lost (ml)", "cases without any tumor left")
    for cost in fit.costs:
        settings = ", ".join(f"{key} {value:g}" for key, value in cost.setting.items())
        tumors, cases = f"{cost.lost_tumors} of {cost.tumors}", f"{cost.lost_cases} of {cost.cases}"
        table.add_row(cost.prior, settings, tumors, f"{cost.lost_ml:.1f} of {cost.ml:.1f}", cases)
    screen.out.print(table)
    failed = sum(bool(finding.error) for finding in fit.findings)
    screen.say(f"{len(fit.findings) - failed} of {len(fit.findings)} cases read")
    if not any(cost.prior == "dark" for cost in fit.costs):
        screen.say("dark: not tried, since no CT (imaging.nii.gz) lies beside the labels")
    screen.say(f"λ1/λ2 of {fit.tumors} tumors of 10 voxels or more, 5-95 %: {fit.low:.3f}-{fit.high:.3f}")
    screen.say(f"--set postprocess.shape.low={fit.low:.3f} --set postprocess.shape.high={fit.high:.3f}")


def _known_convention(convention: str) -> None:
    from kitseg.labels import CONVENTIONS

    if convention not in CONVENTIONS:
        raise UsageError(f"there is no label convention '{convention}'; there are {', '.join(CONVENTIONS)}")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--weights {text}: one number a folder, such as 2,1") from error


def _exit(failed: bool) -> None:
    if failed:
        raise typer.Exit(1)


def _fail(error: KitsegError, code: int) -> None:
    screen.complain(str(error))
    sys.exit(code)
