"""The file beside a case's labels: how they came about, and by that whether they would come out the same again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from kitseg.errors import InputError, UsageError
from kitseg.runtime.files import file_digest, identity, read_json, write_json

SCHEMA = 4
RECORD = ("versions", "kitseg")  #: the part that tells a record from any other file


def recipe(**parts: Any) -> str:
    """A hash of all that decides what a scan's labels will be: of a model its own hash, but not where it lies."""
    return hashlib.sha256(identity(parts).encode()).hexdigest()


def write_record(path: Path, facts: Mapping[str, Any], made: Mapping[str, str], files: Sequence[Path]) -> None:
    """Write a case's record, after its files, whose hashes it holds.

    made: the ``recipe`` and the hash of the scan, ``scan_sha256``.
    """
    digests = {file.name: file_digest(file) for file in files}
    write_json(path, SCHEMA, {**facts, **made, "labels_sha256": digests[files[0].name], "files": digests})


def read_record(path: Path, made: Mapping[str, str]) -> dict[str, Any] | None:
    """A case's record if it was made like this, and all its files are there as they were written; else None."""
    try:
        facts = read_json(path, SCHEMA)
        whole = all(file_digest(path.with_name(name)) == digest for name, digest in facts["files"].items())
    except (InputError, OSError, KeyError, TypeError, AttributeError, ValueError):
        return None
    return facts if whole and all(facts.get(key) == value for key, value in made.items()) else None


def forget(path: Path, files: Sequence[Path]) -> None:
    """Remove a case's record before its files are written anew, and those of its files that won't be."""
    with suppress(InputError, KeyError, TypeError, AttributeError, ValueError):
        for name in read_json(path, SCHEMA)["files"]:
            if name.startswith(f"{path.stem}.") and path.with_name(name) not in files:
                path.with_name(name).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def refuse_overwrite(path: Path, mark: Sequence[str] = RECORD) -> None:
    """Never write over a file of another origin, which is one without the part that JSON of this kind has.

    Raises:
        UsageError: it would.
    """
    if path.exists():
        try:
            reduce(getitem, mark, json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            problem = "was not written by this command, or is damaged"
            raise UsageError(f"{path} {problem}; choose another folder with --output, or delete it") from error
