"""The file of a model bundle: a zip of plain files, none of them compressed, and ``bundle.json`` with their hashes.

Whatever lies in such a file, reading it gives only files of the names that a bundle has, and never more bytes than the
file itself holds.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from kitseg.errors import InputError
from kitseg.runtime.files import atomic_write, file_digest

SCHEMA = 1
MANIFEST = "bundle.json"
MOST_FILES = 10_000
AT_ONCE = 1 << 24  # bytes read into memory: of the manifest, and of the zip's own table
_STAGE = r"fold_\d{1,3}/\w[\w-]{0,63}/(done\.json|best/\d{1,3}\.safetensors)"
_NAME = re.compile(rf"runs/\d{{1,3}}/(config\.yaml|run\.json|{_STAGE})", re.ASCII)
_WRONG = (BadZipFile, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError)


def write_archive(path: Path, facts: Mapping[str, Any], files: Iterable[tuple[str, bytes]]) -> None:
    """Write files, one at a time in memory, and the facts with their hashes; the same content gives the same bytes."""
    rows = {}
    with atomic_write(path) as partial, ZipFile(partial, "w", ZIP_STORED) as archive:
        for name, content in files:
            archive.writestr(_entry(name), content)
            rows[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest = {"schema": SCHEMA, **facts, "files": rows}
        archive.writestr(_entry(MANIFEST), json.dumps(manifest, indent=1) + "\n")


class Archive:
    """A bundle's open file.

    Raises:
        ValueError: it holds anything that no bundle holds, or not what its manifest states.
    """

    def __init__(self, archive: ZipFile, size: int) -> None:
        _check_entries(archive.infolist(), size)
        self._archive, self.manifest = archive, _read_manifest(archive)
        found = {entry.filename: entry.file_size for entry in archive.infolist() if entry.filename != MANIFEST}
        if found != {name: row["bytes"] for name, row in self.manifest["files"].items()}:
            raise ValueError(f"its files are not those that {MANIFEST} states")

    def unpack(self, to: Path) -> None:
        """Write the files, but not the manifest, below ``to``.

        Raises:
            ValueError: one is not what the manifest states. KitsegError: ``to`` can't be written to.
        """
        for name, row in self.manifest["files"].items():
            with atomic_write(to / name) as partial:
                with self._archive.open(name) as source, partial.open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
                if file_digest(partial) != row["sha256"]:
                    raise ValueError(f"{name} has another hash than {MANIFEST} states")


@contextmanager
def open_archive(path: Path) -> Iterator[tuple[str, Archive]]:
    """A bundle's hash and its open file; what turns out to be wrong with it inside the block becomes an error in words.

    Raises:
        InputError: no bundle, a damaged one, one of another schema, or with anything that no bundle holds.
    """
    try:
        digest = file_digest(path)
        with _Sips(path) as file, ZipFile(file) as archive:
            yield digest, Archive(archive, path.stat().st_size)
    except _WRONG as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else str(error) or "it is cut short"
        raise InputError(path, f"is no sound model bundle ({reason})", "Get it anew from where it was made.") from error


class _Sips(io.FileIO):
    """A file that gives a few megabytes at a time, so that a zip's table of a million files never is in memory."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Up to ``size`` bytes; of all that is left, the first of them."""
        if size is not None and size > AT_ONCE:
            raise BadZipFile("its table of files is too large")
        return super().read(AT_ONCE if size is None or size < 0 else size)


def _entry(name: str) -> ZipInfo:
    entry = ZipInfo(name)  # of 1980, always
    entry.create_system, entry.external_attr = 3, (stat.S_IFREG | 0o644) << 16
    return entry


def _check_entries(entries: list[ZipInfo], size: int) -> None:
    if len(entries) > MOST_FILES:
        raise ValueError(f"{len(entries)} files are too many")
    for name, times in Counter(entry.filename for entry in entries).items():
        if times > 1:
            raise ValueError(f"{name!r} is in it {times} times")
    for entry in entries:
        if entry.filename != MANIFEST and not _NAME.fullmatch(entry.filename):
            raise ValueError(f"{entry.filename!r} is no file of a bundle")
        if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG):
            raise ValueError(f"{entry.filename} is no regular file")
        if entry.compress_type != ZIP_STORED or entry.compress_size != entry.file_size:
            raise ValueError(f"{entry.filename} is compressed, as nothing in a bundle is")
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError("it claims to hold more bytes than it has")


def _read_manifest(archive: ZipFile) -> dict[str, Any]:
    if archive.getinfo(MANIFEST).file_size > AT_ONCE:
        raise ValueError(f"its {MANIFEST} is too large")
    manifest: dict[str, Any] = json.loads(archive.read(MANIFEST))
    if (schema := manifest["schema"]) != SCHEMA:
        remedy = "export it again" if isinstance(schema, int) and schema < SCHEMA else "update kitseg"
        raise ValueError(f"it is of schema {schema!r}, and this version of kitseg reads {SCHEMA}: {remedy}")
    return manifest
