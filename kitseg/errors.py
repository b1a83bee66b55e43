"""The errors that kitseg reports in one line instead of a traceback."""

from __future__ import annotations

import errno
import re
import unicodedata
from pathlib import Path

_SPACE = "Free some space and call again: what is done stays done"
_AGAIN = "call again with whichever of these the command has"  # no option is one of all commands
_FEWER = f"{_AGAIN}: a smaller --jobs, fewer --processes"
#: What befell, as the system says it, and what helps.
_SYSTEM = {
    errno.ENOSPC: ("the disk is full", _SPACE),
    errno.EDQUOT: ("the disk quota is used up", _SPACE),
    errno.EROFS: ("the file system is read-only", "Choose a folder that is writable"),
    errno.EACCES: ("permission denied", "Choose a file or folder that you may read and write, or ask its owner"),
    errno.EPERM: ("not permitted", "Choose a file or folder that you may read and write, or ask its owner"),
    errno.EMFILE: ("too many files are open", f"Allow more: ulimit -n 4096, or {_FEWER}"),
    errno.ENFILE: ("too many files are open on this machine", f"End what else runs, or {_FEWER}"),
    errno.EIO: ("the disk or the network failed", "Check the disk, then call again"),
    errno.ESTALE: ("the network folder was lost", "Call again when it is back"),
    errno.ETIMEDOUT: ("the network or a network folder does not answer", "Call again when it does"),
    errno.ENOTCONN: ("the network or a network folder was lost", "Call again when it is back"),
    errno.ENAMETOOLONG: ("the name is too long", "Choose a shorter one"),
}
MEMORY = (
    "out of memory",
    f"Free some, or {_FEWER}, --precision bf16, a smaller model, --max-memory (which refuses what needs too much)",
)
GPU = ("out of GPU memory", f"End what else runs on it, or {_AGAIN}: --precision bf16, a smaller model, --device cpu")
_UNSEEN = ("Cc", "Cs", "Zl", "Zp")  # Unicode's categories: control, surrogate, line and paragraph separator
LOADER = ("a loader process was killed", "The machine may be short of memory or of /dev/shm. Free some and call again")


class KitsegError(Exception):
    """Something the user can mend; the message says what is wrong and what to do, in one line."""

    def __str__(self) -> str:
        return printable(super().__str__())


class InputError(KitsegError):
    """A file that can't be used: names the file, the problem and the remedy."""

    def __init__(self, path: Path | str, problem: str, remedy: str) -> None:
        super().__init__(path, problem, remedy)
        self.path, self.problem, self.remedy = Path(path), problem, remedy

    def __str__(self) -> str:
        return printable(f"{self.path}: {self.problem}. {self.remedy}")


class UsageError(KitsegError):
    """A command that can't mean what it says (exit code 2)."""


def fault(error: BaseException) -> tuple[str, str] | None:
    """What befell and what helps, where the machine failed in a way that a user can mend; None for any other error.

    PyTorch's errors are told by their names and words, so that nothing here imports it.
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


def format_error(name: Path | str, error: BaseException) -> str:
    """An error in one line: its own words, a fault's with what helps, or for one that nobody foresaw its type."""
    if isinstance(error, KitsegError):
        return str(error)
    if found := fault(error):
        befell, helps = found
        return printable(f"{name}: {befell}. {helps}.")
    return printable(f"{name}: {type(error).__name__}: {' '.join(str(error).split())}")


def printable(text: str) -> str:
    """A text in one line that is safe to show: control characters and bytes that are no UTF-8 become escapes."""
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in _UNSEEN else c for c in text)
