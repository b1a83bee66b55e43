"""Files and folders that appear under their name whole or not at all."""

from __future__ import annotations

import csv
import errno
import glob
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from zipfile import ZipInfo

from kitseg.errors import LOADER, InputError, KitsegError, fault, format_error

_NODE = platform.node()
#: This machine: on a shared disk, others have processes of the same ids, and perhaps names that begin alike.
HOST = re.sub(r"[^\w-]", "-", _NODE)[:20] + "-" + hashlib.sha256(_NODE.encode()).hexdigest()[:8]
A_DAY = 86_400  # seconds
_NO_SYNC = (errno.EACCES, errno.EBADF, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)
_FORMULA = re.compile(r"[=+\-@\t\r]")
_SURROGATE = re.compile("[\ud800-\udfff]")  # a byte of a file's name that is not UTF-8
LONGEST = 255 - 64  # bytes
PARTIAL = ".partial."  # how the name of a file that is being written begins
_SUFFIXES = re.compile(r"(\.[A-Za-z]\w{0,9}){1,2}\Z", re.ASCII)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A hidden sibling of ``path`` to write a file or a folder to; it becomes ``path`` when the block ends well.

    Its bytes are on the disk before it gets its name, so that not even a power cut leaves half a file. Otherwise it is
    removed, and so is what a killed process left: one of this machine at once, of another machine after a day.

    Raises:
        KitsegError: the folder can't be written to, or the disk is full.
    """
    name = short_name(path.name)
    partial, replaced = (path.with_name(f"{PARTIAL}{HOST}.{os.getpid()}.{kind}{name}") for kind in ("", "old."))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for found in path.parent.glob(f"{PARTIAL}*.{glob.escape(name)}"):
            if found in (partial, replaced) or _is_stray(found):
                _remove(found)
        yield partial
        _sync(partial)
        _replace(partial, path, replaced)
    except Exception as error:
        if not isinstance(error, OSError) and fault(error) in (None, LOADER):
            raise  # PyTorch reports a killed loader process wherever the main thread is, as here
        if (other := _other_file(error, partial, path)) is not None:
            raise KitsegError(format_error(other, error)) from error
        reason, helps = fault(error) or (getattr(error, "strerror", None) or error, "Choose a folder that is writable")
        raise KitsegError(f"{path}: can't be written ({reason}). {helps}.") from error
    finally:
        _remove(partial)


def short_name(name: str) -> str:
    """A name that is still legal with 64 bytes more: a hash of a long one replaces its middle, but no suffix."""
    content = name.encode("utf-8", "surrogateescape")
    digest = hashlib.sha256(content).hexdigest()[:16]
    found = _SUFFIXES.search(name)
    return name if len(content) <= LONGEST else f"{name[: LONGEST // 8]}.{digest}{found[0] if found else ''}"


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn the errors of the file system inside into an InputError that names the file."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        missing = "it is a link to a file that isn't there" if path.is_symlink() else "there is no such file"
        raise InputError(path, missing, "Check the path") from error
    except OSError as error:
        if not error.errno:
            raise
        reason, helps = fault(error) or (error.strerror, "Name a file that you may read")
        raise InputError(path, f"it can't be read ({reason})", helps) from error


def check_regular(path: Path) -> int:
    """The size in bytes of a regular file; InputError for a folder, and for a pipe, which would wait for a writer."""
    state = os.stat(path)
    if stat.S_ISDIR(state.st_mode):
        raise InputError(path, "it is a folder, not a file", "Name the file")
    if not stat.S_ISREG(state.st_mode):
        raise InputError(path, "it is a pipe or a device, not a file", "Name the file")
    return state.st_size


def lies_in(path: Path, *folders: Path) -> bool:
    """Whether a path, its links resolved, lies in one of the folders; False for what can't be a path."""
    try:
        real = Path(os.path.realpath(path))
    except ValueError:  # a null character
        return False
    return any(real.is_relative_to(os.path.realpath(folder)) for folder in folders)


