"""Finished cases of a command that ends in one output: cached until that is written.

So a killed call resumes where it stopped, and calls with ``--shard`` join their parts: each works on those of its cases
that aren't done yet, and the one that finds all of them done writes the output.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from kitseg import __version__
from kitseg.errors import printable
from kitseg.runtime.console import print_line
from kitseg.runtime.files import short_name
from kitseg.runtime.provenance import FileFormat, InputFile, recipe
from kitseg.runtime.sharding import Share


@dataclass(frozen=True)
class Task:
    """A case to work on, with what is special to it."""

    case: str

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that it is read from, as far as they are there."""
        return ()

    @property
    def output(self) -> Path | None:
        """A file that is written beside the result."""
        return None


class Result(Protocol):
    """A case's result: a dataclass of plain values."""

    @property
    def case(self) -> str:
        """Its id."""

    @property
    def error(self) -> str:
        """The error, empty if there is none; a case with one is tried again."""


R = TypeVar("R", bound=Result)


@dataclass(frozen=True)
class _Cached(Generic[R]):
    recipe: str
    sources: dict[str, InputFile]
    result: R


@dataclass(frozen=True)
class ResultCache(Generic[R]):
    """Finished cases, a file each in a hidden folder.

    kind: the dataclass of a result; work: makes it from a ``Task``.
    """

    folder: Path
    kind: type[R]
    work: partial[R]

    @classmethod
    def beside(cls, output: Path, kind: type[R], work: partial[R]) -> ResultCache[R]:
        """The folder that belongs to an output file."""
        return cls(output.absolute().with_name(f".{output.name}.cases"), kind, work)

    def made(self, task: Task) -> dict[str, Any]:
        """What decides a result: the work, the task, kitseg's version, size and time of the files."""
        sources = {printable(str(path)): InputFile.of(path) for path in task.files if os.path.exists(path)}
        name, arguments = self.work.func.__qualname__, repr((task, self.work.keywords))
        return {"recipe": recipe(version=__version__, name=name, arguments=arguments), "sources": sources}

    def find(self, task: Task) -> R | None:
        """A case's cached result, if it is current."""
        if task.output and not task.output.exists():
            return None
        cached = self._format().find(self._path(task), self.made(task))
        return cached.result if cached else None

    def do(self, task: Task) -> R:
        """A case's result, cached or new."""
        if found := self.find(task):
            return found
        made, result = self.made(task), self.work(task)
        if not result.error:
            self._format().write(self._path(task), {**made, "result": result})
        return result

    def clear(self) -> None:
        """Remove everything at once, also for another process that reads it."""
        gone = self.folder.with_name(f"{self.folder.name}.gone")
        shutil.rmtree(gone, ignore_errors=True)
        with suppress(OSError):
            self.folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def join_parts(self, tasks: Sequence[Task], share: Share, found: Sequence[R]) -> list[R] | None:
        """The results of all cases in their order, after a share of them is done, whose results are ``found``.

        None where another part is the one to write the output, after a line about it.
        """
        cached = {task.case: self.find(task) for task in tasks}
        undone = [case for case, result in cached.items() if result is None]
        if not undone:
            return [result for result in cached.values() if result]
        if any(result.case in undone for result in found if not result.error):
            print_line(f"part {share}: another part, which ended at the same time, is writing the output")
        elif found:
            print_line(f"part {share}: {len(undone)} of {len(tasks)} cases are left; the last part writes the output")
        else:
            print_line(f"part {share} holds none of the {len(tasks)} cases")
        return None

    def _path(self, task: Task) -> Path:
        return self.folder / f"{short_name(task.case)}.json"

    def _format(self) -> FileFormat[_Cached[R]]:
        return FileFormat(_Cached[self.kind], 2)  # type: ignore[name-defined]  # a class known at run time only
