"""Finished cases of a verb that ends in one output: kept until that is written.

So a killed call goes on where it stood, and calls with ``--shard`` put their parts together: each works on those of its
cases that aren't done yet, and the one that finds all of them done writes the output.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Generic, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

from joblib import delayed

from kitseg import __version__
from kitseg.errors import KitsegError
from kitseg.runtime.console import print_line
from kitseg.runtime.files import read_json, write_json
from kitseg.runtime.outcomes import in_parallel
from kitseg.runtime.sharding import Share

SCHEMA = 1


class Result(Protocol):
    """What becomes of a case: a dataclass of plain values."""

    @property
    def case(self) -> str:
        """Its id."""

    @property
    def error(self) -> str:
        """Why there is no result; such a case is tried again."""


R = TypeVar("R", bound=Result)


@dataclass(frozen=True)
class Work(Generic[R]):
    """A case's work. files: what it reads, None for one that isn't there; makes: a file that it writes."""

    case: str
    files: tuple[Path | None, ...]
    do: partial[R]
    makes: Path | None = None

    @property
    def key(self) -> str:
        """Changes with the work, its arguments, kitseg's version, and the size or the time of a file that it reads."""
        stamps = [(str(path), *_stamp(path)) for path in self.files if path]
        told = (__version__, self.do.func.__qualname__, self.do.args, stamps)
        return hashlib.sha256(repr(told).encode()).hexdigest()


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
        """A case's result, where it was kept and is still right."""
        if work.makes and not work.makes.exists():
            return None
        try:
            found = read_json(self._path(work), SCHEMA)
            return _restored(self.kind, found["result"]) if found["key"] == work.key else None
        except (KitsegError, KeyError, TypeError, AttributeError):
            return None

    def do(self, work: Work[R]) -> R:
        """A case's result, kept or new."""
        if found := self.find(work):
            return found
        key = work.key
        result = work.do()
        if not result.error:
            write_json(self._path(work), SCHEMA, {"key": key, "result": asdict(result)})  # type: ignore[call-overload]
        return result

    def clear(self) -> None:
        """Forget everything at once, for whoever looks at the same time."""
        gone = self.folder.with_name(f"{self.folder.name}.gone")
        shutil.rmtree(gone, ignore_errors=True)
        with suppress(OSError):
            self.folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _path(self, work: Work[R]) -> Path:
        return self.folder / f"{work.case}.json"


def results(
    works: Sequence[Work[R]], kept: ResultCache[R] | None, share: Share, jobs: int, on_done: Callable[[R], None]
) -> list[R] | None:
    """Do a share of the work, ``jobs`` at a time; the results of all of them in their order.

    None where this share isn't the one that ends the work; the reason is said. kept: None where there is no output.
    """
    mine, found = share.take(works), []
    for result in in_parallel((delayed(_do)(work, kept) for work in mine), jobs if len(mine) > 1 else 1):
        found.append(result)
        on_done(result)
    if share.of == 1 or kept is None:
        return found
    there = {work.case: kept.find(work) for work in works}
    undone = [case for case, result in there.items() if result is None]
    if not undone:
        return [result for result in there.values() if result]
    if any(result.case in undone for result in found if not result.error):
        print_line(f"part {share}: the output is being written by another part, which ended at the same time")
    elif mine:
        print_line(
            f"part {share}: {len(undone)} of {len(works)} cases are still to do; who ends last writes the output"
        )
    else:
        print_line(f"part {share} holds none of the {len(works)} cases")
    return None


def _do(work: Work[R], kept: ResultCache[R] | None) -> R:
    return kept.do(work) if kept else work.do()


def _stamp(path: Path) -> tuple[int, int]:
    """Size and time of a file, nothing where there is none."""
    try:
        state = path.stat()
    except OSError:
        return 0, 0
    return state.st_size, state.st_mtime_ns


def _restored(kind: Any, value: Any) -> Any:
    """What ``asdict`` and JSON made of a value of this kind, turned back: dataclasses, tuples, mappings."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return None if value is None else _restored(next(one for one in inner if one is not NoneType), value)
    if isinstance(kind, type) and is_dataclass(kind):
        kinds = get_type_hints(kind)
        return kind(**{field.name: _restored(kinds[field.name], value[field.name]) for field in fields(kind)})
    if origin is tuple:
        each = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        return tuple(_restored(one, part) for one, part in zip(each, value, strict=True))
    if isinstance(value, Mapping):
        return {key: _restored(inner[1], part) for key, part in value.items()}
    return value