def file_digest(path: Path) -> str:
    """The sha256 of the file's bytes, in hex, of a .mhd file also of its voxels; InputError if they can't be read."""
    data = [path.with_suffix(ending) for ending in (".raw", ".zraw")] if path.suffix.lower() == ".mhd" else []
    with read_errors(path):
        check_regular(path)
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if own := [file for file in data if file.is_file()]:
        return hashlib.sha256("".join([*map(file_digest, own), digest]).encode()).hexdigest()
    return digest


def total_bytes(paths: Iterable[Path]) -> int:
    """The size of these files together; one whose size can't be read counts as empty."""
    total = 0
    for path in paths:
        with suppress(OSError):
            total += path.stat().st_size
    return total


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_table(path: Path, columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a CSV table; what a row lacks stays empty, what has no column is an error.

    An apostrophe precedes a text that a spreadsheet would take for a formula.
    """
    with (
        atomic_write(path) as partial,
        partial.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        table = csv.DictWriter(file, list(columns))
        table.writeheader()
        for row in rows:
            formulas = {key: f"'{text}" for key, text in row.items() if isinstance(text, str) and _FORMULA.match(text)}
            table.writerow({**row, **formulas})


def write_json(path: Path, schema: int | None, content: Mapping[str, Any]) -> None:
    """Write a JSON object with its schema version; dataclasses and arrays in it become objects and lists."""
    text = json.dumps({"schema": schema, **content}, indent=1, default=_plain, ensure_ascii=False)
    write_text(path, _SURROGATE.sub(lambda found: rf"\\u{ord(found[0]):04x}", text) + "\n")


def zip_entry(name: str) -> ZipInfo:
    """The head of a file in a zip, dated 1980 and the same on every system, so that equal content gives equal bytes."""
    entry = ZipInfo(name)
    entry.create_system, entry.external_attr = 3, (stat.S_IFREG | 0o644) << 16
    return entry


def identity(content: Mapping[str, Any]) -> str:
    """JSON text of plain values, in their order, without any ``path`` or ``folder``: a model is the same anywhere."""

    def placeless(part: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in part.items() if key not in ("path", "folder")}

    return json.dumps(json.loads(json.dumps(content, default=str), object_hook=placeless))


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else vars(value)


def _replace(partial: Path, path: Path, replaced: Path) -> None:
    """Give a partial its name; a folder that has it is moved to ``replaced`` first, and back where that fails."""
    if not (path.is_dir() and partial.is_dir()):
        os.replace(partial, path)
        return
    os.replace(path, replaced)
    try:
        os.replace(partial, path)
    except BaseException:
        os.replace(replaced, path)
        raise
    _remove(replaced)


def _other_file(error: Exception, partial: Path, path: Path) -> Path | None:
    """The file that an error names where it has nothing to do with what is written, such as one that is read."""
    name = getattr(error, "filename", None)
    if not isinstance(name, str | bytes):
        return None
    named = Path(os.fsdecode(name))
    mine = partial in (named, *named.parents) or named in (path, *path.parents)
    return None if mine else named


def _sync(path: Path) -> None:
    """Have the bytes of a file, or of the files below a folder, on the disk, where the file system can do that.

    Network shares may refuse it for a file that is open for reading only.
    """
    for file in (p for p in path.rglob("*") if p.is_file()) if path.is_dir() else (path,):
        with file.open("r+b") as stream:
            try:
                os.fsync(stream.fileno())
            except OSError as error:
                if error.errno not in _NO_SYNC:
                    raise


def _is_stray(partial: Path) -> bool:
    """Whether no process writes to a partial any more: its own has ended, or on another machine it is a day old."""
    host, process = partial.name.split(".")[2:4]
    if host == HOST and sys.platform != "win32":
        return not is_alive(process)
    with suppress(OSError):
        return time.time() - partial.stat().st_mtime > A_DAY
    return False


def is_alive(process: str) -> bool:
    """Whether a process with this id runs on this machine; unknown on Windows, where signal 0 is Ctrl-C: True."""
    if sys.platform == "win32":
        return True
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
