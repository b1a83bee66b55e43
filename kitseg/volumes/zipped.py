"""Scans in a zip file: unpacked into a temporary folder, after checks that a hostile archive doesn't pass."""

from __future__ import annotations

import io
import os
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath

from kitseg.errors import InputError
from kitseg.runtime.files import read_errors
from kitseg.volumes.names import SUFFIXES, shorten

MOST_FILES = 200_000
MOST_RATIO = 50  # unpacked to packed bytes; scans have 2 to 10
ALWAYS = 64 << 20  # bytes that any archive may unpack to
_CHUNK = 1 << 20
_DIRECTORY = 300 * MOST_FILES  # bytes
_REMEDY = "Unpack it by other means, and give the folder"


@contextmanager
def unpacked(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """The paths, with a temporary folder of its content in place of each .zip file; removed at the end of the block.

    Raises:
        InputError: an archive that is broken, encrypted, unpacks to far more than it holds or to more than the disk
            has, or has files outside its folder or links.
    """
    with ExitStack() as stack:
        yield [
            _unpack(path, Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kitseg-zip-"))) / path.stem)
            if path.suffix.lower() == ".zip" and path.is_file()
            else path
            for path in paths
        ]


def unopened(folders: Sequence[Path]) -> list[str]:
    """The packed files in folders, where only a path of its own opens one; a line for each folder inside."""
    found: dict[Path, list[str]] = {}
    for place, inside, names in (row for folder in folders if folder.is_dir() for row in os.walk(folder)):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        for path in (Path(place) / name for name in sorted(names) if not name.startswith(".")):
            if path.suffix.lower() in (".zip", ".gz") and not path.name.lower().endswith(SUFFIXES) and path.is_file():
                found.setdefault(path.parent, []).append(path.name)
    return [f"ignored: {len(names)} packed files in {folder} ({shorten(names)})" for folder, names in found.items()]


class _Packed(io.BufferedReader):
    """A file whose directory, which zipfile reads at once, is not larger than that of as many files as allowed."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _DIRECTORY:
            raise InputError(Path(self.name), f"it holds more than {MOST_FILES} files", _REMEDY)
        return super().read(size)


def _unpack(path: Path, to: Path) -> Path:
    to.mkdir()
    try:
        with read_errors(path), _Packed(path.open("rb", buffering=0)) as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            left = min(max(ALWAYS, MOST_RATIO * path.stat().st_size), shutil.disk_usage(to).free)
            if problem := _problem(entries, left):
                raise InputError(path, problem, _REMEDY)
            for entry in entries:
                if not entry.is_dir() and _place(entry).parts[:1] != ("__MACOSX",):
                    left = _write(archive, entry, to / _place(entry), left)
    except InputError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise InputError(path, f"broken or not a zip file ({type(error).__name__})", "Pack it again") from error
    return _innermost(to)


def _innermost(folder: Path) -> Path:
    """The folder, or if it has nothing but one folder that is not a case, that one."""
    inside = list(folder.iterdir())
    if len(inside) != 1 or not inside[0].is_dir() or list(inside[0].glob("imaging.nii*")):
        return folder
    return _innermost(inside[0])


def _place(entry: zipfile.ZipInfo) -> PurePosixPath:
    return PurePosixPath(entry.filename.replace("\\", "/"))


def _problem(entries: Sequence[zipfile.ZipInfo], most: int) -> str:
    """Why an archive is not unpacked; empty where it is."""
    if len(entries) > MOST_FILES:
        return f"it holds {len(entries)} files, more than {MOST_FILES}"
    if sum(entry.file_size for entry in entries) > most:
        return f"it unpacks to far more than it holds, or than the disk has left ({most >> 20} MiB)"
    for entry in entries:
        place = _place(entry)
        if place.is_absolute() or ".." in place.parts or ":" in entry.filename:
            return "it holds a file outside its folder"
        if stat.S_ISLNK(entry.external_attr >> 16):
            return "it holds a link"
        if entry.flag_bits & 1:
            return "it is encrypted"
    return ""


def _write(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, to: Path, left: int) -> int:
    """Write an entry, and return the bytes that may still be unpacked; what an archive states may be wrong."""
    to.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(entry) as packed, to.open("xb") as plain:
        while chunk := packed.read(_CHUNK):
            left -= len(chunk)
            if left < 0:
                raise zipfile.BadZipFile("it unpacks to more than it states")
            plain.write(chunk)
    return left
