"""From scans to labels: ``infer``, ``ensemble`` and ``postprocess`` at once."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kitseg.errors import UsageError
from kitseg.files import write_json
from kitseg.pipeline.clean import build_steps, clean, save_labels, spare_scan
from kitseg.pipeline.machine import versions
from kitseg.pipeline.members import Ensemble, choose_run, open_ensemble
from kitseg.pipeline.outcome import OnDone, Outcome, each
from kitseg.report.pictures import case_picture
from kitseg.screen import say
from kitseg.splits import held_out
from kitseg.types import Case, Volume
from kitseg.volumes.check import looks_like_hu
from kitseg.volumes.kits import collect_scans
from kitseg.volumes.nifti import knows_orientation, read_image

SCHEMA = 2


def predict_scans(model: Ensemble, scans: Sequence[Case], to: Path, on_done: OnDone) -> list[Outcome]:
    """Labels, figures and a picture for each scan: ``infer``, ``ensemble`` and ``postprocess`` without the files."""
    steps, origin = build_steps(model.postprocess), model.origin()
    by_id = {scan.id: scan for scan in scans}
    for case, scan in by_id.items():
        spare_scan(scan.image, to / f"{case}.nii.gz")
        _spare_foreign(to / f"{case}.json")

    def work(case: str) -> Outcome:
        begun = time.perf_counter()
        scan = read_image(by_id[case].image, case)
        probabilities = model.probabilities(scan)
        labels = clean(probabilities, scan, steps)
        written = save_labels(to, case, labels, probabilities)
        outcome = replace(written, note="; ".join(filter(None, [written.note, *doubts(by_id[case].image, scan)])))
        facts = {
            "case": case,
            "scan": by_id[case].image.name,
            "volumes_ml": outcome.volumes_ml,
            "note": outcome.note,
            "seconds": round(time.perf_counter() - begun, 2),
            "models": origin,
            "versions": versions(),
        }
        write_json(to / f"{case}.json", SCHEMA, facts)
        case_picture(to / f"{case}.png", scan, labels, title=case)
        return outcome

    return each(list(by_id), work, on_done)


def predict(
    scans: Path | str | Sequence[Path | str],
    model: Path | str | Sequence[Path | str] | None = None,
    output: Path | str = "predictions",
    device: str = "auto",
) -> list[Outcome]:
    """``kitseg predict`` from Python.

    Args:
        scans: NIfTI files or folders.
        model: runs, folds or ensemble files; the only finished run under ``runs/`` where it is None.
        output: the folder for ``<id>.nii.gz``, ``<id>.json`` and ``<id>.png``.
        device: auto, cpu or cuda.

    Returns:
        One outcome a scan, with the label file, the volumes in ml, or the error in words.
    """
    opened = open_ensemble(_paths(model) if model else [choose_run(Path("runs")).path], device)
    say(opened.describe())
    return predict_scans(opened, collect_scans(_paths(scans)), Path(output), lambda _: None)


def _paths(given: Path | str | Sequence[Path | str]) -> list[Path]:
    return [Path(given)] if isinstance(given, str | Path) else [Path(path) for path in given]


def choose_scans(paths: Sequence[Path], split: Path | None, fold: int | None) -> list[Case]:
    """The scans in files and folders, or those of them that a split holds out.

    Raises:
        UsageError: a held-out case that isn't there.
    """
    scans, wanted = collect_scans(paths), held_out(split, fold)
    if missing := sorted(set(wanted) - {scan.id for scan in scans}):
        raise UsageError(f"{', '.join(missing)} of {split} can't be found in {', '.join(map(str, paths))}")
    return [scan for scan in scans if not wanted or scan.id in wanted]


def doubts(path: Path, scan: Volume) -> list[str]:
    """What makes a scan's labels doubtful: values that don't look like HU, an orientation that the file doesn't say."""
    found = [] if looks_like_hu(scan.array) else ["its values don't look like Hounsfield units"]
    return found if knows_orientation(path) else [*found, "the file doesn't say its orientation"]


def _spare_foreign(path: Path) -> None:
    """Never write over a file that kitseg didn't make."""
    if path.exists():
        try:
            json.loads(path.read_text(encoding="utf-8"))["versions"]["kitseg"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} was not written by kitseg; choose another folder with --output") from error
