"""The errors that kitseg reports in one line instead of a traceback."""

from __future__ import annotations

import errno
import re
import unicodedata
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

_SPACE = "Free some space and run the command again: finished work is kept"
_AGAIN = "run the command again with one of these options, if it has them"  # no command has all of them
_FEWER = f"{_AGAIN}: a smaller --jobs, fewer --processes"
#: Problem and remedy by the system's error number.
_SYSTEM = {
    errno.ENOSPC: ("the disk is full", _SPACE),
    errno.EDQUOT: ("the disk quota is used up", _SPACE),
    errno.EROFS: ("the file system is read-only", "Choose a folder that is writable"),
    errno.EACCES: ("permission denied", "Choose a file or folder that you may read and write, or ask its owner"),
    errno.EPERM: ("not permitted", "Choose a file or folder that you may read and write, or ask its owner"),
    errno.EMFILE: ("too many files are open", f"Raise the limit (ulimit -n 4096), or {_FEWER}"),
    errno.ENFILE: ("too many files are open on this machine", f"Close other programs, or {_FEWER}"),
    errno.EIO: ("the disk or the network failed", "Check the disk, then run the command again"),
    errno.ESTALE: ("the network folder was lost", "Run the command again when it is back"),
    errno.ETIMEDOUT: ("the network or a network folder does not respond", "Run the command again when it does"),
    errno.ENOTCONN: ("the network or a network folder was lost", "Run the command again when it is back"),
    errno.EEXIST: ("a file is in the place of a folder", "Choose another name"),
    errno.ENAMETOOLONG: ("the name is too long", "Choose a shorter one"),
}
#: Of these, what is not the disk's or the network's fault, but that of a file or a name.
_OF_FILES = (errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENAMETOOLONG)
MEMORY = (
    "out of memory",
    f"Free some memory, or {_FEWER}, --precision bf16, a smaller model, --max-memory (refuses scans that need more)",
)
GPU = (
    "out of GPU memory",
    f"Close other programs on the GPU, or {_AGAIN}: --precision bf16, a smaller model, --device cpu",
)
#: Unicode categories: control, format (bidirectional, zero width), surrogate, line and paragraph separator.
_UNPRINTABLE = ("Cc", "Cf", "Cs", "Zl", "Zp")
LOADER = (
    "a data loader process was killed",
    "The machine may be short of memory or of /dev/shm. Free some and run the command again",
)


class KitsegError(Exception):
    """An error the user can fix; the message states the problem and the remedy in one line.

    details: further lines below the message, such as one for each value that differs.
    """

    def __init__(self, *message: object, details: Sequence[str] = ()) -> None:
        super().__init__(*message)
        self.details = tuple(details)

    def __str__(self) -> str:
        return "\n  ".join(map(printable, (super().__str__(), *self.details)))


class InputError(KitsegError):
    """A file that can't be used; the message is ``<file>: <problem>. <remedy>``."""

    def __init__(self, path: Path | str, problem: str, remedy: str) -> None:
        super().__init__(path, problem, remedy)
        self.path, self.problem, self.remedy = Path(path), problem, remedy

    def __str__(self) -> str:
        return printable(f"{self.path}: {self.problem}. {self.remedy}")


class UsageError(KitsegError):
    """Invalid usage of a command or function (exit code 2)."""


def require_extra(extra: str, *packages: str) -> None:
    """Raises UsageError with the remedy: a package of one of kitseg's extras is not installed."""
    if missing := [package for package in packages if find_spec(package) is None]:
        raise UsageError(f'{missing[0]} is not installed; pip install "kitseg[{extra}]" adds it')


def fault(error: BaseException) -> tuple[str, str] | None:
    """Problem and remedy of a failure of the machine that a user can fix; None for any other error.

    PyTorch's errors are recognized by name and message, so that this module doesn't import PyTorch.
    """
    if isinstance(error, OSError) and error.errno in _SYSTEM:
        return _SYSTEM[error.errno]
    text = str(error)
    if isinstance(error, OSError) and re.match(r"\d+ requested and \d+ written", text):  # NumPy's
        return _SYSTEM[errno.ENOSPC]
    if isinstance(error, RuntimeError):
        if "PytorchStreamWriter failed writing" in text or ("inline_container.cc" in text and "unexpected pos" in text):
            return _SYSTEM[errno.ENOSPC]
        if "DataLoader worker" in text and ("killed" in text or "exited unexpectedly" in text):
            return LOADER
        if "DefaultCPUAllocator" in text or "std::bad_alloc" in text:
            return MEMORY
        if type(error).__name__ == "OutOfMemoryError" or "CUDA error: out of memory" in text:
            return GPU
    nothing_left = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return MEMORY if nothing_left or isinstance(error, MemoryError) else None


def is_of_machine(error: BaseException | None) -> bool:
    """Whether the disk, the network or a want of memory caused an error, so that the same may succeed later."""
    while error:
        is_of_disk = isinstance(error, OSError) and error.errno in _SYSTEM.keys() - _OF_FILES
        if is_of_disk or fault(error) in (MEMORY, GPU):
            return True
        error = error.__cause__
    return False


def format_error(name: Path | str, error: BaseException) -> str:
    """An error in one line: its own message, problem and remedy of a ``fault``, or the type of an unexpected error."""
    if isinstance(error, KitsegError):
        return str(error)
    if found := fault(error):
        problem, remedy = found
        return printable(f"{name}: {problem}. {remedy}.")
    return printable(f"{name}: {type(error).__name__}: {' '.join(str(error).split())}")


def printable(text: str) -> str:
    """A text in one line that is safe to print: invisible characters and bytes that are not UTF-8 are escaped."""
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in _UNPRINTABLE else c for c in text)
