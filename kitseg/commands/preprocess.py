"""Resample cases onto the grids that a method needs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from joblib import delayed

from kitseg.config import Method
from kitseg.errors import KitsegError, format_error
from kitseg.labels import Scheme
from kitseg.measurement.phase import contrast
from kitseg.runtime.locks import folder_lock
from kitseg.runtime.outcomes import in_parallel
from kitseg.types import Case, Grid
from kitseg.volumes.store import CaseFiles, is_fresh, store_bytes, store_case

HOURS = 4 * 3600.0  # seconds that another fold, or another call, may take to preprocess


@dataclass(frozen=True)
class Stored:
    """The state of a case on one grid: ``done``, ``unchanged`` or, with ``error`` set, ``failed``."""

    case: str
    grid: str
    state: str
    error: str = ""


def method_grids(method: Method) -> list[Grid]:
    """The grids of a method's stages, each once."""
    return list({str(stage.grid): stage.grid for stage in method.stages.values()}.values())


def preprocess(
    cases: Sequence[Case],
    grids: Sequence[Grid],
    to: Path,
    scheme: Scheme,
    jobs: int,
    on_done: Callable[[Stored], None],
    part: str = "",
) -> list[Stored]:
    """Store every case on every grid, in parallel; a broken case doesn't stop the others.

    The folder is locked only if some case isn't stored yet; what another process, such as that of another fold, stores
    meanwhile is kept. part: of the work, such as ``2/8``. Raises KitsegError: the disk is too small, a worker was
    killed, or another process writes there for hours.
    """
    to = to.absolute()  # worker processes may have another working folder
    outcomes, stale = list[Stored](), list[Case]()

    def done(stored: Sequence[Stored]) -> None:
        outcomes.extend(stored)
        for outcome in stored:
            on_done(outcome)

    for case in cases:
        files = CaseFiles(case, scheme, contrast)
        if all(is_fresh(files, to / str(grid) / case.id, grid) for grid in grids):
            done([Stored(case.id, str(grid), "unchanged") for grid in grids])
        else:
            stale.append(case)
    if stale:
        tasks = (delayed(_store)(case, grids, to, scheme) for case in stale)
        with folder_lock(to, "preprocessed cases", part, wait=HOURS):
            _check_disk(stale, grids, to)
            in_parallel(tasks, jobs, done, ordered=False)
    return sorted(outcomes, key=lambda o: (o.case, o.grid))


def disk_needed(cases: Iterable[Case], grids: Sequence[Grid]) -> int:
    """Bytes that the stores of all cases take, from their headers; unreadable cases count nothing."""
    total = 0
    for case in cases:
        try:
            total += sum(store_bytes(case, grid) for grid in grids)
        except KitsegError:
            continue
    return total


def _check_disk(cases: Sequence[Case], grids: Sequence[Grid], to: Path) -> None:
    there = next(folder for folder in (to.absolute(), *to.absolute().parents) if folder.exists())
    missing = [case for case in cases if not all((to / str(g) / case.id / "meta.json").exists() for g in grids)]
    needed, free = disk_needed(missing, grids), shutil.disk_usage(there).free
    if needed > free:
        raise KitsegError(f"{to}: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free. Free some space.")


def _store(case: Case, grids: Sequence[Grid], to: Path, scheme: Scheme) -> list[Stored]:
    """A case on every grid, its files read once."""
    files, outcomes = CaseFiles(case, scheme, contrast), []
    for grid in grids:
        try:
            state = "done" if store_case(files, to / str(grid) / case.id, grid) else "unchanged"
            outcomes.append(Stored(case.id, str(grid), state))
        except Exception as error:  # the other cases continue, whatever the error
            outcomes.append(Stored(case.id, str(grid), "failed", format_error(case.image, error)))
    return outcomes
