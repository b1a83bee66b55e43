"""From scans to labels: ``infer``, ``ensemble``, ``postprocess``, and all of them at once as ``predict``."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kitseg import __version__, config, ensemble
from kitseg.config import Method, Source
from kitseg.errors import InputError, KitsegError, UsageError, in_words
from kitseg.files import read_json, write_json
from kitseg.labels import KIDNEY, TUMOR
from kitseg.pipeline.model import Model, open_model
from kitseg.postprocess.components import bounding_box
from kitseg.postprocess.prior import Prior
from kitseg.report.pictures import case_picture
from kitseg.runs import Run
from kitseg.screen import say
from kitseg.splits import held_out
from kitseg.types import Case, Probabilities, Volume
from kitseg.volumes.blocks import (
    block_cases,
    claim_manifest,
    read_block,
    read_manifest,
    scan_of,
    write_block,
)
from kitseg.volumes.check import looks_like_hu
from kitseg.volumes.kits import collect_scans
from kitseg.volumes.nifti import file_digest, knows_orientation, read_image, write_labels

SCHEMA = 1
EVERY_PRIOR = "all"

OnDone = Callable[["Outcome"], None]


@dataclass(frozen=True)
class Outcome:
    """What became of a case; ``error`` says why where there is no result."""

    case: str
    error: str = ""
    note: str = ""
    result: Path | None = None
    volumes_ml: Mapping[str, float] | None = None
    seconds: float = 0.0


def each(cases: Sequence[str], work: Callable[[str], Outcome], on_done: OnDone) -> list[Outcome]:
    """Do the work case by case; a case that fails doesn't stop the others."""
    outcomes = []
    for case in cases:
        begun = time.perf_counter()
        try:
            outcome = work(case)
        except Exception as error:  # whatever it is, the other cases go on
            outcome = Outcome(case, error=in_words(case, error))
        outcomes.append(replace(outcome, seconds=time.perf_counter() - begun))
        on_done(outcomes[-1])
    return outcomes


def infer(model: Model, stage: str | None, scans: Sequence[Case], to: Path, on_done: OnDone) -> list[Outcome]:
    """Probabilities of each scan into a folder: the model's checkpoints and folds averaged.

    ``stage`` is the ``stage[.head]`` whose own output is wanted; the method's output where it is None.
    """
    channels = output_channels(model.method, stage)
    claim_manifest(to, _manifest(model, stage, channels))
    by_id = {scan.id: scan for scan in scans}

    def work(case: str) -> Outcome:
        scan = read_image(by_id[case].image, case)
        probabilities = ensemble.mean((member, 1.0) for member in model.predict(scan, channels))
        write_block(to, probabilities, by_id[case].image, file_digest(by_id[case].image))
        return Outcome(case, note=_nothing(probabilities), result=to / f"{case}.npy")

    return each(list(by_id), work, on_done)


def average(folders: Sequence[Path], weights: Sequence[float], to: Path, on_done: OnDone) -> list[Outcome]:
    """The weighted mean of folders of probabilities, case by case.

    Raises:
        UsageError: the folders hold different cases or channels, or the weights don't fit.
    """
    if len(weights) != len(folders) or min(weights) < 0 or sum(weights) <= 0:
        raise UsageError(f"{len(folders)} folders need as many weights that aren't negative, not {list(weights)}")
    if to.resolve() in [folder.resolve() for folder in folders]:
        raise UsageError(f"{to} is one of the folders to average; choose another one for the mean")
    cases = block_cases(folders[0])
    for folder in folders[1:]:
        if odd := sorted(set(cases) ^ set(block_cases(folder))):
            raise UsageError(f"{folders[0]} and {folder} don't hold the same cases: {', '.join(odd)}")
    manifests = [read_manifest(folder) for folder in folders]
    channels = {tuple(manifest["channels"]) for manifest in manifests}
    mixed = len(channels) > 1
    if mixed and not channels <= {ensemble.EXCLUSIVE, ensemble.NESTED}:
        raise UsageError("the folders hold different channels: " + ", ".join(str(m["channels"]) for m in manifests))
    members = [
        {"folder": str(f), "weight": w, "model": m["model"]}
        for f, w, m in zip(folders, weights, manifests, strict=True)
    ]
    kind = {"channels": list(ensemble.EXCLUSIVE)} if mixed else {}
    claim_manifest(to, {**manifests[0], **kind, "members": members})

    def work(case: str) -> Outcome:
        scan, digest = scan_of(folders[0], case)
        if any(scan_of(folder, case)[1] != digest for folder in folders[1:]):
            raise KitsegError(f"{case}: the folders were inferred from different scans. Infer them again.")
        blocks = (read_block(folder, case) for folder in folders)
        alike = (ensemble.exclusive(block) if mixed else block for block in blocks)
        mean = ensemble.mean(zip(alike, weights, strict=True))
        write_block(to, mean, scan, digest)
        return Outcome(case, result=to / f"{case}.npy")

    return each(cases, work, on_done)


