"""Files and folders appear under their name whole or not at all."""

from __future__ import annotations

import csv
import glob
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kitseg.errors import InputError, KitsegError


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A hidden sibling of ``path`` to write a file or a folder to; it becomes ``path`` when the block ends well.

    Otherwise it is removed, and so is one that a killed process left.

    Raises:
        KitsegError: the folder can't be written to, or the disk is full.
    """
    partial = path.with_name(f".partial.{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stray in path.parent.glob(f".partial.*.{glob.escape(path.name)}"):
            if stray == partial or not _is_alive(stray.name.split(".")[2]):
                _remove(stray)
        yield partial
        if path.is_dir() and partial.is_dir():
            shutil.rmtree(path)
        os.replace(partial, path)
    except OSError as error:
        remedy = "Free some space or choose a folder that is writable."
        raise KitsegError(f"{path}: can't be written ({error.strerror or error}). {remedy}") from error
    finally:
        _remove(partial)


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    with aside(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_table(path: Path, columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a CSV table; what a row lacks stays empty, what has no column is an error."""
    with aside(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(columns))
        table.writeheader()
        table.writerows(rows)


def write_json(path: Path, schema: int, content: Mapping[str, Any]) -> None:
    """Write a JSON object with its schema version."""
    write_text(path, json.dumps({"schema": schema, **content}, indent=1) + "\n")


def read_json(path: Path, schema: int) -> dict[str, Any]:
    """Read what ``write_json`` wrote.

    Raises:
        InputError: missing, damaged, or of another schema.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(path, f"can't be read ({error})", "Make it again with the command that wrote it.") from error
    if not isinstance(content, dict) or content.get("schema") != schema:
        raise InputError(path, f"is not of schema {schema}", "Make it again with this version of kitseg.")
    return content


def _is_alive(process: str) -> bool:
    """Whether a process with this id runs on this machine."""
    try:
        os.kill(int(process), 0)
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
