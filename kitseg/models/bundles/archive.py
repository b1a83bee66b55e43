"""The file format of a model bundle: an uncompressed zip of plain files, with their hashes in ``bundle.json``.

Unpacking a hostile file gives only files of the names that a bundle has, and never more bytes than the file itself has.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from msgspec import MsgspecError

from kitseg.errors import InputError, UsageError
from kitseg.models.ensemble_file import Member
from kitseg.models.run_folder import LARGEST
from kitseg.runtime.files import atomic_write, file_digest, zip_entry
from kitseg.runtime.provenance import FileFormat

SCHEMA = 1
MANIFEST, CARD, SAFE = "bundle.json", "README.md", ".safetensors"
MOST_FILES = 2_000
AT_ONCE = 1 << 20  # bytes read into memory: of the zip's own table, and of the manifest
_STAGE = r"fold_\d{1,3}/\w[\w-]{0,63}/(done\.json|best/\d{1,3}\.safetensors)"
_NAME = re.compile(rf"README\.md|runs/\d{{1,3}}/(config\.yaml|run\.json|{_STAGE})", re.ASCII)
_WRONG = (BadZipFile, EOFError, OSError, ValueError, KeyError, RecursionError, RuntimeError, MsgspecError, UsageError)


@dataclass(frozen=True)
class FileRow:
    """The size in bytes and the hash of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What kitseg reads of ``bundle.json``; it also states the members' stages and trainings."""

    name: str
    licenses: dict[str, str]
    members: list[Member]
    postprocess: dict[str, Any]
    files: dict[str, FileRow]


FORMAT = FileFormat(Manifest, SCHEMA, "Download or export it again.", largest=AT_ONCE)


def write_archive(path: Path, facts: Mapping[str, Any], files: Iterable[tuple[str, bytes]]) -> None:
    """Write files, one at a time in memory, and a manifest with their hashes; the same content gives the same bytes."""
    rows = {}
    with atomic_write(path) as partial, ZipFile(partial, "w", ZIP_STORED) as archive:
        for name, content in files:
            archive.writestr(zip_entry(name), content)
            rows[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest = {"schema": SCHEMA, **facts, "files": rows}
        archive.writestr(zip_entry(MANIFEST), json.dumps(manifest, indent=1) + "\n")


class Archive:
    """A bundle's open file.

    Raises:
        ValueError: an entry that a bundle can't have, or files other than the manifest states.
    """

    def __init__(self, archive: ZipFile, size: int) -> None:
        _check_entries(archive.infolist(), size)
        self._archive, self.text = archive, archive.read(MANIFEST)
        self.manifest = FORMAT.decode(self.text)
        found = {entry.filename: entry.file_size for entry in archive.infolist() if entry.filename != MANIFEST}
        if found != {name: row.bytes for name, row in self.manifest.files.items()}:
            raise ValueError(f"its files are not those in {MANIFEST}")

    def unpack(self, to: Path) -> None:
        """Write the files, but not the manifest, below ``to``.

        Raises:
            ValueError: a file whose hash is not the manifest's. KitsegError: ``to`` can't be written.
        """
        for name, row in self.manifest.files.items():
            with atomic_write(to / name) as partial:
                with self._archive.open(name) as source, partial.open("wb") as target:
                    shutil.copyfileobj(source, target, AT_ONCE)
                if file_digest(partial) != row.sha256:
                    raise ValueError(f"{name} has another hash than {MANIFEST} states")


@contextmanager
def open_archive(path: Path) -> Iterator[tuple[str, Archive]]:
    """A bundle's hash and its open file; exceptions inside the block become an InputError that names the file.

    Raises:
        InputError: not a bundle, a damaged one, one of another schema, or one with entries that a bundle can't have.
    """
    try:
        digest = file_digest(path)
        with BoundedReads(path) as file, ZipFile(file) as archive:
            yield digest, Archive(archive, path.stat().st_size)
    except _WRONG as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        problem = f"is not a valid model bundle ({reason or 'it is cut short'})"
        raise InputError(path, problem, "Download or export it again.") from error


class BoundedReads(io.FileIO):
    """A file that returns at most 1 MiB per read, so that a zip's directory of a million files is never in memory."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Up to ``size`` bytes, never more than ``AT_ONCE``."""
        if size is not None and size > AT_ONCE:
            raise BadZipFile("its table of files is too large")
        return super().read(AT_ONCE if size is None or size < 0 else size)


def _check_entries(entries: list[ZipInfo], size: int) -> None:
    if len(entries) > MOST_FILES:
        raise ValueError(f"{len(entries)} files are too many")
    for name, times in Counter(entry.filename for entry in entries).items():
        if times > 1:
            raise ValueError(f"{name!r} occurs {times} times")
    for entry in entries:
        if entry.filename != MANIFEST and not _NAME.fullmatch(entry.filename):
            raise ValueError(f"{entry.filename!r} is not a file that a bundle can have")
        if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG):
            raise ValueError(f"{entry.filename} is not a regular file")
        if entry.compress_type != ZIP_STORED or entry.compress_size != entry.file_size:
            raise ValueError(f"{entry.filename} is compressed; bundles are not")
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError("its entries claim more bytes than the file has")
    most = {entry: AT_ONCE if entry.filename == MANIFEST else LARGEST for entry in entries}
    if large := [entry for entry in entries if entry.file_size > most[entry] and not entry.filename.endswith(SAFE)]:
        raise ValueError(f"{large[0].filename} is too large")