def postprocess(folder: Path, to: Path, on_done: OnDone, without: Sequence[str] = ()) -> list[Outcome]:
    """Labels from a folder of probabilities, cleaned as its manifest expects but for the priors ``without``.

    Raises:
        UsageError: a prior that isn't there.
    """
    steps = build_steps(read_manifest(folder)["postprocess"], without)

    def work(case: str) -> Outcome:
        path, _ = scan_of(folder, case)
        _spare(path, to / f"{case}.nii.gz")
        probabilities = read_block(folder, case)
        labels = clean(probabilities, read_image(path, case), steps)
        return _write_labels(to, case, labels, probabilities)

    return each(block_cases(folder), work, on_done)


def predict_scans(model: Model, scans: Sequence[Case], to: Path, on_done: OnDone) -> list[Outcome]:
    """Labels, figures and a picture for each scan: ``infer``, ``ensemble`` and ``postprocess`` without the files."""
    channels, steps = output_channels(model.method, None), build_steps(model.method.postprocess)
    origin = _origin(model)
    by_id = {scan.id: scan for scan in scans}
    for case, scan in by_id.items():
        _spare(scan.image, to / f"{case}.nii.gz")
        _spare_foreign(to / f"{case}.json")

    def work(case: str) -> Outcome:
        begun = time.perf_counter()
        scan = read_image(by_id[case].image, case)
        probabilities = ensemble.mean((member, 1.0) for member in model.predict(scan, channels))
        labels = clean(probabilities, scan, steps)
        written = _write_labels(to, case, labels, probabilities)
        outcome = replace(written, note="; ".join(filter(None, [written.note, *doubts(by_id[case].image, scan)])))
        facts = {
            "case": case,
            "scan": by_id[case].image.name,
            "volumes_ml": outcome.volumes_ml,
            "note": outcome.note,
            "seconds": round(time.perf_counter() - begun, 2),
            "model": origin,
            "versions": versions(),
        }
        write_json(to / f"{case}.json", SCHEMA, facts)
        case_picture(to / f"{case}.png", scan, labels, title=case)
        return outcome

    return each(list(by_id), work, on_done)


def predict(
    scans: Path | str | Sequence[Path | str],
    model: Path | str | None = None,
    output: Path | str = "predictions",
    device: str = "auto",
) -> list[Outcome]:
    """``kitseg predict`` from Python.

    Args:
        scans: NIfTI files or folders.
        model: a run or a fold; the only finished run under ``runs/`` where it is None.
        output: the folder for ``<id>.nii.gz``, ``<id>.json`` and ``<id>.png``.
        device: auto, cpu or cuda.

    Returns:
        One outcome a scan, with the label file, the volumes in ml, or the error in words.
    """
    many = [scans] if isinstance(scans, str | Path) else list(scans)
    opened = open_model(Path(model) if model else choose_run(Path("runs")).path, device)
    say(describe(opened))
    return predict_scans(opened, collect_scans([Path(scan) for scan in many]), Path(output), lambda _: None)


def describe(model: Model) -> str:
    """The model in a line, with a word where it learned from phantoms."""
    phantoms = "; it learned from phantoms, not from patients" if model_facts(model)["phantom"] else ""
    folds = ", ".join(map(str, model.folds))
    return f"model: {model.run.path} ({model.method.name}, fold {folds}) on {model.device}{phantoms}"


def choose_scans(paths: Sequence[Path], split: Path | None, fold: int | None) -> list[Case]:
    """The scans in files and folders, or those of them that a split holds out.

    Raises:
        UsageError: a held-out case that isn't there.
    """
    scans, wanted = collect_scans(paths), held_out(split, fold)
    if missing := sorted(set(wanted) - {scan.id for scan in scans}):
        raise UsageError(f"{', '.join(missing)} of {split} can't be found in {', '.join(map(str, paths))}")
    return [scan for scan in scans if not wanted or scan.id in wanted]


def choose_run(runs: Path) -> Run:
    """The only finished run that learned from patients' scans.

    Raises:
        UsageError: there is none, or there are several.
    """
    folders = (path for path in sorted(runs.glob("*")) if not re.search(r"\.old-\d+$", path.name))
    finished = [run for run in map(Run, folders) if run.config.exists() and _is_finished(run)]
    real = [run for run in finished if not model_facts(run)["phantom"]]
    if len(real) == 1:
        return real[0]
    if real:
        raise UsageError("several runs are finished; pick one with --model: " + ", ".join(str(r.path) for r in real))
    hint = (
        f" ({', '.join(str(run.path) for run in finished)} learned from phantoms: name it with --model)"
        if finished
        else ""
    )
    raise UsageError(f"{runs} holds no finished run{hint}; train one with `kitseg train`, or give --model")


