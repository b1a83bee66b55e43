"""A command's work case by case, here or in parallel, and the outcome of each case."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kitseg.errors import InputError, KitsegError, fault, format_error, is_of_machine
from kitseg.runtime.dask import cluster_results, connected
from kitseg.runtime.signals import raise_again
from kitseg.types import Case

if TYPE_CHECKING:
    from kitseg.measurement.flags import Quality

OnDone = Callable[["Outcome"], None]
C = TypeVar("C", str, Case)
T = TypeVar("T")
UNCHANGED = "unchanged"


@dataclass(frozen=True)
class Outcome:
    """The outcome of a case: its ``result``, such as the label map, or the ``error`` that there was, else empty.

    note: what is odd about it; volumes_ml: by class; quality: its flags; seconds: that it took; of_machine:
    see ``errors.is_of_machine``.
    """

    case: str
    error: str = ""
    note: str = ""
    result: Path | None = None
    volumes_ml: Mapping[str, float] | None = None
    quality: Quality | None = None
    seconds: float = 0.0
    of_machine: bool = False


def each(cases: Sequence[C], work: Callable[[C], Outcome], on_done: OnDone) -> list[Outcome]:
    """Do the work case by case; a case that fails doesn't stop the others."""
    outcomes = []
    for case in cases:
        begun = time.perf_counter()
        try:
            outcome = work(case)
        except Exception as error:  # the other cases continue, whatever the error
            raise_again()
            name = case.id if isinstance(case, Case) else case
            text = format_error(name, error)
            if isinstance(case, Case) and case.slices and not isinstance(error, KitsegError) and not fault(error):
                text = f"{name}: {type(error).__name__}"  # what was not expected may quote the patient in a DICOM file
            outcome = Outcome(name, error=text, of_machine=is_of_machine(error))
        outcomes.append(replace(outcome, seconds=time.perf_counter() - begun))
        on_done(outcomes[-1])
    return outcomes


def result_or_error(work: Callable[[Case], T], case: Case) -> T | str:
    """What the work makes of a case, or the error: one in a case doesn't stop the others.

    Raises:
        KitsegError: memory, disk or the system failed, which is not the fault of a case.
    """
    try:
        return work(case)
    except Exception as error:
        words = format_error(case.image.parent, error)
        if fault(error) or (error.__cause__ and fault(error.__cause__)):
            raise KitsegError(words) from None
        return words


def without_paths(name: str, error: Exception, paths: Sequence[Path], nameless: bool) -> str:
    """An error's text for a file that others may read: without these paths' folders.

    nameless: also without the name of the file that can't be used.
    """
    if isinstance(error, InputError) and nameless:
        return f"{name}: {error.problem}. {error.remedy}"
    text = format_error(name, error)
    for folder in sorted({parent for path in paths for parent in path.parents}, key=lambda p: -len(str(p))):
        if folder != folder.parent:
            text = text.replace(f"{folder}/", "")
    return text


def in_parallel(
    tasks: Iterable[Any], jobs: int, on_done: Callable[[Any], None] = lambda _: None, ordered: bool = True
) -> list[Any]:
    """The results of joblib's delayed tasks, done in ``jobs`` processes, or by the cluster of ``dask.on_cluster``.

    on_done: is called with each result; ordered: in the tasks' order, else as they are done.

    Raises:
        KitsegError: a worker process was killed, or the cluster failed.
    """
    from joblib import Parallel  # imported here: most commands start sooner without it
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    client, kind = connected(), "generator" if ordered else "generator_unordered"
    found = []
    try:
        running = cluster_results(client, tasks, ordered) if client else Parallel(n_jobs=jobs, return_as=kind)(tasks)
        for result in running:
            found.append(result)
            on_done(result)
    except TerminatedWorkerError as error:
        remedy = "The machine may be short of memory: call again with a smaller --jobs."
        raise KitsegError(f"a worker process was killed. {remedy}") from error
    return found
