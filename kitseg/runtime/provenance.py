"""Typed JSON files, and whether outputs are still current by the record beside them."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np

from kitseg.errors import InputError, KitsegError, fault, format_error
from kitseg.runtime.files import check_regular, file_digest, identity, read_errors, write_json

AGAIN = "Make it again with the command that wrote it."
LIMIT = 2**28  # bytes: a larger file is not one of kitseg's

T = TypeVar("T")


@dataclass(frozen=True)
class _Header:
    schema: int


@dataclass(frozen=True)
class FileFormat(Generic[T]):
    """A JSON file format.

    kind: a type whose fields are checked (a dataclass, a TypedDict), while other keys of the file are ignored; schema:
    the number in its key ``schema``, None for files without one; remedy: what to do about a file that can't be used;
    largest: bytes.
    """

    kind: type[T]
    schema: int | None
    remedy: str = AGAIN
    largest: int = LIMIT

    def read(self, path: Path) -> T:
        """Read a file; InputError if it is missing, damaged, of another schema, or a field is of another type."""
        try:
            if check_regular(path) > self.largest:
                raise ValueError(f"larger than {self.largest >> 20} MiB")
            return self.decode(path.read_bytes())
        except (OSError, ValueError, RecursionError, msgspec.MsgspecError) as error:
            raise unreadable(path, error, self.remedy) from error

    def decode(self, data: bytes) -> T:
        """The content of a file.

        Raises:
            ValueError, RecursionError, msgspec.MsgspecError: damaged, of another schema, or a field of another type.
        """
        if self.schema is not None and (found := msgspec.json.decode(data, type=_Header).schema) != self.schema:
            newer = "; update kitseg" if found > self.schema else ""
            raise ValueError(f"schema {found}, this version of kitseg reads {self.schema}{newer}")
        return msgspec.json.decode(data, type=self.kind, dec_hook=decode)

    def write(self, path: Path, content: T | Mapping[str, Any]) -> None:
        """Write a file: an instance of ``kind``, or what it holds as a mapping."""
        write_json(path, self.schema, content if isinstance(content, Mapping) else vars(content))

    def find(
        self, path: Path, made: Mapping[str, Any], outputs: Callable[[T], Mapping[Path, str]] = lambda _: {}
    ) -> T | None:
        """A record, if its outputs are current: made like this, and still as they were written.

        Args:
            path: of the record.
            made: what decides the outputs' content (settings, hashes, ``InputFile`` files), by the record's attributes.
            outputs: the hash of each output file, from the record.

        Returns:
            None where the record or an output is missing, damaged, or made from anything else.
        """
        try:
            record = self.read(path)
            current = all(_agree(getattr(record, name), value) for name, value in made.items())
            return record if current and all(file_digest(p) == d for p, d in outputs(record).items()) else None
        except InputError:
            return None


@dataclass(frozen=True)
class InputFile:
    """A file that something was made from: its size in bytes, its time of change in ns, its hash if that is known."""

    size: int = 0
    mtime: int = 0
    sha256: str | None = None

    @classmethod
    def of(cls, path: Path, digest: bool = False) -> InputFile:
        """A file as it is now; InputError if it can't be read."""
        with read_errors(path):
            state = path.stat()
        return cls(state.st_size, state.st_mtime_ns, file_digest(path) if digest else None)

    def is_same(self, other: InputFile) -> bool:
        """Whether size and time, or else the hashes, agree."""
        if (self.size, self.mtime) == (other.size, other.mtime):
            return True
        return self.sha256 is not None and self.sha256 == other.sha256


def unreadable(path: Path, error: Exception, remedy: str) -> KitsegError:
    """An error of reading a file that kitseg wrote: an InputError, or a KitsegError where the machine failed."""
    missing = isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ENAMETOOLONG)
    if fault(error) and not missing:
        return KitsegError(format_error(path, error))
    return InputError(path, "there is no such file" if missing else f"can't be read ({_line(error)})", remedy)


def recipe(**parts: Any) -> str:
    """A hash of everything that decides an output, as plain values; of a model its own hash counts, not its path."""
    return hashlib.sha256(identity(parts).encode()).hexdigest()


def _agree(recorded: Any, wanted: Any) -> bool:
    if isinstance(wanted, InputFile):
        return isinstance(recorded, InputFile) and recorded.is_same(wanted)
    if isinstance(wanted, dict) and isinstance(recorded, dict):
        return recorded.keys() == wanted.keys() and all(_agree(recorded[key], wanted[key]) for key in wanted)
    return bool(recorded == wanted)


def decode(kind: Any, value: Any) -> Any:
    """A path, or an affine, the only array in kitseg's files, from plain values."""
    if kind is Path:
        return Path(value)
    if (matrix := np.array(value, np.float64)).shape != (4, 4):
        raise ValueError("an affine has 4 x 4 numbers")
    return matrix


def _line(error: Exception) -> str:
    return " ".join((getattr(error, "strerror", None) or str(error)).split())
