"""Finished cases of a command that ends in one output: cached until that is written.

So a killed call resumes where it stopped, and calls with ``--shard`` join their parts: each works on those of its cases
that aren't done yet, and the one that finds all of them done writes the output.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from joblib import delayed

from kitseg import __version__
from kitseg.runtime.console import print_line
from kitseg.runtime.provenance import FileFormat, Source, recipe
from kitseg.runtime.sharding import Share


class Result(Protocol):
    """A case's result: a dataclass of plain values."""

    @property
    def case(self) -> str:
        """Its id."""

    @property
    def error(self) -> str:
        """Why there is no result; such a case is tried again."""


R = TypeVar("R", bound=Result)


@dataclass(frozen=True)
class Work(Generic[R]):
    """A case's work. files: its inputs, None for one that isn't there; makes: a file that it writes."""

    case: str
    files: tuple[Path | None, ...]
    do: partial[R]
    makes: Path | None = None

    @property
    def made(self) -> dict[str, Any]:
        """What decides the result: the work and its arguments, kitseg's version, size and time of the input files."""
        sources = {str(path): Source.of(path) if path.exists() else Source() for path in self.files if path}
        work = recipe(version=__version__, name=self.do.func.__qualname__, arguments=repr(self.do.args))
        return {"recipe": work, "sources": sources}


@dataclass(frozen=True)
class _Cached(Generic[R]):
    recipe: str
    sources: dict[str, Source]
    result: R


@dataclass(frozen=True)
class ResultCache(Generic[R]):
    """Finished cases, a file each in a hidden folder. kind: the dataclass of a result."""

    folder: Path
    kind: type[R]

    @classmethod
    def beside(cls, output: Path, kind: type[R]) -> ResultCache[R]:
        """The folder that belongs to an output file."""
        return cls(output.absolute().with_name(f".{output.name}.cases"), kind)

    def find(self, work: Work[R]) -> R | None:
        """A case's cached result, if it is current."""
        if work.makes and not work.makes.exists():
            return None
        cached = self._format().find(self._path(work), work.made)
        return cached.result if cached else None

    def do(self, work: Work[R]) -> R:
        """A case's result, cached or new."""
        if found := self.find(work):
            return found
        made, result = work.made, work.do()
        if not result.error:
            self._format().write(self._path(work), {**made, "result": result})
        return result

    def clear(self) -> None:
        """Remove everything at once, also for another process that reads it."""
        gone = self.folder.with_name(f"{self.folder.name}.gone")
        shutil.rmtree(gone, ignore_errors=True)
        with suppress(OSError):
            self.folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _path(self, work: Work[R]) -> Path:
        return self.folder / f"{work.case}.json"

    def _format(self) -> FileFormat[_Cached[R]]:
        return FileFormat(_Cached[self.kind], 2)  # type: ignore[name-defined]  # a class known at run time only


def tasks(works: Iterable[Work[R]], cache: ResultCache[R] | None) -> list[Any]:
    """Delayed tasks for ``in_parallel``, each with a case's result."""
    return [delayed(cache.do)(work) if cache else delayed(work.do)() for work in works]


def join_parts(works: Sequence[Work[R]], cache: ResultCache[R], share: Share, found: Sequence[R]) -> list[R] | None:
    """The results of all cases in their order, after a share of them is done, whose results are ``found``.

    None where another part is the one to write the output, after a line about it.
    """
    cached = {work.case: cache.find(work) for work in works}
    undone = [case for case, result in cached.items() if result is None]
    if not undone:
        return [result for result in cached.values() if result]
    if any(result.case in undone for result in found if not result.error):
        print_line(f"part {share}: another part, which ended at the same time, is writing the output")
    elif found:
        print_line(f"part {share}: {len(undone)} of {len(works)} cases are left; the last part writes the output")
    else:
        print_line(f"part {share} holds none of the {len(works)} cases")
    return None