def model_facts(model: Model | Run) -> dict[str, Any]:
    """What a run says of its training: whether it learned from phantoms, with which version."""
    run = model.run if isinstance(model, Model) else model
    info = run.read_info()
    return {"phantom": info["phantom"], "trained_with": info["kitseg"]}


def output_channels(method: Method, stage: str | None) -> dict[str, Source]:
    """The channels of a stage's head, or the method's own output."""
    if stage is None:
        return dict(method.outputs)
    spec, head = config.head_of(stage, method.stages)
    return {channel: Source(spec.name, head, channel) for channel in spec.channels}


def build_steps(specs: Mapping[str, Any], without: Sequence[str] = ()) -> list[Prior]:
    """The priors of a method in their order, but for those ``without``; one that is null is switched off.

    Raises:
        UsageError: a prior that isn't there, or priors without names.
    """
    if not isinstance(specs, Mapping):
        raise UsageError(f"postprocess is {specs!r}; it must name each prior, such as kidneys: {{_target_: ...}}")
    if unknown := [name for name in without if name not in {*specs, EVERY_PRIOR}]:
        there = ", ".join([*specs, EVERY_PRIOR])
        raise UsageError(f"--without {' '.join(unknown)}: there is no such prior; there are {there}")
    left = {} if EVERY_PRIOR in without else specs
    return [config.build(spec) for name, spec in left.items() if spec is not None and name not in without]


def clean(probabilities: Probabilities, scan: Volume, steps: Sequence[Prior]) -> NDArray[np.uint8]:
    """Labels (D, H, W) from probabilities, put through the priors in the box of what was found."""
    labels = np.zeros(scan.geometry.shape, np.uint8)
    masks = ensemble.to_masks(probabilities)
    found = bounding_box(masks.either)
    if found is None:
        return labels
    z, y, x = probabilities.box.start
    box, masks = found.moved((-z, -y, -x)), masks.crop(found)
    for step in steps:
        masks = step(masks, scan.array[box.slices], scan.geometry.spacing)
    labels[box.slices] = masks.labels()
    return labels


def versions() -> dict[str, str]:
    """What computed this."""
    return {
        "kitseg": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _origin(model: Model) -> dict[str, Any]:
    """Which model made a result."""
    return {"path": str(model.run.path), "folds": model.folds, "sha256": model.digest(), **model_facts(model)}


def _manifest(model: Model, stage: str | None, channels: Mapping[str, Source]) -> dict[str, Any]:
    return {
        "channels": list(channels),
        "method": model.method.name,
        "stage": stage,
        "model": _origin(model),
        # the priors look at the kidneys, so they can't judge an output without them
        "postprocess": model.method.postprocess if {"kidney", "foreground"} & set(channels) else {},
        "versions": versions(),
    }


def _write_labels(to: Path, case: str, labels: NDArray[np.uint8], probabilities: Probabilities) -> Outcome:
    path = to / f"{case}.nii.gz"
    write_labels(path, labels, probabilities.native)
    ml = probabilities.geometry.voxel_ml
    volumes = {
        name: round(int((labels == value).sum()) * ml, 3) for name, value in (("kidney", KIDNEY), ("tumor", TUMOR))
    }
    return Outcome(case, note=_nothing(probabilities), result=path, volumes_ml=volumes)


def doubts(path: Path, scan: Volume) -> list[str]:
    """What makes a scan's labels doubtful: values that don't look like HU, an orientation that the file doesn't say."""
    found = [] if looks_like_hu(scan.array) else ["its values don't look like Hounsfield units"]
    return found if knows_orientation(path) else [*found, "the file doesn't say its orientation"]


def _spare(scan: Path, target: Path) -> None:
    """Never write over the scan itself."""
    if target.resolve() == scan.resolve():
        raise UsageError(f"{target} is the scan itself; choose another folder with --output")


def _spare_foreign(path: Path) -> None:
    """Never write over a file that kitseg didn't make."""
    if path.exists():
        try:
            read_json(path, SCHEMA)["versions"]["kitseg"]
        except (InputError, KeyError, TypeError) as error:
            raise UsageError(f"{path} was not written by kitseg; choose another folder with --output") from error


def _nothing(probabilities: Probabilities) -> str:
    return "" if probabilities.array.size else "no kidney or tumor found: all background"


def _is_finished(run: Run) -> bool:
    try:
        last = list(config.method_of(config.read(run.config)).stages)[-1]
        return bool(run.folds(last)) and run.info.exists()
    except KitsegError:
        return False
